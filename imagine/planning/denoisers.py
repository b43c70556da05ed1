"""How each kind of denoiser is called: its inputs for a step, its text tokens, its guidance, and native references.

The values are those of the pipelines of diffusers 0.42. Text is planned at the length to which a pipeline pads it. Two
families do not pad (Z-Image, Qwen-Image): for them it is `WORDS` tokens, a long sentence.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imagine.blueprints.blueprint import Blueprint
from imagine.errors import ConfigError
from imagine.transformer_bases.families import family_of

WORDS = 128
REFERENCE_SIDE = 1024  # pixels; pipelines shrink native references to an area of this square
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One class of denoisers.

    make: returns the inputs of a call. text: text tokens that the denoiser sees. encoded: tokens that the language
    model encodes for them. steps: the pipeline's default. patch: latents per image token along a side. two_passes:
    guidance runs the denoiser twice instead of doubling the rows. native: whether it takes native reference images.
    native_text: further text tokens for each of these, from a vision-language encoder.
    """

    make: Callable[["Call"], Inputs]
    text: int
    encoded: int
    steps: int
    patch: int = 2
    two_passes: bool = False
    native: bool = False
    native_text: int = 0


@dataclass(frozen=True)
class Call:
    """What the inputs of one pass are made for."""

    denoiser: Any
    rows: int
    sides: tuple[int, int]  # height and width in latents
    text: int
    native: Sequence[tuple[int, int]] = ()

    def random(self, *shape: int) -> Tensor:
        """Return a tensor on the denoiser's device, in the precision that it computes in."""
        parameter = next(self.denoiser.parameters())
        return torch.randn(*shape, device=parameter.device, dtype=self.denoiser.dtype)

    def full(self, value: float, dtype: torch.dtype | None = None) -> Tensor:
        """Return one value for each row."""
        parameter = next(self.denoiser.parameters())
        return torch.full((self.rows,), value, device=parameter.device, dtype=dtype or self.denoiser.dtype)


def kind_of(denoiser: str) -> Kind:
    """Return how denoisers of this class are called. Raises ConfigError for an unknown class."""
    if denoiser not in KINDS:
        raise ConfigError(f"A {denoiser} cannot be planned for: choose a base of {', '.join(KINDS)}.")
    return KINDS[denoiser]


def is_guided(base: Blueprint) -> bool:
    """Return whether a base draws with classifier-free guidance unless the caller says otherwise."""
    if base.guided is not None:
        return base.guided
    return base.denoiser.kind != "FluxTransformer2DModel" and not base.denoiser.config.get("guidance_embeds", False)


def unet_inputs(unet: nn.Module, rows: int, sides: tuple[int, int], text_length: int = 77) -> Inputs:
    """Return inputs for any Stable Diffusion denoiser, on its device and in its precision (random, or meta tensors)."""
    return _unet(Call(unet, rows, sides, text_length))


def step_inputs(
    denoiser: Any, rows: int, sides: tuple[int, int], text: int | None = None, native: Sequence[tuple[int, int]] = ()
) -> Inputs:
    """Return inputs of one pass for any denoiser, on its device and in its precision (random, or meta tensors).

    sides: height and width in latents. text: tokens; by default as many as the pipeline gives. native: the sizes of
    native references in latents. Raises ConfigError if the denoiser takes none.
    """
    kind = kind_of(type(denoiser).__name__)
    if native and not kind.native:
        raise ConfigError(f"A {type(denoiser).__name__} takes no native reference images: leave them out.")
    length = kind.text + len(native) * kind.native_text if text is None else text
    return kind.make(Call(denoiser, rows, sides, length, tuple(native)))


def attention_argument(denoiser: Any) -> str:
    """Return the argument of `forward` that takes the conditioning."""
    name = type(denoiser).__name__
    return "cross_attention_kwargs" if name == "UNet2DConditionModel" else family_of(denoiser).kwargs


def first_output(denoiser: Any, inputs: Inputs, conditioning: Any = None) -> Any:
    """Run one pass; return what the denoiser predicts, (rows, ...)."""
    given = dict(inputs)
    if conditioning is not None:
        given[attention_argument(denoiser)] = {"conditioning": conditioning}
    with _positions_on_device(denoiser):
        out = denoiser(**given, return_dict=False)[0]
    return torch.stack(list(out)) if isinstance(out, (list, tuple)) else out


@contextmanager
def _positions_on_device(denoiser: Any) -> Iterator[None]:
    """Move position ids to the denoiser's device when they are embedded.

    They are made on the CPU, because adapters read from their values which tokens are the target's, and tensors of the
    meta device have no values.
    """
    embedding = getattr(denoiser, "pos_embed", None)
    if type(denoiser).__name__ not in ("FluxTransformer2DModel", "Flux2Transformer2DModel") or embedding is None:
        yield
        return
    device = next(denoiser.parameters()).device
    handle = embedding.register_forward_pre_hook(lambda _, args: (args[0].to(device), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


# --- inputs by class --------------------------------------------------------------------------------------------------
def _unet(call: Call) -> Inputs:
    config: Any = call.denoiser.config
    parameter = next(call.denoiser.parameters())
    inputs: Inputs = {
        "sample": call.random(call.rows, config.in_channels, *call.sides),
        "timestep": torch.full((call.rows,), 500.0, device=parameter.device),
        "encoder_hidden_states": call.random(call.rows, call.text, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        ids = 6  # SDXL's size and crop conditioning
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": call.random(call.rows, pooled),
            "time_ids": call.random(call.rows, ids),
        }
    if config.class_embed_type == "projection":
        inputs["class_labels"] = call.random(call.rows, config.projection_class_embeddings_input_dim)
    return inputs


def _grid(sides: tuple[int, int]) -> tuple[int, int]:
    return sides[0] // 2, sides[1] // 2


def _ids(sides: tuple[int, int], first: int, width: int) -> Tensor:
    """Return position ids (tokens, width) of one picture, whose first coordinate is `first`."""
    height, across = _grid(sides)
    ids = torch.zeros(height, across, width)
    ids[..., 0] = first
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(across)
    return ids.reshape(-1, width)


def _packed(call: Call, channels: int) -> Tensor:
    """Return the image tokens of the target and of the native references, side by side."""
    lengths = [height * width for height, width in map(_grid, (call.sides, *call.native))]
    return call.random(call.rows, sum(lengths), channels)


def _flux2(call: Call) -> Inputs:
    config = call.denoiser.config
    ids = [_ids(call.sides, 0, 4)] + [_ids(each, 10 + 10 * number, 4) for number, each in enumerate(call.native)]
    guidance = {"guidance": call.full(4.0)} if config.guidance_embeds else {}
    return {
        "hidden_states": _packed(call, config.in_channels),
        "encoder_hidden_states": call.random(call.rows, call.text, config.joint_attention_dim),
        "timestep": call.full(0.5), "img_ids": torch.cat(ids), "txt_ids": torch.zeros(call.text, 4), **guidance,
    }  # fmt: skip


def _flux(call: Call) -> Inputs:
    config = call.denoiser.config
    ids = [_ids(call.sides, 0, 3)] + [_ids(each, 1, 3) for each in call.native]
    guidance = {"guidance": call.full(3.5)} if config.guidance_embeds else {}
    return {
        "hidden_states": _packed(call, config.in_channels),
        "encoder_hidden_states": call.random(call.rows, call.text, config.joint_attention_dim),
        "pooled_projections": call.random(call.rows, config.pooled_projection_dim),
        "timestep": call.full(0.5), "img_ids": torch.cat(ids), "txt_ids": torch.zeros(call.text, 3), **guidance,
    }  # fmt: skip


def _qwen(call: Call) -> Inputs:
    config = call.denoiser.config
    shapes = [[(1, *_grid(each)) for each in (call.sides, *call.native)]] * call.rows
    return {
        "hidden_states": _packed(call, config.in_channels),
        "encoder_hidden_states": call.random(call.rows, call.text, config.joint_attention_dim),
        "timestep": call.full(0.5), "img_shapes": shapes,
    }  # fmt: skip


def _z_image(call: Call) -> Inputs:
    config = call.denoiser.config
    pictures = call.random(call.rows, config.in_channels, 1, *call.sides)
    words = call.random(call.rows, call.text, config.cap_feat_dim)
    return {"x": list(pictures.unbind(0)), "t": call.full(0.5), "cap_feats": list(words.unbind(0))}


def _sd3(call: Call) -> Inputs:
    config = call.denoiser.config
    return {
        "hidden_states": call.random(call.rows, config.in_channels, *call.sides),
        "encoder_hidden_states": call.random(call.rows, call.text, config.joint_attention_dim),
        "pooled_projections": call.random(call.rows, config.pooled_projection_dim), "timestep": call.full(500.0),
    }  # fmt: skip


def _cross(call: Call) -> Inputs:
    """Return inputs of transformers with cross-attention to text, with its mask."""
    config = call.denoiser.config
    return {
        "hidden_states": call.random(call.rows, config.in_channels, *call.sides),
        "encoder_hidden_states": call.random(call.rows, call.text, config.caption_channels),
        "encoder_attention_mask": torch.ones_like(call.random(call.rows, call.text)), "timestep": call.full(500.0),
    }  # fmt: skip


def _pixart(call: Call) -> Inputs:
    return {**_cross(call), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


KINDS = {
    "UNet2DConditionModel": Kind(_unet, 77, 77, 30, patch=1),
    "Flux2Transformer2DModel": Kind(_flux2, 512, 512, 50, two_passes=True, native=True),
    "ZImageTransformer2DModel": Kind(_z_image, WORDS, 512, 50),
    # Qwen-Image-Edit shows each reference to its vision-language encoder too, at 384 x 384 pixels: 188 tokens
    "QwenImageTransformer2DModel": Kind(_qwen, WORDS, WORDS + 34, 50, two_passes=True, native=True, native_text=188),
    "FluxTransformer2DModel": Kind(_flux, 512, 512, 28, two_passes=True, native=True),
    "SD3Transformer2DModel": Kind(_sd3, 77 + 256, 256, 28),
    "SanaTransformer2DModel": Kind(_cross, 300, 512, 20, patch=1),
    "PixArtTransformer2DModel": Kind(_pixart, 300, 300, 20),
}
