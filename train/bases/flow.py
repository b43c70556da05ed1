"""Training times of flow matching: logit-normal, and moved towards noise as the base's scheduler moves its steps.

    x_t = (1 - t) x_0 + t noise,  target = noise - x_0        (rectified flow, arXiv 2403.03206)

A larger picture needs more noise to lose as much of its content, so schedulers move the steps of larger pictures. Times
are moved by the same function, so that training and drawing agree.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagine.errors import ConfigError

# a scheduler, the number of image tokens and of steps -> the mu of `time_shift`
Mu = Callable[[Any, int, int], float]


def read_scheduler(folder: Path) -> Any:
    """Return the scheduler of a base's folder. Raises ConfigError if it cannot be read, or is none of flow matching."""
    import diffusers

    file = folder / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{file} cannot be read. It says how this base is noised; download it with the other files (see "
            "docs/training_transformers.md)."
        ) from error
    flows = scheduler.config.get("prediction_type") == "flow_prediction" or "FlowMatch" in type(scheduler).__name__
    if not flows:
        raise ConfigError(
            f"The scheduler of {folder} is a {type(scheduler).__name__} without flow matching; name a base whose "
            "transformer predicts a velocity."
        )
    return scheduler


@dataclass(frozen=True)
class Times:
    """Draws and moves times. shift: as in `TransformerSettings.time_shift`. mu: that of the family's pipelines."""

    scheduler: Any
    mu: Mu
    mean: float
    std: float
    shift: float | None

    def moved(self, times: Tensor, tokens: int, steps: int) -> Tensor:
        """Return times (B,) as the scheduler moves them for a picture of so many image tokens."""
        if self.shift is not None:
            return _towards_noise(times, self.shift)
        config = self.scheduler.config
        if config.get("use_dynamic_shifting"):
            shifted: Tensor = self.scheduler.time_shift(self.mu(self.scheduler, tokens, steps), 1.0, times)
            return shifted
        return _towards_noise(times, float(config.get("shift") or config.get("flow_shift") or 1))

    def drawn(self, normal: Tensor, tokens: int, steps: int) -> Tensor:
        """Return the times (B,) of standard normal numbers (B,)."""
        return self.moved(torch.sigmoid(self.mean + self.std * normal), tokens, steps)


def _towards_noise(times: Tensor, factor: float) -> Tensor:
    return factor * times / (1 + (factor - 1) * times)


def mu_by_tokens(scheduler: Any, tokens: int, _: int) -> float:
    """Return mu as FLUX.1, Stable Diffusion 3.5, Qwen-Image and Z-Image compute it."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = scheduler.config
    return float(calculate_shift(
        tokens, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5), config.get("max_shift", 1.15),
    ))  # fmt: skip


def mu_of_flux2(_: Any, tokens: int, steps: int) -> float:
    """Return mu as FLUX.2 computes it."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return float(compute_empirical_mu(image_seq_len=tokens, num_steps=steps))
