"""Stable Diffusion 1.5 and XL as bases: a U-Net that predicts noise or velocity on a schedule of 1,000 steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagine.blueprints.blueprint import Component
from imagine.records import Conditioning, Tokens
from train.bases.contract import Noised, Predict
from train.data.order import uniforms
from train.data.public_base import BaseCodec, BaseTextEncoders, DiffusersBase

READERS = ("t5", "byt5")  # text branches of an adapter of ours, beside the base's own text


@dataclass(frozen=True)
class StableDiffusion:
    """The base of a folder with a Stable Diffusion pipeline."""

    files: DiffusersBase
    denoiser_name = "unet"
    distilled = False

    @property
    def folder(self) -> Path:
        return self.files.folder

    @property
    def kind(self) -> str:
        return self.files.kind

    def denoiser(self, device: torch.device, dtype: torch.dtype) -> Any:
        return self.files.denoiser(device, dtype)

    def networks(self) -> dict[str, Component]:
        kinds = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
        return {name: Component(kind, self.files.config(name)) for name, kind in kinds.items()}

    def codec(self, device: torch.device) -> BaseCodec:
        return BaseCodec(self.files, device)

    def text_encoders(self, device: torch.device) -> BaseTextEncoders:
        return BaseTextEncoders(self.files, device)

    def times(self, seed: int, images_seen: int, latents: Tensor) -> Tensor:
        """Return steps of the schedule (B,), uniformly drawn."""
        share = uniforms(seed, "times", images_seen, len(latents), device=latents.device)
        return (share * self.files.schedule.config.num_train_timesteps).long()

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Noised:
        schedule = self.files.schedule
        target = schedule.get_velocity(latents, noise, times) if self._predicts_velocity else noise
        return Noised(schedule.add_noise(latents, noise, times), target)

    @property
    def _predicts_velocity(self) -> bool:
        return bool(self.files.schedule.config.prediction_type == "v_prediction")

    def loss_weights(self, times: Tensor, gamma: float | None) -> Tensor:
        """Return min-SNR weights (arXiv 2303.09556) for the base's prediction type."""
        from diffusers.training_utils import compute_snr

        if gamma is None:
            return torch.ones_like(times, dtype=torch.float32)
        snr = compute_snr(self.files.schedule, times)
        least = snr.clamp(max=gamma)
        return least / (snr + 1) if self._predicts_velocity else (gamma / snr).clamp(max=1)

    def predict(
        self, denoiser: Any, noisy: Tensor, times: Tensor, states: Mapping[str, Tokens], sizes: Tensor,
        conditioning: Conditioning, guidance: float | None = None,
    ) -> Tensor:  # fmt: skip
        dtype = denoiser.dtype
        added = None
        if self.files.xl:
            added = {"text_embeds": states["pooled"].values[:, 0].to(dtype), "time_ids": sizes}
        prediction: Tensor = denoiser(
            noisy.to(dtype), times, encoder_hidden_states=states["clip"].values.to(dtype),
            added_cond_kwargs=added, cross_attention_kwargs={"conditioning": conditioning},
        ).sample  # fmt: skip
        return prediction

    def draw(self, noise: Tensor, predict: Predict, steps: int) -> Tensor:
        """Sample with DDIM."""
        return ddim(self.files.schedule.config, noise, predict, steps)


def ddim(config: Any, noise: Tensor, predict: Predict, steps: int) -> Tensor:
    """Sample with DDIM (arXiv 2010.02502) on the schedule of a base's `config`."""
    from diffusers import DDIMScheduler

    sampler = DDIMScheduler.from_config(config, clip_sample=False)
    sampler.set_timesteps(steps, device=noise.device)
    latents = noise * sampler.init_noise_sigma
    for step in sampler.timesteps:
        prediction = predict(latents, step.expand(len(noise)))
        latents = sampler.step(prediction, step, latents).prev_sample
    return latents
