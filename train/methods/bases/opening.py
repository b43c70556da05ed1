"""Open a base by its folder or hub id, and draw with it."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from imagine.errors import ConfigError
from imagine.networks.weights import INDEX, PIPELINE, default_folder
from imagine.paths import as_path
from train.methods.bases.contract import AnyBase
from train.methods.bases.text import TextState


def open_base(source: str | None, device: torch.device) -> AnyBase:
    """Open imagine's weights (None: the shipped ones) or a Stable Diffusion 1.5 or XL; ConfigError for anything else.

    On the meta device the denoiser of a Stable Diffusion has no weights, which is enough to count what would train.
    """
    folder = default_folder() if source is None else as_path(source)
    if _class_name(folder) == PIPELINE:
        from train.methods.bases.world import WorldBase

        return WorldBase(folder, device)
    from train.data import public_base
    from train.methods.bases.stable_diffusion import StableDiffusionBase

    return StableDiffusionBase(public_base.open_base(str(folder), device.type == "meta"), device)


def check_base(source: str | None) -> None:
    """Raise ConfigError if there is no base; its weights are not read."""
    folder = default_folder() if source is None else as_path(source)
    if _class_name(folder) != PIPELINE and (folder.exists() or folder.is_absolute()):
        from train.data import public_base

        public_base.open_base(str(folder), True)


def _class_name(folder: Path) -> str:
    try:
        return str(json.loads((folder / INDEX).read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


TextAt = Callable[[Tensor], TextState]  # times (B,) -> encoded sentences; most methods ignore the times


@torch.no_grad()
def draw_latents(
    base: AnyBase,
    noise: Tensor,
    text: TextAt,
    empty: TextState,
    predict: Callable[[Tensor, Tensor, TextState, bool], Tensor],
    steps: int | None = None,
    guidance: float | None = None,
) -> Tensor:
    """Sample latents with classifier-free guidance; `predict` gets latents, steps, text, and whether it is guided."""
    scale = base.guidance if guidance is None else guidance
    if scale < 1:
        raise ConfigError(f"The guidance scale is {scale:g}: give 1 (off) or more.")

    def guided(latents: Tensor, step: Tensor) -> Tensor:
        full = predict(latents, step, text(base.share(step)), True)
        if scale == 1:
            return full
        none = predict(latents, step, empty, False)
        return none + scale * (full - none)

    return base.sample(noise, guided, steps or base.steps)
