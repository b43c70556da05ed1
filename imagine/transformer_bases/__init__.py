"""The diffusion transformers of diffusers (FLUX.2, Z-Image, Qwen-Image ...) as bases, with `reference=` added.

`imagine.open_base` and `ImaginePipeline` open a pipeline of any of these families. Classes are created on first use,
because importing all of diffusers' pipelines takes seconds.
"""

import importlib
from typing import Any

from imagine.pipeline.families import Family, register_family

TITLE = "a diffusion transformer (FLUX.2, Z-Image, Qwen-Image, FLUX.1, Stable Diffusion 3.5, Sana)"

# diffusers' class names, as in the model_index.json of a saved pipeline
TRANSFORMER_PIPELINES = (
    "Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline", "Flux2Pipeline",
    "ZImagePipeline", "ZImageImg2ImgPipeline",
    "QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline",
    "QwenImageEditPipeline", "QwenImageEditPlusPipeline",
    "FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline", "FluxKontextPipeline",
    "StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline",
    "SanaPipeline",
)  # fmt: skip


def _pipelines() -> Any:
    return importlib.import_module("imagine.transformer_bases.pipelines")


def __getattr__(name: str) -> Any:
    if name not in TRANSFORMER_PIPELINES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _pipelines().class_by_name(name)


register_family(Family(TITLE, TRANSFORMER_PIPELINES, lambda stock: _pipelines().personalised_class(stock)))
