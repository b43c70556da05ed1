"""Load what a worker draws with: imagine's own weights, or a public base, and say what clients may know about it."""

import inspect
import os
from typing import Any

from imagine.errors import ConfigError
from imagine.serving.settings import BaseSettings, ServeSettings
from imagine.serving.worker_contract import WORKER_NUMBER


def load_pipeline(settings: ServeSettings) -> Any:
    """Load the weights or the base of these settings and move them to the device; several workers take one GPU each.

    Raises ImagineError, in one sentence, if something is missing or does not fit.
    """
    import torch

    from imagine.people.doctor import device_for

    device = device_for(settings.device)
    if device == "cuda":
        device = f"cuda:{int(os.environ.get(WORKER_NUMBER, '0')) % torch.cuda.device_count()}"
    pipe = _load_weights(settings, device) if settings.base is None else _load_base(settings.base, device)
    pipe.set_progress_bar_config(disable=True)
    if settings.safety is not None:
        from imagine.people.safety import ImageClassifier

        pipe.safety = ImageClassifier(settings.safety)
    return pipe


def _load_weights(settings: ServeSettings, device: str) -> Any:
    from imagine.pipeline.pipeline import ImaginePipeline

    return ImaginePipeline.from_pretrained(settings.weights).to(device)


def _load_base(base: BaseSettings, device: str) -> Any:
    from imagine.bases.opening import open_base

    pipe = open_base(base.name, device=device, **base.model_dump(exclude={"name"}))
    if not (pipe.shows_references if hasattr(pipe, "shows_references") else pipe.adapter is not None):
        raise ConfigError(f"{base.name} shows nobody without an IP-Adapter or an adapter: add one of them.")
    return pipe


def preset_arguments(base: BaseSettings) -> dict[str, Any]:
    """Return the arguments of a call that the preset of the base's IP-Adapter gives."""
    if base.ip_adapter is None:
        return {}
    from imagine.bases.public_adapters import preset_of, public_adapter

    preset = preset_of(public_adapter(base.ip_adapter), base.preset)
    return {} if preset is None else preset.arguments()


def facts_of(pipe: Any, base: BaseSettings | None = None) -> dict[str, Any]:
    """Return what clients may know about a loaded pipeline."""
    from imagine.pipeline.layout import trained_people
    from imagine.request import MOST_PEOPLE

    adapter = pipe.adapter
    return {
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "encoder": pipe.encoder_fingerprint,
        "most_people": MOST_PEOPLE,
        "trained_people": 1 if adapter is None else trained_people(adapter.metadata),
        "licence": None if adapter is None else adapter.metadata.get("licence"),
        **(_facts_of_weights(pipe) if base is None else _facts_of_base(pipe, base)),
    }


def _facts_of_weights(pipe: Any) -> dict[str, Any]:
    return {
        "model": "imagine",
        "side": int(pipe.unet.config.sample_size) * pipe.vae_scale_factor,
        "multiple": pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1),
        "steps": int(pipe.config.default_steps),
        "guidance_scale": float(pipe.config.default_guidance_scale),
    }


def _facts_of_base(pipe: Any, base: BaseSettings) -> dict[str, Any]:
    """Return the facts of a public base: its own defaults, or those of the IP-Adapter's preset."""
    defaults = {name: each.default for name, each in inspect.signature(pipe.__call__).parameters.items()}
    defaults |= preset_arguments(base)
    sample = getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size
    return {
        "model": base.name.rstrip("/").rpartition("/")[2],
        "side": int(sample) * int(pipe.vae_scale_factor),
        # The U-Nets need a whole number of latents, and the transformers whole patches of 2 x 2 latents.
        "multiple": max(8, int(pipe.vae_scale_factor) * (1 if hasattr(pipe, "unet") else 2)),
        "steps": int(defaults["num_inference_steps"]),
        "guidance_scale": float(defaults["guidance_scale"]),
    }
