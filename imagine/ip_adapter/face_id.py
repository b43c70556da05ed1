"""Check FaceID files before diffusers' own code loads them.

A FaceID file reads the features of a face recogniser, and often holds LoRA for all attention of the denoiser. diffusers
draws with it, because our branches have no projection for such features. Its loader drops unknown tensors, and it stops
in the middle at missing ones. Therefore everything is checked here first, and a refused file changes nothing.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from imagine.adapter.attention import attention_layers
from imagine.errors import WeightsError
from imagine.ip_adapter.layout import BRANCHES, PROJECTION, Shape, difference
from imagine.ip_adapter.reading import IPAdapterFile, check_base

T = TypeVar("T")

_PLACE = "encoder_hid_proj"  # the module in which diffusers stores projections; it has attention layers of its own
_LORA = re.compile(r"faceid_\d+")  # the names that diffusers gives to the LoRA of FaceID files


def is_face_id(file: IPAdapterFile) -> bool:
    """Return whether a file is one that only diffusers' own code can load."""
    return (file.layout.kind or "").startswith("faceid")


def is_loaded(denoiser: Any) -> bool:
    """Return whether diffusers has loaded a FaceID file into this denoiser."""
    projections = getattr(getattr(denoiser, _PLACE, None), "image_projection_layers", ())
    return bool(lora_names(denoiser)) or any(type(each).__name__.startswith("IPAdapterFaceID") for each in projections)


def lora_names(denoiser: Any) -> list[str]:
    """Return the names under which diffusers has loaded the LoRA of FaceID files into this denoiser."""
    return [name for name in getattr(denoiser, "peft_config", None) or () if _LORA.fullmatch(name)]


def state_dicts(files: Sequence[IPAdapterFile], denoiser: Any) -> list[dict[str, dict[str, Tensor]]]:
    """Return the files in the form that diffusers takes from memory.

    Raises WeightsError for a file that is made for another base, or that diffusers would not load completely.
    """
    for file in files:
        layers = {name: attn for name, attn in attention_layers(denoiser).items() if not name.startswith(_PLACE)}
        check_base(file, {name: attn for name, attn in layers.items() if attn.is_cross_attention})
        if problem := difference(BRANCHES, _wanted(file, layers), _below(BRANCHES, _shapes(file))):
            raise WeightsError(f"{file.origin} {problem}.")
        _check_projection(file, denoiser)
    return [
        {part.rstrip("."): _below(part, file.tensors) for part in (PROJECTION, BRANCHES)}  # image_proj, ip_adapter
        for file in files
    ]


def _wanted(file: IPAdapterFile, layers: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the names and shapes of the keys, values and LoRA that belong to these attention layers."""
    found, width = _below(BRANCHES, _shapes(file)), file.layout.width or 0
    cross = [attn for attn in layers.values() if attn.is_cross_attention]
    wanted: dict[str, Shape] = {
        f"{2 * number + 1}.to_{each}_ip.weight": (attn.inner_dim, width)
        for number, attn in enumerate(cross)
        for each in "kv"
    }
    for number, attn in enumerate(layers.values()):
        if any(name.startswith(f"{number}.") and "_lora." in name for name in found):
            linear = {"q": attn.to_q, "k": attn.to_k, "v": attn.to_v, "out": attn.to_out[0]}
            for each, layer in linear.items():
                down, up = (f"{number}.to_{each}_lora.{side}.weight" for side in ("down", "up"))
                rank = (*found.get(down, ()), 0)[0]
                wanted |= {down: (rank, layer.in_features), up: (layer.out_features, rank)}
    return wanted


def _check_projection(file: IPAdapterFile, denoiser: Any) -> None:
    """Raise WeightsError unless diffusers can load the file's projection completely."""
    try:
        with torch.random.fork_rng(devices=[]):  # the new module is initialised with random numbers first
            denoiser._convert_ip_adapter_image_proj_to_diffusers(
                _below(PROJECTION, file.tensors), low_cpu_mem_usage=False
            )
    except (RuntimeError, ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"{file.origin} has a {file.layout.variant} projection that diffusers cannot load ({reason}): download it "
            "again."
        ) from error


def _shapes(file: IPAdapterFile) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}


def _below(prefix: str, named: Mapping[str, T]) -> dict[str, T]:
    return {name.removeprefix(prefix): each for name, each in named.items() if name.startswith(prefix)}
