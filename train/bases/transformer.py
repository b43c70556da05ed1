"""Diffusion transformers as bases: FLUX.2, Z-Image, Qwen-Image, FLUX.1, Stable Diffusion 3.5 and Sana.

All predict the velocity of a rectified flow. What differs between them is an entry of `flow_families`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagine.blueprints.blueprint import Component
from imagine.errors import ConfigError
from imagine.networks.weights import load_model, quiet_libraries
from imagine.records import Conditioning, Tokens
from imagine.transformer_bases.families import FAMILIES, TransformerFamily
from imagine.transformer_bases.passing import KEY
from train.bases.codecs import open_codec
from train.bases.contract import Noised, Predict, TransformerSettings
from train.bases.flow import Times, read_scheduler
from train.bases.flow_families import FLOW_FAMILIES, FlowFamily, Inputs
from train.bases.prompts import StockTextEncoders
from train.data.order import normals
from train.data.public_base import BaseCodec, read_config, variant_of

UNDISTILLED_STEPS = 50  # for which the times of training are moved, where that depends on the number of steps
_TEXT_COMPONENTS = ("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Transformer:
    """The base of a folder with a pipeline of a diffusion transformer."""

    folder: Path
    index: Mapping[str, Any]
    settings: TransformerSettings
    denoiser_name = "transformer"

    @cached_property
    def flow(self) -> FlowFamily:
        """Its family's entry for training."""
        model = str(self.index["transformer"][1])
        if model not in FLOW_FAMILIES:
            raise ConfigError(
                f"{self.folder} has a {model}, which training does not know; name a base with one of "
                f"{', '.join(FLOW_FAMILIES)}."
            )
        return FLOW_FAMILIES[model]

    @cached_property
    def family(self) -> TransformerFamily:
        """Its family's entry for the adapter."""
        return next(family for family in FAMILIES if family.model == self.flow.model)

    @property
    def kind(self) -> str:
        return self.family.title

    @cached_property
    def distilled(self) -> bool:
        """Whether it draws without classifier-free guidance, as FLUX.2-klein and FLUX.1-dev do."""
        return bool(self.index.get("is_distilled") or self.config("transformer").get("guidance_embeds"))

    def config(self, part: str) -> dict[str, Any]:
        """Return the content of a part's config.json."""
        return read_config(self.folder / part)

    def denoiser(self, device: torch.device, dtype: torch.dtype) -> Any:
        import diffusers

        if device.type == "meta":
            with quiet_libraries():
                return getattr(diffusers, self.flow.model).from_config(self.config("transformer")).to(dtype)
        folder = self.folder / "transformer"
        return load_model(folder, "diffusers", self.flow.model, dtype, variant=variant_of(folder))

    def networks(self) -> dict[str, Component]:
        kinds = {"transformer": self.flow.model, "vae": str(self.index["vae"][1])}
        return {name: Component(kind, self.config(name)) for name, kind in kinds.items()}

    def codec(self, device: torch.device) -> BaseCodec:
        return open_codec(self, device, self.flow.patch)

    def text_encoders(self, device: torch.device) -> StockTextEncoders:
        flow = self.flow
        limit = self.settings.text_tokens or flow.text_tokens
        tokens = {"text": limit + flow.further_tokens, "pooled": 1}
        shapes = {name: (tokens[name], width) for name, width in flow.widths(self.config("transformer")).items()}
        components = tuple(
            name for name, entry in self.index.items()
            if name.startswith(_TEXT_COMPONENTS) and isinstance(entry, (list, tuple)) and entry[0]
        )  # fmt: skip
        return StockTextEncoders(
            self.folder, str(self.index["_class_name"]), components, flow.encode, shapes, limit, flow.counted,
            flow.overhead, device,
        )  # fmt: skip

    @cached_property
    def drawn_times(self) -> Times:
        """How times are drawn and moved."""
        settings = self.settings
        return Times(
            read_scheduler(self.folder), self.flow.mu, settings.time_mean, settings.time_std, settings.time_shift
        )

    def times(self, seed: int, images_seen: int, latents: Tensor) -> Tensor:
        """Return times (B,), 0 (clean) to 1 (noise)."""
        normal = normals(seed, "times", images_seen, len(latents), device=latents.device)
        return self.drawn_times.drawn(normal, self._tokens(latents), UNDISTILLED_STEPS)

    def _tokens(self, latents: Tensor) -> int:
        height, width = latents.shape[-2:]
        return (height // self.flow.patch) * (width // self.flow.patch)

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Noised:
        t = times.view(-1, 1, 1, 1)
        return Noised((1 - t) * latents + t * noise, noise - latents)

    def loss_weights(self, times: Tensor, gamma: float | None) -> Tensor:
        """Return equal weights; the times are drawn where the loss counts."""
        return torch.ones_like(times)

    def predict(
        self, denoiser: Any, noisy: Tensor, times: Tensor, states: Mapping[str, Tokens], sizes: Tensor,
        conditioning: Conditioning, guidance: float | None = None,
    ) -> Tensor:  # fmt: skip
        scale = self.settings.guidance if guidance is None else guidance
        given = Inputs(noisy.to(denoiser.dtype), times, states, scale)
        arguments = {**self.flow.arguments(denoiser, given), self.family.kwargs: {KEY: conditioning}}
        return self.flow.velocity(denoiser(**arguments, return_dict=False), noisy)

    def draw(self, noise: Tensor, predict: Predict, steps: int) -> Tensor:
        """Sample with Euler's method along the predicted velocity, in the scheduler's steps."""
        even = torch.linspace(1, 1 / steps, steps, device=noise.device)
        times = [*self.drawn_times.moved(even, self._tokens(noise), steps).tolist(), 0.0]
        latents = noise
        for now, then in pairwise(times):
            velocity = predict(latents, torch.full((len(noise),), now, device=noise.device))
            latents = latents + (then - now) * velocity
        return latents
