"""The interface of a public base for the adapter's training, and the settings that only transformers have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from imagine.blueprints.blueprint import Component
from imagine.records import Conditioning, Tokens
from train.data.public_base import BaseCodec
from train.data.text_states import FrozenTextEncoder

Predict = Callable[[Tensor, Tensor], Tensor]  # noisy latents, times (B,) -> prediction


class TransformerSettings(BaseModel):
    """Settings of the training on a diffusion transformer: times, text and the adapter's size."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    time_mean: float = 0.0  # mean of the logit-normal times before the shift (arXiv 2403.03206, section 3.1)
    time_std: Annotated[float, Field(gt=0)] = 1.0
    # how far times are moved towards noise: t -> s t / (1 + (s - 1) t) with this s; None: as the base's scheduler moves
    # the steps of a picture of this size
    time_shift: Annotated[float, Field(gt=0)] | None = None
    # the guidance scale told to bases with a guidance embedding; 1: what the data show, without guidance
    guidance: Annotated[float, Field(ge=0)] = 1.0
    text_tokens: Annotated[int, Field(ge=128)] | None = None  # most tokens of a caption; None: as the stock pipeline
    branch_heads: Annotated[int, Field(ge=1)] | None = None  # of the vision branch; None: a quarter of the base's
    branch_every: Annotated[int, Field(ge=1)] = 1  # a branch at each attention module (1), at every second one (2) ...


@dataclass(frozen=True)
class Noised:
    """Noisy latents, and what the base should predict for them."""

    noisy: Tensor
    target: Tensor


class PublicBase(Protocol):
    """A public base in diffusers' layout. Its components are loaded one at a time."""

    @property
    def folder(self) -> Path: ...

    @property
    def denoiser_name(self) -> str:
        """The name of the denoiser in its folder: "unet" or "transformer"."""
        ...

    @property
    def kind(self) -> str:
        """The name of its model family."""
        ...

    @property
    def distilled(self) -> bool:
        """Whether it draws without classifier-free guidance."""
        ...

    def denoiser(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Load the denoiser with its weights; on the meta device, build it without weights."""
        ...

    def networks(self) -> dict[str, Component]:
        """Return denoiser and autoencoder for planning memory and operations of a step."""
        ...

    def codec(self, device: torch.device) -> BaseCodec:
        """Return its autoencoder between pictures and the latents that the denoiser sees."""
        ...

    def text_encoders(self, device: torch.device) -> FrozenTextEncoder:
        """Return its own text encoders."""
        ...

    def times(self, seed: int, images_seen: int, latents: Tensor) -> Tensor:
        """Return the noise level of each training image (B,), in the base's unit."""
        ...

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Noised:
        """Return noisy latents and the base's target."""
        ...

    def loss_weights(self, times: Tensor, gamma: float | None) -> Tensor:
        """Return the loss weights (B,) of these times; `gamma` is that of min-SNR, None for equal weights."""
        ...

    def predict(
        self, denoiser: Any, noisy: Tensor, times: Tensor, states: Mapping[str, Tokens], sizes: Tensor,
        conditioning: Conditioning, guidance: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the prediction for noisy latents (B, C, h, w); `guidance` is for bases with a guidance embedding."""
        ...

    def draw(self, noise: Tensor, predict: Predict, steps: int) -> Tensor:
        """Return clean latents from noise, by the base's own kind of sampler."""
        ...
