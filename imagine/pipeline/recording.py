"""Record how the pictures of a call came about: one `PictureRecord` for each, which is saved with the picture.

The prompt is recorded with {a}, {b} ... in place of names, so that no name reaches a file; with the references in the
same order it draws the same picture.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import nn

from imagine.networks import weights
from imagine.people.persona import Persona
from imagine.people.safety import SafetyClassifier
from imagine.pipeline.call import CallSettings
from imagine.provenance.record import PictureRecord, ShownPerson
from imagine.request import Request, generators, sentences, word_notes

HASH_DIGITS = 10  # as the model hash of other programs


@dataclass(frozen=True)
class CallRecord:
    """A call as it was asked for. `seeds` has one entry per picture; the copies of a request are adjacent."""

    requests: Sequence[Request]
    personas: Sequence[Sequence[Persona]]  # the people of each request
    prompt: Any  # a sentence, a list of sentences, or None if the call got tokens
    negative_prompt: Any
    seeds: Sequence[int | None]
    arguments: Mapping[str, Any]

    @property
    def copies(self) -> int:
        """Return the number of pictures for each request."""
        return len(self.seeds) // len(self.requests)

    def sentences(self) -> list[tuple[str, str]]:
        """Return the prompt and the negative prompt of each request, without names."""
        plain = [request.sentence for request in self.requests]
        prompts = plain if self.prompt is None else sentences(self.prompt)
        negatives = [""] if self.negative_prompt is None else sentences(self.negative_prompt, "negative_prompt")
        negatives = negatives if len(negatives) > 1 else negatives * len(plain)
        each = zip(prompts, negatives, self.requests, strict=True)
        return [(without_names(prompt, one), without_names(negative, one)) for prompt, negative, one in each]


def record_call(pipe: Any, out: Any, plan: CallSettings, call: CallRecord) -> None:
    """Set `records` and `flags` of the output of a call, and add the notes on its prompts."""
    safety = getattr(pipe, "safety", None)
    seeds = [own if again is None else again for own, again in zip(call.seeds, out.seeds or call.seeds, strict=True)]
    flags = [] if plan.output_type == "latent" else picture_flags(safety, out.images, call.requests)
    settings = {
        **plain_settings(call.arguments), "identity_guidance_scale": plan.guidance.identity,
        "guidance_rescale": plan.guidance.rescale, "guidance_balance": plan.guidance.balanced,
        "identity_window": [plan.window.start, plan.window.end], "attempts": max(1, plan.attempts),
        "refine_faces": plan.refining is not None, "pictures_in_call": len(seeds),
        "safety": None if safety is None else safety.name, "device": str(pipe.device.type),
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }  # fmt: skip
    records = []
    for number, (prompt, negative) in enumerate(call.sentences()):
        people = tuple(ShownPerson(persona.hash, persona.consent_basis) for persona in call.personas[number])
        record = PictureRecord(
            prompt, None, len(plan.scheduler.timesteps), plan.guidance.text,
            type(plan.scheduler).__name__.removesuffix("Scheduler"), base_name(pipe), weights_hash(pipe), negative,
            people, settings,
        )  # fmt: skip
        places = range(number * call.copies, (number + 1) * call.copies)
        records += [replace(record, seed=seeds[place], flag=flags[place] if flags else "") for place in places]
    out.records, out.flags = records, flags
    out.notes = [*word_notes(call.prompt, call.negative_prompt), *out.notes]


def base_name(pipe: Any) -> str:
    """Return what a pipeline's base is called: as its adapter's file calls it, else the class of the pipeline."""
    adapter = getattr(pipe, "adapter", None)
    return str((adapter.metadata.get("base") if adapter is not None else None) or type(pipe).__name__)


def picture_seeds(given: Any, count: int) -> list[int | None]:
    """Return the seed that draws each of `count` pictures alone; None where there is none.

    A seed is known only of a generator from which nothing was drawn yet. If one generator serves several pictures, only
    the first has a seed.
    """
    each = generators(given, count)
    seeds: list[int | None] = []
    for number, one in enumerate(each):
        is_shared = one is not None and any(one is other for other in each[:number])
        seeds.append(None if one is None or is_shared or not _is_fresh(one) else one.initial_seed())
    return seeds


def _is_fresh(generator: torch.Generator) -> bool:
    same = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    return torch.equal(generator.get_state(), same.get_state())


def without_names(prompt: str, request: Request) -> str:
    """Return a prompt with {a}, {b} ... in place of the names in braces, in the order of the references."""
    for person in request.people:
        letter = "abcdefgh"[person.place % 8]
        prompt = prompt.replace(f"{{{person.name}}}", f"{{{letter}}}")
    return prompt


def plain_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of a call as values for JSON; a tensor or another object is named by its class."""
    return {name: _plain(value) for name, value in given.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() <= 16:
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else type(value).__name__


def weights_hash(pipe: Any) -> str:
    """Return a hash of all networks of a pipeline (10 digits), computed again only if their weights have changed.

    It is made of their fingerprints (`weights.fingerprint`). "" if weights are not in memory, as in some offloading.
    """
    modules: dict[str, nn.Module] = {n: m for n, m in pipe._suspects().items() if isinstance(m, nn.Module)}
    parameters = [each for module in modules.values() for each in module.parameters()]
    if any(each.is_meta for each in parameters):
        return ""
    version = hash(tuple((id(each), 0 if each.is_inference() else each._version) for each in parameters))
    known: tuple[int, str] | None = pipe.__dict__.get("_weights_hash")
    if known is None or known[0] != version:
        text = " ".join(f"{name} {weights.fingerprint(module)}" for name, module in sorted(modules.items()))
        known = version, hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]
        pipe.__dict__["_weights_hash"] = known
    return known[1]


def picture_flags(classifier: SafetyClassifier | None, images: Any, requests: Sequence[Request]) -> list[str]:
    """Return why each picture is flagged, "" for one that is not; an empty list without a classifier.

    images: PIL pictures, an array (B, H, W, 3) or tensor (B, 3, H, W) in 0..1.
    """
    if classifier is None:
        return []
    if isinstance(images, torch.Tensor):
        images = images.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    copies, flags = len(images) // len(requests), []
    for number, image in enumerate(images):
        request = requests[number // copies]
        picture = image if isinstance(image, Image.Image) else Image.fromarray((image * 255).round().astype("uint8"))
        flags.append(classifier.check_picture(picture, request.sentence, len(request.people)))
    return flags
