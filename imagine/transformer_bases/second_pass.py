"""Redraw small faces in pictures of transformers' pipelines; `imagine.pipeline.second_pass` selects the faces.

Not every family has an inpainting pipeline in diffusers, so all families do the same: the enlarged square is encoded,
noised to a level of the first pass's schedule, and drawn from there with one person by the pipeline itself (SDEdit,
arXiv 2108.01073). After every step the area around the face is restored (RePaint, arXiv 2201.09865, without its jumps).
Native reference images stay beside the person. Pipelines that change a given picture hand this over to the one of their
family that draws from words.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from imagine.errors import ConfigError
from imagine.networks.device import execution_device
from imagine.networks.diffusion import add_noise, pack_latents
from imagine.pipeline.second_pass import SmallFace, covered_latents, ellipse_around, keep_outside
from imagine.stock.people import of_prompt
from imagine.stock.second_pass import (
    PER_PROMPT_ARGUMENTS,
    StockSecondPass,
    count_steps,
    side_within,
    value_of_prompt,
)
from imagine.transformer_bases.families import family_of

# Pipelines that change a picture -> the pipeline of their family that draws from words, with the same networks.
_DRAWS_FROM_WORDS = {
    "Flux2KleinInpaintPipeline": "Flux2KleinPipeline", "ZImageImg2ImgPipeline": "ZImagePipeline",
    "QwenImageImg2ImgPipeline": "QwenImagePipeline", "QwenImageInpaintPipeline": "QwenImagePipeline",
    "FluxImg2ImgPipeline": "FluxPipeline", "FluxInpaintPipeline": "FluxPipeline",
    "StableDiffusion3Img2ImgPipeline": "StableDiffusion3Pipeline",
    "StableDiffusion3InpaintPipeline": "StableDiffusion3Pipeline",
}  # fmt: skip
_FILLS = "FluxFillPipeline"
SEVERAL_NATIVE = ("Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2Pipeline", "QwenImageEditPlusPipeline")
_NATIVE_SIDE = 1024  # pixels, of bases that do not say which size they draw
_OURS = (  # arguments of the first pass that the second one sets itself
    "height", "width", "num_inference_steps", "sigmas", "timesteps", "mu", "latents", "generator", "strength",
    "mask_image", "masked_image_latents", "padding_mask_crop", "num_images_per_prompt", "output_type", "return_dict",
    "callback_on_step_end", "callback_on_step_end_tensor_inputs", "max_area", "use_resolution_binning",
)  # fmt: skip


def redrawing_class(kind: str) -> str:
    """Return the name of the pipeline class that redraws the faces of another class's pictures."""
    return _DRAWS_FROM_WORDS.get(kind, kind)


def check_can_redraw(pipe: Any) -> None:
    """Raise ConfigError, before anything is drawn, if a pipeline cannot redraw faces."""
    kind, scheduler = type(pipe).__name__, pipe.scheduler
    if kind == _FILLS:  # its transformer expects a masked picture beside the noise
        raise ConfigError(
            f"{_FILLS} only fills masks, and cannot draw a face again from noise: leave refine_faces out, and refine "
            "the picture with FluxInpaintPipeline."
        )
    if "FlowMatch" not in type(scheduler).__name__ and not scheduler.config.get("use_flow_sigmas"):
        raise ConfigError(
            f"refine_faces cannot follow the noise levels of a {type(scheduler).__name__}: use a flow-matching "
            "scheduler, such as FlowMatchEulerDiscreteScheduler, or leave refine_faces out."
        )
    if _encoder(pipe.vae) is None:
        raise ConfigError(
            f"refine_faces cannot encode with a {type(pipe.vae).__name__}: use the base's own autoencoder, or leave "
            "refine_faces out."
        )


@dataclass(frozen=True)
class _Form:
    """How a family holds latents: cells joined to one token in each direction, and whether as a sequence of tokens.

    given, stepped: as the argument `latents`, and in callbacks.
    """

    joined: int = 1
    given: bool = False
    stepped: bool = False


_FORMS = {
    "FLUX.2": _Form(stepped=True),  # its latents are joined by the normalisation
    "FLUX.1": _Form(joined=2, given=True, stepped=True),
    "Qwen-Image": _Form(joined=2, given=True, stepped=True),
}  # the other families: as the autoencoder gives them


@dataclass(frozen=True)
class TransformerSecondPass(StockSecondPass):
    """What the second pass of a transformer's pipeline needs from the first, recorded before the first pass starts.

    kind, sigmas: the class of the first pass's pipeline and its noise levels, known when the first pass is over.
    """

    kind: str = ""
    sigmas: Sequence[float] = ()

    def refine(self, pipe: Any, out: Any, sibling: Callable[[], Any]) -> tuple[int, list[str]]:
        """Redraw the small faces in a call's result, in place (see `StockSecondPass.refine`)."""
        known = replace(self, kind=type(pipe).__name__, sigmas=[float(each) for each in pipe.scheduler.sigmas])
        return StockSecondPass.refine(known, pipe, out, sibling)

    def levels(self) -> list[float]:
        """Return the noise level at which each step begins: the last part of the first pass's schedule."""
        count, last = len(self.settings.levels(count_steps(self.given))), len(self.sigmas) - 1
        places = last * (1 - self.settings.strength * (1 - np.arange(count) / count))
        return [float(level) for level in np.interp(places, np.arange(last + 1), self.sigmas)]

    def _redraw_face(self, pipe: Any, face: SmallFace, square: Tensor, size: tuple[int, int]) -> Tensor | None:
        """Redraw a square (3, S, S) in 0..1 with its person."""
        side, levels = square.shape[-1], self.levels()
        form = _FORMS.get(family_of(pipe.denoiser).title, _Form())
        clean = pack_latents(encode(pipe, square[None]), form.joined)
        generator = torch.Generator().manual_seed(self.seeds[face.picture] + face.person)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        start = add_noise(clean, noise, torch.tensor(levels[:1], device=clean.device))
        redrawn = covered_latents(
            ellipse_around(face.box, face.place, self.settings.reach, self.settings.edge), clean
        )  # fmt: skip
        stepped = [_tokens(each) if form.stepped else each for each in (clean, noise, redrawn)]
        taken = inspect.signature(type(pipe).__call__).parameters
        sizes = {"height": side, "width": side, "max_area": side * side, "use_resolution_binning": False}
        out = pipe(
            **self.arguments(face, size, taken),
            **{name: each for name, each in sizes.items() if name in taken},
            latents=_tokens(start) if form.given else start, sigmas=levels, num_inference_steps=len(levels),
            generator=generator, output_type="pt",
            callback_on_step_end=keep_outside(stepped[0], stepped[1], levels, stepped[2]),
        )  # fmt: skip
        return cast(Tensor, out.images[0]).float().to(square.device)

    def arguments(self, face: SmallFace, size: tuple[int, int], taken: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a face's call that come from the first pass, limited to the names in `taken`."""
        prompt, changes_picture = face.picture // self.batch.copies, self.kind in _DRAWS_FROM_WORDS
        native = self.given.get("image_reference" if changes_picture else "image")
        given = {**self.given, "image": native}
        call = {name: each for name, each in given.items() if name in taken and name not in _OURS}
        for name in PER_PROMPT_ARGUMENTS:
            if name in call:
                call[name] = value_of_prompt(call[name], prompt)
        if "image" in call and redrawing_class(self.kind) not in SEVERAL_NATIVE:
            call["image"] = of_prompt(native, prompt, self.batch.prompts)
        return call | self._identity_arguments(prompt, face.person)

    def _people_in(self, prompt: int) -> int:
        return len(self.people[prompt]) if self._uses_reference(prompt) else 0

    def _redrawn_side(self, pipe: Any, pictures: Tensor) -> int:
        """Return the side in pixels of redrawn squares: the base's own size, at most the picture's longer side."""
        factor = int(pipe.vae_scale_factor)
        native = getattr(pipe, "default_sample_size", None) or getattr(pipe.denoiser.config, "sample_size", None)
        return side_within(pictures, int(native) * factor if native else _NATIVE_SIDE, 2 * factor)


def _tokens(latents: Tensor) -> Tensor:
    """Return latents (B, C, h, w) as a sequence of tokens (B, h * w, C)."""
    return latents.flatten(2).transpose(1, 2)


def redrawing_scheduler(scheduler: Any) -> Any:
    """Return a scheduler that takes noise levels as they are given, where a base's own would move them."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=scheduler.config.num_train_timesteps)


# --- autoencoders -----------------------------------------------------------------------------------------------------


def encode(pipe: Any, pictures: Tensor) -> Tensor:
    """Return the latents (B, C, h, w), float32, of pictures (B, 3, H, W) in 0..1, normalised as the transformer's."""
    encoder = _encoder(pipe.vae)
    assert encoder is not None  # `check_can_redraw`
    return encoder(pipe.vae, (pictures * 2 - 1).to(execution_device(pipe), pipe.vae.dtype)).float()


def _encode_usual(vae: Any, pictures: Tensor) -> Tensor:
    shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
    found: Tensor = (vae.encode(pictures).latent_dist.mode() - shift) * vae.config.scaling_factor
    return found


def _encode_flux2(vae: Any, pictures: Tensor) -> Tensor:
    """Join 2 x 2 cells, and normalise them by the statistics of a batch norm."""
    joined = pack_latents(vae.encode(pictures).latent_dist.mode(), 2)
    std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).view(1, -1, 1, 1)
    return (joined - vae.bn.running_mean.view(1, -1, 1, 1).to(joined)) / std.to(joined)


def _encode_qwen(vae: Any, pictures: Tensor) -> Tensor:
    """Encode a picture as a video of one frame."""
    found: Tensor = vae.encode(pictures.unsqueeze(2)).latent_dist.mode()[:, :, 0]
    mean, std = (
        torch.tensor(each, device=found.device, dtype=found.dtype).view(1, -1, 1, 1)
        for each in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (found - mean) / std


def _encode_deep(vae: Any, pictures: Tensor) -> Tensor:
    found: Tensor = vae.encode(pictures).latent * vae.config.scaling_factor
    return found


_ENCODERS: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
    "AutoencoderKL": _encode_usual, "AutoencoderKLFlux2": _encode_flux2, "AutoencoderKLQwenImage": _encode_qwen,
    "AutoencoderDC": _encode_deep,
}  # fmt: skip


def _encoder(vae: Any) -> Callable[[Any, Tensor], Tensor] | None:
    """Return how an autoencoder encodes; None if that is not known."""
    return next((_ENCODERS[base.__name__] for base in type(vae).__mro__ if base.__name__ in _ENCODERS), None)
