"""What is kept of one gallery for the denoiser's stages: pictures, latents, captions as tokens, face crops."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from imagine.encoders import TextEncoders
from train.latents import Latents
from train.pictures import AnyPictures
from train.sentences import SentenceStore
from train.squares import Squares


@dataclass(frozen=True)
class Stock:
    """Everything behind the row numbers of one gallery; `squares` only where a stage needs references."""

    pictures: AnyPictures
    latents: Latents
    sentences: SentenceStore
    squares: Squares | None = None

    def faces(self, rows: Tensor) -> Tensor:
        """Where the faces are in the latents of these rows, (B, 1, h, w), 1 or 0."""
        return self.latents.faces(rows)


def keep_stock(
    pictures: AnyPictures,
    autoencoder: Path,
    text: TextEncoders,
    folder: Path,
    device: torch.device,
    side: int | None = None,
    crop_side: int | None = None,
) -> Stock:
    """Fill `folder` with what is missing of a gallery: latents at `side` pixels, face crops of `crop_side` if given."""
    latents = Latents(pictures, autoencoder, folder, device, side)
    squares = None if crop_side is None else Squares(pictures, crop_side, folder, noisy=True)
    return Stock(pictures, latents, SentenceStore(pictures.gallery, text, folder), squares)
