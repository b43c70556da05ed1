"""Small faces of stock pipelines drawn once more: `second_pass` says which and where, here is how they are redrawn.

A square goes, enlarged, through the inpainting sibling of the pipeline that drew the picture: the same components and
adapters, the call's own sentence and guidance, but one person, and a mask that keeps what lies round the face. So it
is diffusers' own inpainting, for denoisers with 4 channels and with 9, and what no inpainting takes (a ControlNet's
picture above all) belongs to the first pass alone.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from imagine.people.persona import Persona
from imagine.pipeline.controls import Window
from imagine.pipeline.second_pass import (
    RefineFaces,
    SmallFace,
    covered_latents,
    ellipse_around,
    find_small_faces,
    redraw_faces,
    seed_of,
)
from imagine.stock.call import Batch, select_rows

PER_PROMPT_ARGUMENTS = (
    "prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "prompt_embeds", "negative_prompt_embeds",
    "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
)  # fmt: skip
SHARED_ARGUMENTS = (
    "guidance_scale", "guidance_rescale", "eta", "clip_skip", "aesthetic_score", "negative_aesthetic_score",
    "ip_adapter_image",
)  # fmt: skip
DEFAULTS = ("guidance_scale", "num_inference_steps")  # which differ from one stock pipeline to the other
SIDE_MULTIPLE = 8  # stock pipelines take sides that are multiples of it


def inpainting(pipe: Any) -> Any:
    """diffusers' inpainting pipeline of the same kind."""
    import diffusers

    kind = "XL" if "XL" in type(pipe).__name__ else ""
    return getattr(diffusers, f"StableDiffusion{kind}InpaintPipeline")


@dataclass(frozen=True)
class StockSecondPass:
    """What the second pass of a stock call takes over from the first, before that has begun.

    given: the first one's stock arguments, people in the sentences already in plain words. people: one list per prompt.
    identity: our arguments of `__call__` by name. seeds: one per picture. ip_scales: of IP-Adapters.
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
        """Note what the first pass may change: the generators' states, scales, arguments; None if none is wanted."""
        if settings is None:
            return None
        known = inspect.signature(call).parameters
        whole = {name: known[name].default for name in DEFAULTS} | dict(given)
        whole["cross_attention_kwargs"] = dict(given.get("cross_attention_kwargs") or {})
        return cls(settings, batch, whole, people, identity, _seeds(given, batch.pictures, pipe), pipe.ip_scales)

    def refine(self, pipe: Any, out: Any, sibling: Callable[[], Any]) -> tuple[int, list[str]]:
        """Redraw the small faces in a stock call's result, in place.

        Return how many were redrawn, and a sentence for each picture where it is unclear which face is whose.
        `sibling` makes the pipeline that redraws.
        """
        whole = tuple(out) if isinstance(out, tuple) else (out.images, out.get("nsfw_content_detected"))
        images, flags = whole[0], whole[1] if len(whole) > 1 else None
        rows = range(self.batch.pictures)
        shown = [0 if flags and flags[row] else self._people_in(row // self.batch.copies) for row in rows]
        if getattr(pipe, "interrupt", False) or not any(shown):
            return 0, []
        pictures = as_tensor(images)
        side, within = _redrawn_side(pipe, pictures), self._inpainting_mask(pipe, pictures)
        faces, notes = find_small_faces(pictures, shown, pipe.finder, self.settings, side, within)
        if not faces:
            return 0, notes
        inpainting_pipeline, size = sibling(), cast("tuple[int, int]", tuple(pictures.shape[-2:]))

        def redraw(some: Sequence[SmallFace], squares: Tensor) -> list[Tensor | None]:
            return [
                self._redraw_face(inpainting_pipeline, face, square, size)
                for face, square in zip(some, squares, strict=True)
            ]

        refined = redraw_faces(pictures, faces, side, self.settings, redraw, 1, within)
        for row in {face.picture for face in refined}:
            _write(images, row, pictures[row])
        return len(refined), notes

    def _redraw_face(self, pipe: Any, face: SmallFace, square: Tensor, size: tuple[int, int]) -> Tensor | None:
        """A square (3, S, S) in 0..1 drawn again as its person; None if the safety checker objects."""
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

    # --- what a face's own call is told -----------------------------------------------------------------------------

    def arguments(self, face: SmallFace, size: tuple[int, int], taken: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that a face of a picture (height, width) shares with the first pass, so far as `taken`."""
        prompt = face.picture // self.batch.copies
        given = {name: each for name, each in self.given.items() if each is not None and name in taken}
        call = {name: _value_of_prompt(given[name], prompt) for name in PER_PROMPT_ARGUMENTS if name in given}
        call |= {name: given[name] for name in SHARED_ARGUMENTS if name in given}
        if (embeds := given.get("ip_adapter_image_embeds")) is not None:
            call["ip_adapter_image_embeds"] = [_embeds_of_prompt(each, prompt, self.batch.guided) for each in embeds]
        kwargs = dict(self.given["cross_attention_kwargs"])
        if kwargs.get("ip_adapter_masks") is not None:
            kwargs["ip_adapter_masks"] = _cut_masks(kwargs["ip_adapter_masks"], face, size)
        call["cross_attention_kwargs"] = kwargs or None
        for name in ("branch_embeds", "negative_branch_embeds"):
            if (branches := self.identity.get(name)) is not None:
                call[name] = {branch: select_rows(each, slice(prompt, prompt + 1)) for branch, each in branches.items()}
        return call | self._identity_arguments(prompt, face.person)

    def _identity_arguments(self, prompt: int, person: int) -> dict[str, Any]:
        """Whose face it is, and how strongly, when and where that acts."""
        if not self._uses_reference(prompt):
            return {}
        return {
            "reference": self.people[prompt][person],
            "identity_scale": _scale_of_prompt(self.identity["identity_scale"], prompt),
            "identity_window": self._window,
            "identity_blocks": self.identity["identity_blocks"],
        }

    @property
    def _window(self) -> Window:
        return self.settings.window(self.identity["identity_window"])

    def _uses_reference(self, prompt: int) -> bool:
        """Whether a reference is to be seen when a prompt's faces are redrawn."""
        if not self.people[prompt]:
            return False
        steps = len(self.settings.levels(_count(self.given)))
        return _any_nonzero(_scale_of_prompt(self.identity["identity_scale"], prompt)) and any(
            self._window.steps(steps)
        )

    def _people_in(self, prompt: int) -> int:
        """How many people a prompt's pictures show: those referred to, else those of IP-Adapters."""
        if self._uses_reference(prompt):
            return len(self.people[prompt])
        asked = any(self.given.get(name) is not None for name in ("ip_adapter_image", "ip_adapter_image_embeds"))
        if not asked or (
            self.ip_scales and not _any_nonzero(self.ip_scales)
        ):  # diffusers' own keep their scales elsewhere
            return 0
        masks = self.given["cross_attention_kwargs"].get("ip_adapter_masks")
        regions = [each.shape[-3] for each in ([] if masks is None else masks) if each is not None]
        return max(regions, default=1)  # one person has a region

    def _inpainting_mask(self, pipe: Any, pictures: Tensor) -> Tensor | None:
        """Where inpainting painted, (B, 1, H, W) in 0..1: all else is not the model's, and stays."""
        if self.given.get("mask_image") is None:
            return None
        height, width = pictures.shape[-2:]
        masks = pipe.mask_processor.preprocess(self.given["mask_image"], height=height, width=width)
        return torch.stack([masks[row % len(masks)] for row in range(len(pictures))]).to(pictures.device)


# --- pictures in the three forms that stock pipelines give ------------------------------------------------------------


def as_tensor(images: Any) -> Tensor:
    """PIL pictures, an array (B, H, W, 3) or a tensor (B, 3, H, W) in 0..1 as a new tensor (B, 3, H, W), float32."""
    if isinstance(images, Tensor):
        return images.detach().float().clone()
    if isinstance(images, np.ndarray):
        return torch.from_numpy(images).permute(0, 3, 1, 2).float().clone()
    return torch.stack(
        [torch.from_numpy(np.array(each.convert("RGB"))).permute(2, 0, 1).float() / 255 for each in images]
    )


def _write(images: Any, row: int, picture: Tensor) -> None:
    """Put a picture (3, H, W) in 0..1 into a row of pictures of any form; what did not change comes out as it was."""
    if isinstance(images, Tensor):
        images[row] = picture.to(images)
    elif isinstance(images, np.ndarray):
        images[row] = picture.permute(1, 2, 0).cpu().numpy()
    else:
        pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().contiguous().numpy()
        images[row] = Image.fromarray(pixels)


def _redrawn_side(pipe: Any, pictures: Tensor) -> int:
    """The side in pixels at which squares are redrawn: the base's own, but no longer than the picture's longer one."""
    factor, native = int(pipe.vae_scale_factor), pipe.denoiser.config.sample_size
    longest = max(pictures.shape[-2:])
    if native:
        longest = min(longest, (native if isinstance(native, int) else min(native)) * factor)
    step = math.lcm(SIDE_MULTIPLE, factor)
    return max(step, longest // step * step)


# --- rows and numbers -------------------------------------------------------------------------------------------------


def _seeds(given: Mapping[str, Any], count: int, pipe: Any) -> list[int]:
    """A seed for every picture that follows from what its first noise follows from, without drawing from it."""
    latents, generator = given.get("latents"), given.get("generator")
    if latents is not None:
        return [seed_of(latents[row % len(latents)]) for row in range(count)]
    if isinstance(generator, (list, tuple)):
        return [seed_of(each.get_state()) for each in generator]
    device = pipe._execution_device
    if generator is not None:
        state = generator.get_state()
    else:
        state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return [seed_of(state) + row * 1009 for row in range(count)]  # further apart than the people of one picture


def _count(given: Mapping[str, Any]) -> int:
    """How many steps a call asks for."""
    lists = [given[name] for name in ("timesteps", "sigmas") if given.get(name) is not None]
    return len(lists[0]) if lists else int(given["num_inference_steps"])


def _steps(settings: RefineFaces, given: Mapping[str, Any]) -> int:
    """What to ask inpainting for, so that at this strength it takes as many steps as it should."""
    wanted = len(settings.levels(_count(given)))
    asked = math.ceil(wanted / settings.strength)
    return asked if int(asked * settings.strength) >= wanted else asked + 1  # diffusers rounds down


def _value_of_prompt(value: Any, prompt: int) -> Any:
    """One prompt's part of an argument that may have a row for each."""
    if isinstance(value, Tensor):
        return value[prompt : prompt + 1]
    return value[prompt % len(value)] if isinstance(value, (list, tuple)) else value


def _embeds_of_prompt(embeds: Tensor, prompt: int, guided: bool) -> Tensor:
    """One prompt's rows of an IP-Adapter's embeddings, the negative one first if guided."""
    sides = embeds.chunk(2) if guided else (embeds,)
    return torch.cat([side[prompt : prompt + 1] if len(side) > 1 else side for side in sides])


def _scale_of_prompt(scale: Any, prompt: int) -> Any:
    """One prompt's part of an identity scale: one number, or one per prompt, or a mapping to these."""
    if isinstance(scale, Mapping):
        return {name: _scale_of_prompt(each, prompt) for name, each in scale.items()}
    each = torch.as_tensor(scale, dtype=torch.float32).flatten()
    return float(each[prompt % len(each)])


def _any_nonzero(scale: Any) -> bool:
    """Whether anything in a scale, however nested, is not 0."""
    if isinstance(scale, Mapping):
        return any(map(_any_nonzero, scale.values()))
    return any(map(_any_nonzero, scale)) if isinstance(scale, (list, tuple)) else bool(scale)


def _cut_masks(masks: Any, face: SmallFace, size: tuple[int, int]) -> Any:
    """The part of IP-Adapters' masks, each (..., images, h, w), that lies in a face's square."""
    left, top, right, bottom = face.place

    def crop_square(mask: Tensor) -> Tensor:
        return F.interpolate(mask.float(), size=size)[..., top:bottom, left:right].to(mask.dtype)

    return (
        crop_square(masks)
        if isinstance(masks, Tensor)
        else [None if each is None else crop_square(each) for each in masks]
    )
