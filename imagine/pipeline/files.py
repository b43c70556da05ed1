"""Load the models and the adapters of an ImaginePipeline's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from imagine.adapter.adapter import Adapter
from imagine.networks import weights
from imagine.networks.models import read_empty_denoiser
from imagine.people.reference_encoder import check_encoder

ADAPTERS = weights.ADAPTERS
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
MODELS = ("unet", "vae", *ENCODERS)


def load_models(
    folder: Path, index: Mapping[str, Any], given: Mapping[str, Any], dtype: torch.dtype, variant: str | None
) -> dict[str, Any]:
    """Load strictly every model of a weights folder that is not in `given`."""
    models: dict[str, Any] = {}
    for name in MODELS:
        if name in given:
            continue
        library, class_name = index[name]
        options: dict[str, Any] = {} if variant is None else {"variant": variant}
        models[name] = weights.load_model(folder / name, library, class_name, dtype, **options)
    return models


def load_adapters(
    folder: Path, parts: Mapping[str, Any], dtype: torch.dtype, variant: str | None
) -> dict[str, Adapter]:
    """Load the adapters in a weights folder, and check that they fit its denoiser and vision encoder.

    Without a denoiser they are loaded but not attached, because `encode_prompt` depends on their branches.
    """
    found: dict[str, Adapter] = {}
    for name in ADAPTERS:
        if name in parts or not (folder / name).is_dir():
            continue
        denoiser = parts["unet"] if parts["unet"] is not None else read_empty_denoiser(folder / "unet")
        found[name] = Adapter.load(folder / name, denoiser, variant=variant).to(dtype).eval()
        if parts["image_encoder"] is not None:
            check_encoder(found[name], weights.fingerprint(parts["image_encoder"]))
    return found
