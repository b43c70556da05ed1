"""Diffusion transformers of diffusers' own classes at tiny random sizes, one of each family, with random inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imagine.adapter.adapter import BranchSpec
from imagine.records import Conditioning, Tokens
from imagine.transformer_bases.adapter import TransformerAdapter

WIDTH, TOKEN_WIDTH = 32, 12  # of image tokens and of vision tokens
HEIGHT, TEXT = 4, 5  # of the picture in patches, and text tokens
GRID = HEIGHT * HEIGHT


def _ids(height: int, first: int, width: int) -> Tensor:
    """Return position ids (height * height, width) whose first coordinate is `first`."""
    ids = torch.zeros(height, height, width)
    ids[..., 0] = first
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(height)
    return ids.reshape(-1, width)


def _latents(rows: int, tokens: int, channels: int, seed: int) -> Tensor:
    return torch.randn(rows, tokens, channels, generator=torch.Generator().manual_seed(seed))


def flux2(**sizes: Any) -> Any:
    from diffusers import Flux2Transformer2DModel

    given = {"num_layers": 2, "num_single_layers": 3, "joint_attention_dim": 16, "guidance_embeds": False, **sizes}
    return Flux2Transformer2DModel(
        in_channels=16, attention_head_dim=8, num_attention_heads=4, axes_dims_rope=(2, 2, 2, 2),
        timestep_guidance_channels=16, **given,
    )  # fmt: skip


def flux2_inputs(rows: int, references: int = 0, text: int = TEXT) -> dict[str, Any]:
    images = [_latents(rows, GRID, 16, 1)] + [_latents(rows, 4, 16, 5 + each) for each in range(references)]
    ids = [_ids(HEIGHT, 0, 4)] + [_ids(2, 10 + 10 * each, 4) for each in range(references)]
    return {
        "hidden_states": torch.cat(images, 1), "encoder_hidden_states": _latents(rows, text, 16, 2),
        "timestep": torch.full((rows,), 0.5), "img_ids": torch.cat(ids)[None].expand(rows, -1, -1),
        "txt_ids": torch.zeros(rows, text, 4),
    }  # fmt: skip


def flux(**sizes: Any) -> Any:
    from diffusers import FluxTransformer2DModel

    given = {"num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 16, "pooled_projection_dim": 8, **sizes}
    return FluxTransformer2DModel(
        in_channels=16, attention_head_dim=8, num_attention_heads=4, axes_dims_rope=(2, 2, 4), **given
    )


def flux_inputs(rows: int, references: int = 0, text: int = TEXT) -> dict[str, Any]:
    images = [_latents(rows, GRID, 16, 1)] + [_latents(rows, 4, 16, 5 + each) for each in range(references)]
    ids = [_ids(HEIGHT, 0, 3)] + [_ids(2, 1, 3) for _ in range(references)]
    return {
        "hidden_states": torch.cat(images, 1), "encoder_hidden_states": _latents(rows, text, 16, 2),
        "pooled_projections": _latents(rows, 1, 8, 3)[:, 0], "timestep": torch.full((rows,), 0.5),
        "img_ids": torch.cat(ids), "txt_ids": torch.zeros(text, 3),
    }  # fmt: skip


def z_image(**sizes: Any) -> Any:
    from diffusers import ZImageTransformer2DModel

    given = {"n_layers": 3, "n_refiner_layers": 1, "cap_feat_dim": 16, **sizes}
    model = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_heads=4, n_kv_heads=4, axes_dims=[2, 2, 4], axes_lens=[256, 16, 16], **given
    )
    for parameter in (model.x_pad_token, model.cap_pad_token):
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def z_image_inputs(rows: int, references: int = 0, text: int = TEXT) -> dict[str, Any]:
    assert references == 0
    side = 2 * HEIGHT
    pictures = _latents(rows, side * side, 4, 1).transpose(1, 2).reshape(rows, 4, 1, side, side)
    words = [_latents(1, text + 30 * row, 16, 2)[0] for row in range(rows)]  # unequal, so that padding matters
    return {"x": list(pictures.unbind(0)), "t": torch.full((rows,), 0.5), "cap_feats": words}


def qwen(**sizes: Any) -> Any:
    from diffusers import QwenImageTransformer2DModel

    given = {"num_layers": 3, "joint_attention_dim": 16, **sizes}
    return QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, attention_head_dim=8, num_attention_heads=4, axes_dims_rope=(2, 2, 4), **given
    )


def qwen_inputs(rows: int, references: int = 0, text: int = TEXT) -> dict[str, Any]:
    images = [_latents(rows, GRID, 16, 1)] + [_latents(rows, 4, 16, 5 + each) for each in range(references)]
    shapes = [[(1, HEIGHT, HEIGHT), *[(1, 2, 2)] * references]] * rows
    mask = torch.ones(rows, text, dtype=torch.bool)
    mask[-1, -1] = rows == 1
    return {
        "hidden_states": torch.cat(images, 1), "encoder_hidden_states": _latents(rows, text, 16, 2),
        "encoder_hidden_states_mask": mask, "timestep": torch.full((rows,), 0.5), "img_shapes": shapes,
    }  # fmt: skip


def sd3(**sizes: Any) -> Any:
    from diffusers import SD3Transformer2DModel

    given = {
        "num_layers": 3, "joint_attention_dim": 16, "pooled_projection_dim": 8, "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm", **sizes,
    }  # fmt: skip
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, pos_embed_max_size=8, **given,
    )  # fmt: skip


def _pictures(rows: int, channels: int, side: int) -> Tensor:
    return _latents(rows, side * side, channels, 1).transpose(1, 2).reshape(rows, channels, side, side)


def sd3_inputs(rows: int, references: int = 0, text: int = TEXT) -> dict[str, Any]:
    assert references == 0
    return {
        "hidden_states": _pictures(rows, 4, 2 * HEIGHT), "encoder_hidden_states": _latents(rows, text, 16, 2),
        "pooled_projections": _latents(rows, 1, 8, 3)[:, 0], "timestep": torch.full((rows,), 500.0),
    }  # fmt: skip


def sana(**sizes: Any) -> Any:
    from diffusers import SanaTransformer2DModel

    given = {"num_layers": 3, "caption_channels": 16, "sample_size": 4, **sizes}
    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_cross_attention_heads=4,
        cross_attention_head_dim=8, cross_attention_dim=32, **given,
    )  # fmt: skip


def sana_inputs(rows: int, references: int = 0, text: int = TEXT) -> dict[str, Any]:
    assert references == 0
    return {
        "hidden_states": _pictures(rows, 4, HEIGHT), "encoder_hidden_states": _latents(rows, text, 16, 2),
        "timestep": torch.full((rows,), 500.0),
    }  # fmt: skip


def pixart(**sizes: Any) -> Any:
    from diffusers import PixArtTransformer2DModel

    given = {"num_layers": 3, "caption_channels": 16, **sizes}
    return PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, cross_attention_dim=32,
        sample_size=8, patch_size=2, **given,
    )  # fmt: skip


def pixart_inputs(rows: int, references: int = 0, text: int = TEXT) -> dict[str, Any]:
    assert references == 0
    return {
        "hidden_states": _pictures(rows, 4, 2 * HEIGHT), "encoder_hidden_states": _latents(rows, text, 16, 2),
        "timestep": torch.full((rows,), 500), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A family at a tiny size. kwargs: the argument that holds the conditioning. references: whether it takes any."""

    build: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    kwargs: str = "joint_attention_kwargs"
    references: bool = False


FAMILIES = {
    "flux2": Tiny(flux2, flux2_inputs, references=True),
    "z_image": Tiny(z_image, z_image_inputs),
    "qwen": Tiny(qwen, qwen_inputs, "attention_kwargs", references=True),
    "flux": Tiny(flux, flux_inputs, references=True),
    "sd3": Tiny(sd3, sd3_inputs),
    "sana": Tiny(sana, sana_inputs, "attention_kwargs"),
    "pixart": Tiny(pixart, pixart_inputs, "cross_attention_kwargs"),
}


def transformer(name: str, seed: int = 0, **sizes: Any) -> Any:
    """Return a random transformer of a family, whose outputs depend on all of its parts."""
    torch.manual_seed(seed)
    model = FAMILIES[name].build(**sizes).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def adapter(model: Any, seed: int = 1, fresh: bool = False, name: str = "vision", **options: Any) -> TransformerAdapter:
    """Return a random adapter with open gates, or a fresh one as at the start of training."""
    torch.manual_seed(seed)
    spec = {"projection": "full", "input_width": 24, **options.pop("spec", {})}
    made = TransformerAdapter(model, [BranchSpec(name, TOKEN_WIDTH, **spec)], **{"heads": 2, **options})
    for key, parameter in made.named_parameters():
        if not fresh and key.endswith("gate"):
            torch.nn.init.normal_(parameter, std=0.5)
    return made.eval()


def tokens(rows: int, length: int = 6, seed: int = 3) -> Tokens:
    return Tokens(_latents(rows, length, TOKEN_WIDTH, seed))


def predict(name: str, model: Any, conditioning: Any = None, rows: int = 2, **inputs: Any) -> Tensor:
    """Return what the transformer predicts, (rows, ...), perhaps with a conditioning."""
    tiny = FAMILIES[name]
    given = tiny.inputs(rows, **inputs)
    if conditioning is not None:
        given[tiny.kwargs] = {"conditioning": conditioning}
    out = model(**given, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


def conditioned(rows: int = 2, seed: int = 3, **more: Any) -> Conditioning:
    return Conditioning({"vision": tokens(rows, seed=seed)}, **more)
