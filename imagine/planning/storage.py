"""Count what weights take that are stored in eight or four bits, and what it costs to compute with them.

    fp8     one byte a weight, in the layers that diffusers' layerwise casting casts (`imagine.bases.quantising.KEPT`
            stay). A layer is cast before it computes and back after it: six bytes of traffic a weight and pass.
    int8    one byte a weight of a linear layer, and a float32 scale per output (LLM.int8(), arXiv 2208.07339). Its
            authors measured products that are 15 to 23 % slower (huggingface.co/blog/hf-bitsandbytes-integration).
    nf4     half a byte a weight of a linear layer, and a float32 scale per 64 weights (arXiv 2305.14314). A layer is
            unpacked before it computes: 2.6 bytes of traffic a weight and pass.

All other weights have the precision of the call.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from imagine.bases.quantising import KEPT
from imagine.planning.meter import weight_bytes

SCALE = 4  # bytes of a float32 scale
NF4_BLOCK = 64  # weights that share a scale
INT8_SLOWDOWN = 1.2  # of arithmetic
TRAFFIC = {"fp8": 6.0, "nf4": 0.5 + SCALE / NF4_BLOCK + 2}  # bytes per weight and pass
_CAST = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    nn.Embedding,
)  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A network's weights in one storage.

    bytes: of all weights. largest: bytes of the largest layer as stored. unpacked: bytes of work space beside the
    activations, which the largest layer needs. traffic: bytes that are read and written in a pass to unpack weights.
    """

    bytes: int
    largest: int
    unpacked: int = 0
    traffic: float = 0.0


def stored(module: nn.Module, quantise: str, tokens: int = 0) -> Stored:
    """Return what a network in the precision of the call takes in this storage.

    tokens: rows of the largest product, whose inputs and outputs int8 keeps in further copies.
    """
    layers = _layers(module, quantise)
    own = {id(layer): _own_bytes(layer) for layer in module.modules()}
    if not layers:
        return Stored(weight_bytes(module), max(own.values(), default=0))
    sizes = {id(layer): own[id(layer)] - saved_bytes(layer, quantise) for layer in layers}
    counted = {id(layer.weight): layer for layer in layers}.values()  # tied weights count once
    total = weight_bytes(module) - sum(saved_bytes(layer, quantise) for layer in counted)
    largest = max(sizes.get(key, size) for key, size in own.items())
    weights = sum(layer.weight.numel() for layer in counted)
    if quantise == "int8":
        unpacked = tokens * max(layer.in_features + SCALE * layer.out_features for layer in layers)
    else:
        unpacked = max(own[id(layer)] for layer in layers)
    return Stored(total, largest, unpacked, TRAFFIC.get(quantise, 0.0) * weights)


def saved_bytes(layer: nn.Module, quantise: str) -> int:
    """Return the bytes that a layer saves in a storage."""
    weight = layer.get_parameter("weight")
    if quantise == "fp8":
        return _own_bytes(layer) - sum(each.numel() for each in layer.parameters(recurse=False))
    now = weight.numel() * weight.element_size()
    if quantise == "int8":
        return now - weight.numel() - SCALE * weight.shape[0]
    return now - weight.numel() // 2 - SCALE * -(-weight.numel() // NF4_BLOCK)


def _layers(module: nn.Module, quantise: str) -> list[Any]:
    if quantise == "none":
        return []
    if quantise == "fp8":
        return list(_cast_layers(module, ""))
    head = getattr(module, "lm_head", None)  # transformers leaves the output embeddings as they are
    return [each for each in module.modules() if isinstance(each, nn.Linear) and each is not head]


def _cast_layers(module: nn.Module, name: str) -> Iterator[Any]:
    """Yield the layers that layerwise casting casts; a name that is kept keeps everything below it."""
    if name and any(re.search(pattern, name) for pattern in KEPT):
        return
    if isinstance(module, _CAST):
        yield module
        return
    for child, each in module.named_children():
        yield from _cast_layers(each, f"{name}.{child}" if name else child)


def _own_bytes(layer: nn.Module) -> int:
    """Return the bytes of a layer's own parameters, without those of its children."""
    return sum(tensor.numel() * tensor.element_size() for tensor in layer.parameters(recurse=False))
