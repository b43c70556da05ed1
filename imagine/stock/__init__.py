"""The stock Stable Diffusion 1.5 and XL pipelines of diffusers, with `reference=` added.

`from imagine.stock import StableDiffusionXLPipeline` returns a subclass of diffusers' pipeline of that name. The class
is created on first use, because importing all of diffusers' pipelines takes seconds.
"""

import importlib
from typing import Any

from imagine.pipeline.families import Family, register_family

STOCK_PIPELINES = tuple(  # diffusers' class names, as in the model_index.json of a saved pipeline
    f"StableDiffusion{size}{control}{task}Pipeline"
    for size in ("", "XL")
    for control in ("", "ControlNet")
    for task in ("", "Img2Img", "Inpaint")
)


def _pipelines() -> Any:
    return importlib.import_module("imagine.stock.pipelines")


def __getattr__(name: str) -> Any:
    if name not in STOCK_PIPELINES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_pipelines(), name)


register_family(
    Family("Stable Diffusion 1.5 or XL", STOCK_PIPELINES, lambda stock: _pipelines().personalised_class(stock))
)
