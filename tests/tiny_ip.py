"""Random IP-Adapters of all kinds for random Stable Diffusions, 1.5 and XL, whose blocks have unequal widths."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from imagine.adapter.attention import attention_layers
from imagine.ip_adapter.layout import projection_shapes
from tests import tiny_stock

TOKENS, POOLED = 24, 20  # widths of the vision encoder's tokens and of its pooled embedding
KINDS = ("linear", "full", "plus")


def unet(xl: bool = False, seed: int = 0) -> Any:
    """Return a UNet2DConditionModel with cross-attention of three widths; for SDXL with its addition embeddings."""
    from diffusers import UNet2DConditionModel

    known = tiny_stock.unet(xl).config  # of the pipeline whose text encoders this UNet uses
    torch.manual_seed(seed)
    more: dict[str, Any] = {}
    if xl:
        more = {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True,
            "projection_class_embeddings_input_dim": known.projection_class_embeddings_input_dim,
            "transformer_layers_per_block": (1, 2, 1),
        }  # fmt: skip
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16, 24), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1, cross_attention_dim=known.cross_attention_dim, attention_head_dim=2, **more,
    ).eval()  # fmt: skip


def components(xl: bool = False) -> dict[str, Any]:
    """Return the components of a stock text-to-image pipeline with this UNet and an image encoder."""
    return {**tiny_stock.components(xl), "unet": unet(xl), "image_encoder": encoder()}


def encoder(seed: int = 1, tokens: int = TOKENS, pooled: int = POOLED) -> Any:
    """Return a transformers CLIPVisionModelWithProjection for 16-pixel crops: five tokens."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=tokens, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=16,
        patch_size=8, projection_dim=pooled, hidden_act="gelu", initializer_factor=2.0, initializer_range=0.3,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def tensors(kind: str, denoiser: Any, seed: int = 2) -> dict[str, Tensor]:
    """Return a standard file's tensors under their flat names; keys and values differ, and so do all layers."""
    width = denoiser.config.cross_attention_dim
    shapes = projection_shapes(kind, 3 if kind == "plus" else 4, POOLED if kind == "linear" else TOKENS, width, 64, 128)
    layers = [attn for attn in attention_layers(denoiser).values() if attn.is_cross_attention]
    named = {f"image_proj.{name}": shape for name, shape in shapes.items()}
    for number, attn in enumerate(layers):
        for each in ("to_k", "to_v"):
            named[f"ip_adapter.{2 * number + 1}.{each}_ip.weight"] = (attn.inner_dim, width)
    random = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=random) for name, shape in named.items()}
    return {name: each / max(each.shape[-1], 1) ** 0.5 if each.dim() > 1 else each for name, each in made.items()}


def nested(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors in the nested form that diffusers accepts from memory."""
    return {
        part: {name.removeprefix(f"{part}."): each for name, each in flat.items() if name.startswith(f"{part}.")}
        for part in ("image_proj", "ip_adapter")
    }


def tensors_on_meta(kind: str, denoiser: Any, input_width: int, tokens: int, inner: int, attention: int) -> Any:
    """Return the tensors of a full-size file for a denoiser on the meta device."""
    width = denoiser.config.cross_attention_dim
    shapes = projection_shapes(kind, tokens, input_width, width, inner, attention)
    named = {f"image_proj.{name}": torch.empty(shape) for name, shape in shapes.items()}
    cross = [attn for attn in attention_layers(denoiser).values() if attn.is_cross_attention]
    for number, attn in enumerate(cross):
        for each in ("to_k", "to_v"):
            named[f"ip_adapter.{2 * number + 1}.{each}_ip.weight"] = torch.empty(attn.inner_dim, width)
    return named
