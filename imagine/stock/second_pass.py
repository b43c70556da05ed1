"""Redraw small faces in pictures of stock pipelines; `imagine.pipeline.second_pass` selects the faces.

The enlarged square goes through the inpainting pipeline of the same kind as the pipeline that drew the picture, with
the same components and adapters, the call's prompt and guidance, one person, and a mask that keeps the area around the
face. Because it is diffusers' own inpainting, denoisers with 4 and with 9 channels work. Arguments that inpainting does
not take (for example a ControlNet's picture) apply to the first pass only.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from imagine.networks.device import execution_device
from imagine.people.persona import Persona
from imagine.pipeline.controls import Window
from imagine.pipeline.second_pass import (
    RefineFaces,
    SmallFace,
    covered_latents,
    crop_squares,
    ellipse_around,
    find_small_faces,
    paste_squares,
    people_from_left,
    seed_of,
)
from imagine.records import take
from imagine.stock.call import Batch

PER_PROMPT_ARGUMENTS = (
    "prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3", "prompt_embeds",
    "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds", "prompt_embeds_mask",
    "negative_prompt_embeds_mask", "prompt_attention_mask", "negative_prompt_attention_mask",
)  # fmt: skip
SHARED_ARGUMENTS = (
    "guidance_scale", "guidance_rescale", "eta", "clip_skip", "aesthetic_score", "negative_aesthetic_score",
    "ip_adapter_image",
)  # fmt: skip
DEFAULTS = ("guidance_scale", "num_inference_steps")  # these defaults differ between stock pipelines
SIDE_MULTIPLE = 8  # stock pipelines require sides that are multiples of this


def inpainting(pipe: Any) -> Any:
    """Return diffusers' inpainting pipeline class of the same kind."""
    import diffusers

    kind = "XL" if "XL" in type(pipe).__name__ else ""
    return getattr(diffusers, f"StableDiffusion{kind}InpaintPipeline")


@dataclass(frozen=True)
class StockSecondPass:
    """What the second pass of a stock call needs from the first, recorded before the first pass starts.

    given: the first pass's stock arguments, with plain words for the placeholders in prompts.
    people: one list per prompt.
    identity: our arguments of `__call__` by name.
    seeds: one per picture.
    ip_scales: the scales of IP-Adapters.
    """

    settings: RefineFaces
    batch: Batch
    given: Mapping[str, Any]
    people: Sequence[Sequence[Persona]]
    identity: Mapping[str, Any]
    seeds: Sequence[int]
    ip_scales: Sequence[Any]

    @classmethod
    def plan(
        cls,
        pipe: Any,
        call: Any,
        settings: RefineFaces | None,
        batch: Batch,
        given: Mapping[str, Any],
        people: Sequence[Sequence[Persona]],
        identity: Mapping[str, Any],
    ) -> "StockSecondPass | None":
        """Record the generator states, scales and arguments, which the first pass may change. None without settings."""
        if settings is None:
            return None
        known = inspect.signature(call).parameters
        whole = {name: known[name].default for name in DEFAULTS if name in known} | dict(given)
        whole["cross_attention_kwargs"] = dict(given.get("cross_attention_kwargs") or {})
        return cls(settings, batch, whole, people, identity, call_seeds(given, batch.pictures, pipe), pipe.ip_scales)

    def refine(self, pipe: Any, out: Any, sibling: Callable[[], Any]) -> tuple[int, list[str]]:
        """Redraw the small faces in a stock call's result, in place.

        `sibling` creates the pipeline that redraws. Return how many faces were redrawn, and one sentence for each
        picture whose faces cannot be assigned to its people.
        """
        whole = tuple(out) if isinstance(out, tuple) else (out.images, out.get("nsfw_content_detected"))
        images, flags = whole[0], whole[1] if len(whole) > 1 else None
        rows = range(self.batch.pictures)
        counts = [0 if flags and flags[row] else self._people_in(row // self.batch.copies) for row in rows]
        if getattr(pipe, "interrupt", False) or not any(counts):
            return 0, []
        pictures = as_tensor(images)
        side, within = self._redrawn_side(pipe, pictures), self._inpainting_mask(pipe, pictures)
        faces, notes = find_small_faces(pictures, counts, pipe.finder, self.settings, side, within)
        faces = [self._with_person(face) for face in faces]
        if not faces:
            return 0, list(notes.values())
        redrawing, size = sibling(), cast("tuple[int, int]", tuple(pictures.shape[-2:]))

        def redraw(some: Sequence[SmallFace], squares: Tensor) -> list[Tensor | None]:
            return [
                self._redraw_face(redrawing, face, square, size) for face, square in zip(some, squares, strict=True)
            ]

        refined = list[SmallFace]()
        for some, squares in crop_squares(pictures, faces, side, 1):
            refined += paste_squares(pictures, some, redraw(some, squares), self.settings, within)
        for row in {face.picture for face in refined}:
            _write(images, row, pictures[row])
        return len(refined), list(notes.values())

    def _with_person(self, face: SmallFace) -> SmallFace:
        """Return a face with its person, who is only known by the place from the left."""
        prompt, regions = face.picture // self.batch.copies, self.identity.get("regions")
        if not self.people[prompt]:
            return face
        order = people_from_left(None if regions is None else regions[prompt], len(self.people[prompt]))
        return replace(face, person=order[face.person])

    def _redraw_face(self, pipe: Any, face: SmallFace, square: Tensor, size: tuple[int, int]) -> Tensor | None:
        """Redraw a square (3, S, S) in 0..1 with its person. Return None if the safety checker flags the result."""
        side, step = square.shape[-1], int(pipe.vae_scale_factor)
        ellipse = ellipse_around(face.box, face.place, self.settings.reach, self.settings.edge)
        mask = covered_latents(ellipse, square[:, ::step, ::step]).float()
        out = pipe(
            **self.arguments(face, size, inspect.signature(inpainting(pipe).__call__).parameters),
            image=square[None],
            mask_image=mask.repeat_interleave(step, -1).repeat_interleave(step, -2),
            height=side,
            width=side,
            strength=float(self.settings.strength),
            num_inference_steps=_steps(self.settings, self.given),
            generator=torch.Generator().manual_seed(self.seeds[face.picture] + face.person),
            output_type="pt",
        )
        flags = out.get("nsfw_content_detected")
        return None if flags and flags[0] else cast(Tensor, out.images[0]).float().to(square.device)

    # --- arguments of one face's call -------------------------------------------------------------------------------

    def arguments(self, face: SmallFace, size: tuple[int, int], taken: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a face's call that come from the first pass, limited to the names in `taken`.

        size: the picture's height and width.
        """
        prompt = face.picture // self.batch.copies
        given = {name: each for name, each in self.given.items() if each is not None and name in taken}
        call = {name: value_of_prompt(given[name], prompt) for name in PER_PROMPT_ARGUMENTS if name in given}
        call |= {name: given[name] for name in SHARED_ARGUMENTS if name in given}
        if (embeds := given.get("ip_adapter_image_embeds")) is not None:
            call["ip_adapter_image_embeds"] = [embeds_of_prompt(each, prompt, self.batch.guided) for each in embeds]
        kwargs = dict(self.given["cross_attention_kwargs"])
        if kwargs.get("ip_adapter_masks") is not None:
            kwargs["ip_adapter_masks"] = _cut_masks(kwargs["ip_adapter_masks"], face, size)
        call["cross_attention_kwargs"] = kwargs or None
        for name in ("branch_embeds", "negative_branch_embeds"):
            if (branches := self.identity.get(name)) is not None:
                call[name] = {branch: take(each, slice(prompt, prompt + 1)) for branch, each in branches.items()}
        return call | self._identity_arguments(prompt, face.person)

    def _identity_arguments(self, prompt: int, person: int) -> dict[str, Any]:
        """Return the reference of a face's call, with its identity scale, window and blocks."""
        if not self._uses_reference(prompt):
            return {}
        return {
            "reference": self.people[prompt][person],
            "identity_scale": scale_of_prompt(self.identity["identity_scale"], prompt),
            "identity_window": self._window,
            "identity_blocks": self.identity["identity_blocks"],
        }

    @property
    def _window(self) -> Window:
        return self.settings.window(self.identity["identity_window"])

    def _uses_reference(self, prompt: int) -> bool:
        """Return whether a reference acts when a prompt's faces are redrawn."""
        if not self.people[prompt]:
            return False
        steps = len(self.settings.levels(count_steps(self.given)))
        return _any_nonzero(scale_of_prompt(self.identity["identity_scale"], prompt)) and any(self._window.steps(steps))

    def _people_in(self, prompt: int) -> int:
        """Return the number of people in a prompt's pictures: those of its reference, else those of IP-Adapters."""
        if self._uses_reference(prompt):
            return len(self.people[prompt])
        has_image = any(self.given.get(name) is not None for name in ("ip_adapter_image", "ip_adapter_image_embeds"))
        # An empty `ip_scales` says nothing: diffusers' own IP-Adapters store their scales elsewhere.
        if not has_image or (self.ip_scales and not _any_nonzero(self.ip_scales)):
            return 0
        masks = self.given["cross_attention_kwargs"].get("ip_adapter_masks")
        regions = [each.shape[-3] for each in ([] if masks is None else masks) if each is not None]
        return max(regions, default=1)  # each person has one region

    def _redrawn_side(self, pipe: Any, pictures: Tensor) -> int:
        """Return the side in pixels of redrawn squares: the base's own size, at most the picture's longer side."""
        factor, native = int(pipe.vae_scale_factor), pipe.denoiser.config.sample_size
        return side_within(pictures, native and (native if isinstance(native, int) else min(native)) * factor, factor)

    def _inpainting_mask(self, pipe: Any, pictures: Tensor) -> Tensor | None:
        """Return the call's inpainting mask (B, 1, H, W) in 0..1, or None; pixels outside it must not change."""
        if self.given.get("mask_image") is None:
            return None
        height, width = pictures.shape[-2:]
        masks = pipe.mask_processor.preprocess(self.given["mask_image"], height=height, width=width)
        return torch.stack([masks[row % len(masks)] for row in range(len(pictures))]).to(pictures.device)


# --- pictures in the three forms that stock pipelines return ----------------------------------------------------------


def as_tensor(images: Any) -> Tensor:
    """Convert PIL pictures, an array (B, H, W, 3) or a tensor (B, 3, H, W) in 0..1 to a new float32 (B, 3, H, W)."""
    if isinstance(images, Tensor):
        return images.detach().float().clone()
    if isinstance(images, np.ndarray):
        return torch.from_numpy(images).permute(0, 3, 1, 2).float().clone()
    return torch.stack(
        [torch.from_numpy(np.array(each.convert("RGB"))).permute(2, 0, 1).float() / 255 for each in images]
    )


def _write(images: Any, row: int, picture: Tensor) -> None:
    """Write a picture (3, H, W) in 0..1 into a row of pictures of any form; unchanged pixels keep their values."""
    if isinstance(images, Tensor):
        images[row] = picture.to(images)
    elif isinstance(images, np.ndarray):
        images[row] = picture.permute(1, 2, 0).cpu().numpy()
    else:
        pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().contiguous().numpy()
        images[row] = Image.fromarray(pixels)


# --- rows and numbers -------------------------------------------------------------------------------------------------


def call_seeds(given: Mapping[str, Any], count: int, pipe: Any) -> list[int]:
    """Return one seed per picture, computed from its latents or generator state without drawing from the generator."""
    latents, generator = given.get("latents"), given.get("generator")
    if latents is not None:
        return [seed_of(latents[row % len(latents)]) for row in range(count)]
    if isinstance(generator, (list, tuple)):
        return [seed_of(each.get_state()) for each in generator]
    device = execution_device(pipe)
    if generator is not None:
        state = generator.get_state()
    else:
        state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return [seed_of(state) + row * 1009 for row in range(count)]  # the offset leaves room for the people of one picture


def side_within(pictures: Tensor, most: int | None, factor: int) -> int:
    """Return the longer side of pictures (B, 3, H, W), at most `most`, down to what pipelines and `factor` divide."""
    longest = max(pictures.shape[-2:])
    step = math.lcm(SIDE_MULTIPLE, factor)
    return max(step, (min(longest, most) if most else longest) // step * step)


def count_steps(given: Mapping[str, Any]) -> int:
    """Return the number of steps that a call's arguments request."""
    lists = [given[name] for name in ("timesteps", "sigmas") if given.get(name) is not None]
    return len(lists[0]) if lists else int(given["num_inference_steps"])


def _steps(settings: RefineFaces, given: Mapping[str, Any]) -> int:
    """Return the num_inference_steps with which inpainting runs the wanted number of steps at this strength."""
    wanted = len(settings.levels(count_steps(given)))
    requested = math.ceil(wanted / settings.strength)
    return requested if int(requested * settings.strength) >= wanted else requested + 1  # diffusers rounds down


def value_of_prompt(value: Any, prompt: int) -> Any:
    """Return one prompt's part of an argument that may have one row per prompt."""
    if isinstance(value, Tensor):
        return value[prompt : prompt + 1]
    if not isinstance(value, (list, tuple)):
        return value
    own = value[prompt % len(value)]
    return [own] if isinstance(own, Tensor) else own  # encoded prompts of Z-Image are a list, also those of one prompt


def embeds_of_prompt(embeds: Tensor, prompt: int, guided: bool) -> Tensor:
    """Return one prompt's rows of an IP-Adapter's embeddings; the negative row is first if guided."""
    sides = embeds.chunk(2) if guided else (embeds,)
    return torch.cat([side[prompt : prompt + 1] if len(side) > 1 else side for side in sides])


def scale_of_prompt(scale: Any, prompt: int) -> Any:
    """Return one prompt's part of an identity scale, which is one number, one per prompt, or a mapping to these."""
    if isinstance(scale, Mapping):
        return {name: scale_of_prompt(each, prompt) for name, each in scale.items()}
    each = torch.as_tensor(scale, dtype=torch.float32).flatten()
    return float(each[prompt % len(each)])


def _any_nonzero(scale: Any) -> bool:
    """Return whether any number in a possibly nested scale is not 0."""
    if isinstance(scale, Mapping):
        return any(map(_any_nonzero, scale.values()))
    return any(map(_any_nonzero, scale)) if isinstance(scale, (list, tuple)) else bool(scale)


def _cut_masks(masks: Any, face: SmallFace, size: tuple[int, int]) -> Any:
    """Crop IP-Adapters' masks, each (..., images, h, w), to a face's square."""
    left, top, right, bottom = face.place

    def crop_square(mask: Tensor) -> Tensor:
        return F.interpolate(mask.float(), size=size)[..., top:bottom, left:right].to(mask.dtype)

    return (
        crop_square(masks)
        if isinstance(masks, Tensor)
        else [None if each is None else crop_square(each) for each in masks]
    )
