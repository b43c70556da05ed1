"""Several people in a picture of a stock pipeline: their regions, and drawing those pictures again that fail.

An adapter without a router cannot keep several people apart by itself, so each person gets a region of the picture: the
caller's layout, or columns from left to right.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imagine.adapter.adapter import BranchSpec
from imagine.people.persona import Persona
from imagine.pipeline.attempts import Drawn, PeopleChecker, draw_until_matched, known_people
from imagine.pipeline.layout import LEFT_TO_RIGHT, Layout, call_regions
from imagine.pipeline.notes import people_notes
from imagine.records import take
from imagine.request import Request
from imagine.stock.call import Batch
from imagine.stock.second_pass import (
    PER_PROMPT_ARGUMENTS,
    call_seeds,
    embeds_of_prompt,
    scale_of_prompt,
    value_of_prompt,
)

PER_PROMPT_PICTURES = ("image", "mask_image", "masked_image_latents", "control_image")
PLACED_NOTE = (
    "This adapter has no router, so the people were placed from left to right, in the order of the references; layout= "
    "places them otherwise."
)


def reference_regions(
    pipe: Any, spec: BranchSpec | None, layout: Layout | None, requests: Sequence[Request], given: Mapping[str, Any]
) -> tuple[Tensor | None, list[str]]:
    """Return the regions (prompts, people, height, width) of a call's references, and a note if we chose them.

    spec: the identity branch. Raises ConfigError if the layout cannot be used.
    """
    factor = int(pipe.vae_scale_factor)
    height, width = (max(1, side // factor) for side in drawn_size(pipe, given))
    several = any(len(request.people) > 1 for request in requests)
    keeps_apart = spec is not None and (spec.router or spec.people == "concatenate")
    if layout is not None or spec is None or not several or keeps_apart:
        return call_regions(layout, requests, (height, width)), []
    return call_regions(LEFT_TO_RIGHT, requests, (height, width)), [PLACED_NOTE]


def drawn_size(pipe: Any, given: Mapping[str, Any]) -> tuple[int, int]:
    """Return the height and width in pixels, or a multiple of both, of the pictures that a stock call will draw."""
    native = pipe.denoiser.config.sample_size
    sides = (native, native) if isinstance(native, int) else tuple(native)
    height, width = (side * int(pipe.vae_scale_factor) for side in sides)
    picture = given.get("image")
    is_inpainting = type(pipe).__name__ in ("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline")
    if picture is not None and not is_inpainting:  # these two draw squares, all others draw pictures like the given one
        height, width = _picture_size(picture)
    return given.get("height") or height, given.get("width") or width


def _picture_size(picture: Any) -> tuple[int, int]:
    while isinstance(picture, (list, tuple)):
        picture = picture[0]
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    height, width = picture.shape[-2:] if isinstance(picture, Tensor) else picture.shape[-3:-1]
    return int(height), int(width)


def region_rows(regions: Tensor | None, batch: Batch, negative_is_one: bool) -> Tensor | None:
    """Expand regions (prompts, people, height, width) to all rows of the batch, in the order of `Batch.rows`.

    With `negative_is_one` the negative rows show one empty picture everywhere.
    """
    if regions is None:
        return None
    regions = regions.repeat_interleave(batch.copies, 0)
    if not batch.guided:
        return regions
    negative = regions
    if negative_is_one:
        negative = torch.zeros_like(regions)
        negative[:, 0] = 1
    return torch.cat((negative, regions))


@dataclass(frozen=True)
class StockAttempts:
    """The arguments of a stock call whose pictures are checked, and drawn again if they fail.

    given: the stock arguments, with plain words for the names in prompts. people: one list per prompt. ours: our
    arguments of `__call__` by name. most: how often a picture is drawn at most; 0 if the pictures are not checked.
    pictures: names of the arguments that may hold one picture per prompt.
    """

    batch: Batch
    requests: Sequence[Request]
    given: dict[str, Any]
    people: Sequence[Sequence[Persona]]
    ours: Mapping[str, Any]
    most: int
    pictures: tuple[str, ...] = PER_PROMPT_PICTURES

    def run(self, pipe: Any, draw: Callable[..., Any]) -> Any:
        """Draw all pictures, and those again that fail; return the result of the first attempt with the best pictures.

        draw: draws from stock arguments, a batch, its people and our arguments. Every attempt after the first draws one
        picture. `refined` of the result counts the small faces of the first attempt.
        """
        if not self.most:
            return draw(self.given, self.batch, self.people, self.ours)
        # The first attempt changes the arguments and the generators.
        whole = _with_own_kwargs(self.given)
        seeds = call_seeds(self.given, self.batch.pictures, pipe)
        out = draw(self.given, self.batch, self.people, self.ours)
        notes = replace(self, given=whole)._check(pipe, out, draw, seeds)
        if hasattr(out, "images"):
            out.notes += notes
        return out

    def _check(self, pipe: Any, out: Any, draw: Callable[..., Any], first_seeds: Sequence[int]) -> list[str]:
        """Check the pictures of a result, and replace those that fail by better ones. Return notes.

        first_seeds: one per picture, from which those of other attempts are computed.
        """
        images = out[0] if isinstance(out, tuple) else out.images

        def attempt(numbers: Sequence[int], seeds: Tensor, number: int) -> Drawn:
            if number == 1:
                return Drawn(images, [0] * len(images), {}, bool(getattr(pipe, "interrupt", False)))
            results = [self._draw_again(draw, row, int(seed)) for row, seed in zip(numbers, seeds, strict=True)]
            again = [result[0] if isinstance(result, tuple) else result.images for result in results]
            return Drawn([each[0] for each in again], [0] * len(again), {}, bool(getattr(pipe, "interrupt", False)))

        recogniser = pipe._picture_recogniser()
        known = known_people(self.requests, self.people, recogniser, self.batch.copies)
        best = draw_until_matched(
            attempt, torch.tensor(first_seeds), PeopleChecker(pipe.finder, recogniser, known), self.most,
            lambda seeds, _: torch.tensor(seeds), _seed_of_attempt,
        )  # fmt: skip
        if hasattr(out, "images"):
            out.people, out.attempts, out.seeds = [each.people for each in best.checks], best.counts, best.seeds
            out.people_found = [each.faces for each in best.checks]
        return people_notes(best.checks, best.counts, best.seeds)

    def _draw_again(self, draw: Callable[..., Any], picture: int, seed: int) -> Any:
        """Draw one picture of the call once more, from noise of another seed."""
        prompt = picture // self.batch.copies
        given = {name: each for name, each in self.given.items() if name != "latents"}
        pictures = () if _takes_several_controls(self.given) else self.pictures
        for name in (*PER_PROMPT_ARGUMENTS, *pictures):
            if name in given:
                given[name] = of_prompt(given[name], prompt, self.batch.prompts)
        if (embeds := given.get("ip_adapter_image_embeds")) is not None:
            given["ip_adapter_image_embeds"] = [embeds_of_prompt(each, prompt, self.batch.guided) for each in embeds]
        ours = {**self.ours, "identity_scale": scale_of_prompt(self.ours["identity_scale"], prompt)}
        for name in ("branch_embeds", "negative_branch_embeds"):  # of the pipelines that have text adapters
            if (branches := ours.get(name)) is not None:
                ours[name] = {branch: take(each, [prompt]) for branch, each in branches.items()}
        if ours["regions"] is not None:
            ours["regions"] = ours["regions"][prompt : prompt + 1, : len(self.people[prompt])]
        given |= {"generator": torch.Generator().manual_seed(seed), "num_images_per_prompt": 1}
        return draw(_with_own_kwargs(given), Batch(1, 1, self.batch.guided), self.people[prompt : prompt + 1], ours)


def _seed_of_attempt(first: Tensor, attempt: int) -> int:
    """Return the seed of another attempt at a picture from that of the first."""
    return zlib.crc32(attempt.to_bytes(4, "little"), int(first) % 2**32)


def _with_own_kwargs(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a call's arguments, whose attention arguments are not those of another call."""
    return {name: dict(each) if name.endswith("attention_kwargs") and each else each for name, each in given.items()}


def of_prompt(value: Any, prompt: int, prompts: int) -> Any:
    """Return one prompt's part of an argument that has one row per prompt, or is shared by all."""
    shared = not hasattr(value, "__len__") or isinstance(value, str) or len(value) != prompts or prompts == 1
    return value if shared else value_of_prompt(value, prompt)


def _takes_several_controls(given: Mapping[str, Any]) -> bool:
    """Return whether the call gives several ControlNets one picture each, whose list is not one of prompts."""
    return isinstance(given.get("controlnet_conditioning_scale"), (list, tuple))
