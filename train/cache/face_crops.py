"""Cached squares around each picture's face, with a margin, so that a step only has to shift and mask them.

The random shift within the margin simulates the imprecise position of the finder's box.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imagine.people.faces import CROP_RISE, crop_unmasked, ellipse
from train.cache.latents import with_camera_noise
from train.cache.pictures import FacePictures
from train.cache.rows import cache_rows


def margin(size: int) -> int:
    """Return the margin in pixels on each side of a cached square for crops of `size` pixels: 3 for a crop of 64."""
    return max(3, round(3 * size / 64))


class FaceCrops:
    """Masked face crops (B, 3, size, size) of any rows, cut from squares with a margin that are cached on disk."""

    def __init__(self, pictures: FacePictures, size: int, folder: Path, noisy: bool) -> None:
        self.margin = margin(size)
        self.size, self.side = size, size + 2 * self.margin
        self.pictures, self.noisy = pictures, noisy
        self.rolls = torch.from_numpy(np.asarray(pictures.rolls))
        name = "turned-squares" if bool(self.rolls.any()) else "squares"
        path, shape = folder / f"{name}-{self.side}.u8", (3, self.side, self.side)
        self.values = cache_rows(path, pictures.gallery, shape, np.uint8, self._cut, "cutting faces")

    def _cut(self, rows: Tensor) -> Tensor:
        images, boxes = with_camera_noise(self.pictures, rows) if self.noisy else self.pictures.take(rows)
        rolls = self.rolls[rows]
        face_crops = crop_unmasked(images, _enlarged(boxes, rolls, self.side / self.size), self.side, rolls)
        return (face_crops.clamp(0, 1) * 255).round().byte()

    def take(self, rows: Tensor, shift: Tensor) -> Tensor:
        """Return masked crops of these rows, each shifted by up to the margin either way (`shift` (B, 2), 0 to 1)."""
        face_crops = torch.from_numpy(self.values[rows.numpy()])
        offsets = (shift * (2 * self.margin + 1)).long().tolist()
        cut = [s[:, y : y + self.size, x : x + self.size] for s, (y, x) in zip(face_crops, offsets, strict=True)]
        whole = torch.stack(cut) if cut else face_crops[:, :, : self.size, : self.size]
        return (whole.float() / 255 - 0.5) * ellipse(self.size) + 0.5


def _enlarged(boxes: Tensor, rolls: Tensor, factor: float) -> Tensor:
    """Return boxes (B, 4) whose crop is `factor` times as wide around the same centre (the crop's, not the box's)."""
    left, top, width, height = boxes.unbind(1)
    # The crop's centre is above the box's by a share of the height; without `rise` a larger box would move it up.
    rise = CROP_RISE * height * (factor - 1)
    across, down = -rise * rolls.sin(), rise * rolls.cos()
    corner = torch.stack((left - width * (factor - 1) / 2 + across, top - height * (factor - 1) / 2 + down), 1)
    return torch.cat((corner, boxes[:, 2:] * factor), 1)
