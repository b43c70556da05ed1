"""The tensor names of a CLIP vision tower in open_clip's layout, which is ours, and in transformers' layout.

Conversion (`vision_conversion`) and fingerprints (`weights`) use this one list, so an encoder has the same fingerprint
in both layouts. The module does not import any other.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PROJECTION = "proj"  # transposed between the two layouts
_REQUIRED_NAMES = ("visual_projection.weight", "vision_model.embeddings.class_embedding")
_LAYERS = "vision_model.encoder.layers."


def hf_names(layers: int) -> dict[str, tuple[str, ...]]:
    """Return transformers' names of each of our tensors; queries, keys and values are one tensor here, three there."""
    embeddings = "vision_model.embeddings"
    names: dict[str, tuple[str, ...]] = {
        "class_embedding": (f"{embeddings}.class_embedding",),
        "positional_embedding": (f"{embeddings}.position_embedding.weight",),
        "conv1.weight": (f"{embeddings}.patch_embedding.weight",),
        PROJECTION: ("visual_projection.weight",),
    }
    pairs = {"ln_pre": "vision_model.pre_layrnorm", "ln_post": "vision_model.post_layernorm"}
    inside = {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    for layer in range(layers):
        ours, theirs = f"transformer.resblocks.{layer}", f"{_LAYERS}{layer}"
        pairs |= {f"{ours}.{here}": f"{theirs}.{there}" for here, there in inside.items()}
        for kind in ("weight", "bias"):
            names[f"{ours}.attn.in_proj_{kind}"] = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
    for here, there in pairs.items():
        names |= {f"{here}.{kind}": (f"{there}.{kind}",) for kind in ("weight", "bias")}
    return names


def to_our_tensor(theirs: "Mapping[str, Tensor]", names: tuple[str, ...]) -> "Tensor":
    """Return our tensor for these tensors in transformers' layout, as a view where possible."""
    import torch

    if names == _REQUIRED_NAMES[:1]:
        return theirs[names[0]].T
    return theirs[names[0]] if len(names) == 1 else torch.cat([theirs[name] for name in names])


def names_in(tensors: "Mapping[str, Tensor]") -> dict[str, tuple[str, ...]] | None:
    """Return `hf_names` if these are all tensors of a transformers vision tower with its projection, else None."""
    if not all(mark in tensors for mark in _REQUIRED_NAMES):
        return None
    numbers = {int(name[len(_LAYERS) :].split(".")[0]) for name in tensors if name.startswith(_LAYERS)}
    names = hf_names(len(numbers))
    unnamed = tensors.keys() - {there for each in names.values() for there in each}
    complete = all(there in tensors for each in names.values() for there in each)
    return names if complete and unnamed <= {"vision_model.embeddings.position_ids"} else None
