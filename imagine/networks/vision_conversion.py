"""Convert our vision encoder to transformers' layout and back; only the names of the tensors change.

IP-Adapters come with a folder `image_encoder/` that holds a transformers CLIPVisionModelWithProjection. Our encoder is
open_clip's VisionTransformer, in which CLIP was trained. Hidden states and embeddings agree up to rounding. Nothing is
lost in either direction: queries, keys and values are one tensor here and three there, and the last projection is
transposed.
"""

from typing import Any

import torch
from torch import Tensor

from imagine.errors import WeightsError
from imagine.networks.encoders import VisionEncoder
from imagine.networks.vision_names import PROJECTION, hf_names, to_our_tensor

EPSILON = 1e-5  # the epsilon of every normalisation in open_clip

# The public towers that IP-Adapters read (open_clip's model_configs; CLIP ViT-L/14 is OpenAI's).
SIZES: dict[str, dict[str, Any]] = {
    "OpenCLIP ViT-H/14": {"width": 1280, "layers": 32, "heads": 16, "embed_width": 1024},
    "OpenCLIP ViT-bigG/14": {
        "width": 1664, "layers": 48, "heads": 16, "embed_width": 1280, "mlp_ratio": 4.9231,
    },
    "CLIP ViT-L/14": {"width": 1024, "layers": 24, "heads": 16, "embed_width": 768, "quick_gelu": True},
}  # fmt: skip


def build_vision_encoder(name: str = "OpenCLIP ViT-H/14") -> VisionEncoder:
    """Build a public vision tower for 224-pixel crops, randomly initialised; load its weights separately."""
    return VisionEncoder(image_size=224, patch_size=14, **SIZES[name])


def to_transformers(encoder: VisionEncoder) -> Any:
    """Return the same encoder as a transformers CLIPVisionModelWithProjection, in its precision and on its device.

    For pictures normalised with CLIP's mean and deviation (CLIPImageProcessor), its hidden_states[-2] equal our
    features and its image_embeds equal the result of `embed`.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = encoder.config
    config = CLIPVisionConfig(
        hidden_size=sizes.width,
        intermediate_size=int(sizes.width * sizes.mlp_ratio),
        projection_dim=sizes.embed_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        hidden_act="quick_gelu" if sizes.quick_gelu else "gelu",
        layer_norm_eps=EPSILON,
    )
    ours = {name.removeprefix("tower."): tensor for name, tensor in encoder.state_dict().items()}
    theirs: dict[str, Tensor] = {}
    for here, names in hf_names(sizes.layers).items():
        tensor = ours[here].T if here == PROJECTION else ours[here]
        for name, part in zip(names, tensor.chunk(len(names)), strict=True):
            theirs[name] = part.clone(memory_format=torch.contiguous_format)
    return _filled(CLIPVisionModelWithProjection(config), theirs)


def from_transformers(model: Any) -> VisionEncoder:
    """Return a transformers CLIPVisionModelWithProjection as our encoder, in its precision and on its device.

    Raises WeightsError if the model has an option that ours does not support.
    """
    config = model.config
    _check(config)
    encoder = VisionEncoder(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_ratio=_ratio(config.hidden_size, config.intermediate_size),
        embed_width=config.projection_dim,
        quick_gelu=config.hidden_act == "quick_gelu",
    )
    theirs = model.state_dict()
    ours = {
        f"tower.{here}": to_our_tensor(theirs, names).clone(memory_format=torch.contiguous_format)
        for here, names in hf_names(config.num_hidden_layers).items()
    }
    return _filled(encoder, ours)


def _check(config: Any) -> None:
    refused = {
        "activation": config.hidden_act not in ("gelu", "quick_gelu"),
        "epsilon of the normalisations": config.layer_norm_eps != EPSILON,
        "number of colours": config.num_channels != 3,
        "shape of pictures": not isinstance(config.image_size, int) or not isinstance(config.patch_size, int),
    }
    if wrong := next((name for name, is_wrong in refused.items() if is_wrong), None):
        raise WeightsError(f"The {wrong} of this image encoder differs from CLIP's: use a CLIP or OpenCLIP model.")


def _ratio(width: int, inner: int) -> float:
    """Return a ratio from which open_clip, which truncates width * ratio, computes exactly this inner width."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else (inner + 0.5) / width


def _filled(model: Any, tensors: dict[str, Tensor]) -> Any:
    model.load_state_dict(tensors, strict=True, assign=True)
    some = tensors[next(iter(tensors))]
    return model.to(some.device, some.dtype).eval()
