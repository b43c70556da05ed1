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

    def face_weights(self, rows: Tensor, weight: float) -> Tensor:
        """How much each place of the latents counts in a loss: more where the face is, (B, 1, h, w)."""
        boxes = torch.from_numpy(self.pictures.boxes[rows.numpy()])
        return face_weights(boxes, self.pictures.gallery.size, self.latents.values.shape[-1], weight)


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


def face_weights(boxes: Tensor, side: int, cells: int, weight: float) -> Tensor:
    """(B, 1, cells, cells): `weight` where a latent cell touches the face, 1 elsewhere."""
    middle = (torch.arange(cells) + 0.5) * side / cells
    half = side / cells / 2
    across = (middle > boxes[:, :1] - half) & (middle < boxes[:, :1] + boxes[:, 2:3] + half)
    down = (middle > boxes[:, 1:2] - half) & (middle < boxes[:, 1:2] + boxes[:, 3:] + half)
    inside = (down.unsqueeze(2) & across.unsqueeze(1)).unsqueeze(1).float()
    return 1 + (weight - 1) * inside
