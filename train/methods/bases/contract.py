"""The interface of a base: a frozen text-to-image model with its noise convention, its text and its sampler."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from imagine.people.faces import FaceFinder
from imagine.records import Conditioning
from train.cache.latents import Codec
from train.methods.bases.text import Reader, TextState

Predict = Callable[[Tensor, Tensor], Tensor]  # noisy latents, steps (B,) -> prediction


@dataclass(frozen=True)
class Noised:
    """Noisy latents, the denoiser's argument for how noisy they are, and what it should predict."""

    noisy: Tensor
    steps: Tensor  # (B,)
    target: Tensor


class AnyBase(Protocol):
    """A text-to-image model. All its weights are frozen, unless a method trains them."""

    folder: Path
    name: str  # what results call it
    side: int  # pixels of its pictures
    unet: Any
    device: torch.device
    steps: int  # sampling steps by default
    guidance: float  # guidance scale by default

    @property
    def readers(self) -> Sequence[Reader]:
        """The text encoders to which words can be added."""
        ...

    @property
    def mark(self) -> str:
        """A fingerprint of everything that generated pictures depend on."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...

    @property
    def codec(self) -> Codec:
        """Its autoencoder, for the cache of training pictures."""
        ...

    @property
    def finder(self) -> FaceFinder:
        """The face detector for photos."""
        ...

    def fits(self, sentence: str) -> bool:
        """Return whether `text` takes the whole sentence, with a learnt word in it."""
        ...

    def encode(self, pictures: Tensor) -> Tensor:
        """Return the latents of pictures (B, 3, S, S), 0 to 1."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures (B, 3, S, S), 0 to 1, on the CPU."""
        ...

    def text(self, prompts: Sequence[str]) -> TextState:
        """Encode sentences, with gradients to inserted words; PromptError for one that is too long."""
        ...

    def times(self, seed: int, images_seen: int, count: int) -> Tensor:
        """Return training times (count,) from 0 (clean) to 1 (noise), each a function of its image's number."""
        ...

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Noised: ...

    def predict(self, noisy: Tensor, steps: Tensor, text: TextState, identity: Conditioning | None = None) -> Tensor:
        """Return the denoiser's prediction. `identity` has tokens of an attached adapter, or observes layers."""
        ...

    def share(self, steps: Tensor) -> Tensor:
        """Return the times, 0 (clean) to 1 (noise), of the denoiser's argument `steps`."""
        ...

    def sample(self, noise: Tensor, predict: Predict, steps: int) -> Tensor:
        """Return clean latents from noise."""
        ...

    def faces(self, pictures: Tensor) -> Tensor | None:
        """Return one face box (left, top, width, height) per picture, (B, 4); None if the base has no finder."""
        ...
