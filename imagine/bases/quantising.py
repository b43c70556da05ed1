"""Store the large networks of a base in eight or four bits: the storages, and how each comes about.

    fp8     diffusers' layerwise casting: float8 (e4m3) in memory, cast to the precision of the call layer by layer
    int8    bitsandbytes' LLM.int8(): eight-bit products, with outliers in half precision
    nf4     bitsandbytes' four-bit NormalFloat, unpacked layer by layer

The denoiser and text encoders that are language models are stored so; CLIP, autoencoders, vision encoders and adapters
are small, and stay as they are. fp8 needs no further package and works on every device. bitsandbytes needs a GPU.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from imagine.errors import ConfigError

QUANTISATIONS = ("none", "int8", "fp8", "nf4")  # the most faithful first
BITSANDBYTES = ("int8", "nf4")
# Offloading that works with a storage. bitsandbytes' weights cannot be moved layer by layer, and accelerate's
# sequential hooks cannot move weights that layerwise casting replaces.
OFFLOADS_WITH = {
    "none": ("none", "model", "sequential", "group"),
    "fp8": ("none", "model", "group"),
    "int8": ("none", "model"),
    "nf4": ("none", "model"),
}
# Layers that stay in the precision of the call, by a part of their name: diffusers' own list; and what reads the
# precision of its own weights: Z-Image's embedding of the timestep, T5's last product, and pipelines, which cast what
# they encode to the precision of a text encoder's first weights (its vocabulary, and the output layer tied to it).
KEPT = (
    "pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$", "adaln_single", "t_embedder", r"\.wo$",
    "embed_tokens", "^shared$", "lm_head",
)  # fmt: skip
_SMALL = ("CLIPTextModel", "CLIPTextModelWithProjection")
DENOISERS = ("unet", "transformer")


def is_quantised(name: str, kind: str) -> bool:
    """Return whether a component of this name and class is stored in fewer bits."""
    return name in DENOISERS or (name.startswith("text_encoder") and kind not in _SMALL)


def check_combination(quantise: str, offload: str) -> None:
    """Raise ConfigError, one sentence, unless this storage exists and goes with the offloading."""
    if quantise not in QUANTISATIONS:
        raise ConfigError(f"quantise={quantise!r} is unknown: choose from {', '.join(QUANTISATIONS)}.")
    if offload not in OFFLOADS_WITH[quantise]:
        raise ConfigError(
            f"Weights in {quantise} cannot be offloaded with {offload}: choose {' or '.join(OFFLOADS_WITH[quantise])}."
        )


def check_quantise(quantise: str, offload: str) -> None:
    """Do what `check_combination` does, and raise ConfigError if the storage needs something that is missing here."""
    check_combination(quantise, offload)
    if quantise in BITSANDBYTES:
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                f"Weights in {quantise} need a GPU of NVIDIA: choose fp8, which works everywhere, or none."
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"Weights in {quantise} need bitsandbytes: run `pip install bitsandbytes`, or choose fp8."
            )


def loading_options(quantise: str, index: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Return what `from_pretrained` takes to load the components of a model_index.json in this storage."""
    if quantise not in BITSANDBYTES:
        return {}
    parts = [
        name for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and entry[1]
        if is_quantised(name, str(entry[1]))
    ]  # fmt: skip
    return {"quantization_config": quantization_config(quantise, parts, dtype)}


def quantization_config(quantise: str, parts: Sequence[str], dtype: Any) -> Any:
    """Return diffusers' config that loads these components with bitsandbytes, to compute in `dtype`."""
    from diffusers import PipelineQuantizationConfig

    options: dict[str, Any] = {"load_in_8bit": True}
    if quantise == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    backend = "bitsandbytes_8bit" if quantise == "int8" else "bitsandbytes_4bit"
    return PipelineQuantizationConfig(
        quant_backend=backend, quant_kwargs=options, components_to_quantize=list(parts)
    )  # fmt: skip


def store_in_float8(pipe: Any, dtype: Any) -> None:
    """Store the large networks of a pipeline in float8; they compute in `dtype`, as do adapters on them."""
    import torch
    from diffusers.hooks import apply_layerwise_casting

    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module) and is_quantised(name, type(module).__name__):
            apply_layerwise_casting(module, torch.float8_e4m3fn, dtype, KEPT)
