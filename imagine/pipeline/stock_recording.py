"""Record how the pictures of a call of diffusers' pipelines came about, as `recording` does for our own.

A `StockRecord` is made before the call, which uses up the generators and changes its arguments.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagine.people.persona import Persona
from imagine.people.safety import check_prompts
from imagine.pipeline.recording import picture_flags, picture_seeds, plain_settings, weights_hash, without_names
from imagine.provenance.record import PictureRecord, ShownPerson
from imagine.request import Request, sentences

_PLAIN = (str, int, float, bool, list)  # types of settings that are recorded
_ELSEWHERE = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "output_type", "return_dict")


class StockRecord:
    """The record of one call. Making it raises SafetyError if the pipeline's classifier refuses a prompt.

    given: the stock arguments by name, with names in prompts. requests: one per prompt. settings: our own arguments.
    """

    def __init__(self, pipe: Any, given: Mapping[str, Any], requests: Sequence[Request], **settings: Any) -> None:
        self.pipe, self.requests = pipe, requests
        self.safety = getattr(pipe, "safety", None)
        check_prompts(self.safety, [(each.sentence, len(each.people)) for each in requests])
        usual = {name: each.default for name, each in inspect.signature(pipe.__call__).parameters.items()}
        self.steps = _given_or(given, usual, "num_inference_steps")
        self.guidance_scale = _given_or(given, usual, "guidance_scale")
        self.prompts = _per_request(given.get("prompt"), requests)
        self.negatives = _per_request(given.get("negative_prompt"), requests)
        self.seeds = picture_seeds(given.get("generator"), len(requests) * int(given.get("num_images_per_prompt") or 1))
        plain = {name: each for name, each in given.items() if name not in _ELSEWHERE and isinstance(each, _PLAIN)}
        self.settings = {**plain_settings(settings), **plain_settings(plain), "device": str(pipe.device.type)}
        self.output_type = given.get("output_type") or "pil"

    def add_to(self, out: Any, personas: Sequence[Sequence[Persona]] = ()) -> Any:
        """Set `faces`, `records` and `flags` of the call's result, and return it. personas: the people of each request.

        A result that is a tuple has no place for them, and latents have no records.
        """
        if hasattr(out, "images"):
            out.faces = [one for people in personas for persona in people for one in persona.faces]
            if self.output_type != "latent" and len(out.images) == len(self.seeds):
                self._add_records(out, personas)
        return out

    def _add_records(self, out: Any, personas: Sequence[Sequence[Persona]]) -> None:
        safety = self.safety
        out.flags = picture_flags(safety, out.images, self.requests)
        redrawn = getattr(out, "seeds", None) or [None] * len(self.seeds)
        settings = {**self.settings, "safety": None if safety is None else safety.name}
        sampler, model, weights = _scheduler_name(self.pipe), base_name(self.pipe), weights_hash(self.pipe)
        out.records = []
        for number, own in enumerate(self.seeds):
            request = number * len(self.requests) // len(self.seeds)
            people = personas[request] if personas else ()
            shown = tuple(ShownPerson(each.hash, each.consent_basis) for each in people)
            out.records.append(
                PictureRecord(
                    self.prompts[request], own if redrawn[number] is None else redrawn[number], self.steps,
                    self.guidance_scale, sampler, model, weights, self.negatives[request], shown, settings,
                    out.flags[number] if out.flags else "",
                )
            )  # fmt: skip


def base_name(pipe: Any) -> str:
    """Return what a pipeline's base is called: its folder or hub id, else the class of the pipeline."""
    path = Path(str(getattr(pipe, "name_or_path", None) or ""))
    if "snapshots" in path.parts:  # of the hub's cache
        repository = path.parts[path.parts.index("snapshots") - 1]
        return repository.removeprefix("models--").replace("--", "/")
    return path.name or type(pipe).__name__


def _scheduler_name(pipe: Any) -> str:
    return type(pipe.scheduler).__name__.removesuffix("Scheduler")


def _given_or(given: Mapping[str, Any], usual: Mapping[str, Any], name: str) -> Any:
    value = given.get(name)
    value = usual.get(name) if value is None else value
    return value if isinstance(value, (int, float)) else None


def _per_request(prompt: Any, requests: Sequence[Request]) -> list[str]:
    """Return one sentence per request, without names; "" where the call got embeddings."""
    each = [""] if prompt is None else sentences(prompt)
    each = each if len(each) == len(requests) else each[:1] * len(requests)
    return [without_names(one, request) for one, request in zip(each, requests, strict=True)]
