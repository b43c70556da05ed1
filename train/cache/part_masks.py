"""Cached masks of the parts of portraits (`imagine.world.parts`): the targets of the part loss."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from imagine.world.parts import PARTS, part_masks
from train.cache.pictures import Gallery
from train.cache.rows import cache_rows

GRID = 16  # cells of a stored mask in each direction
_PAINTED = 32  # side at which masks are painted, ten times as fast as whole pictures
_NAME = "part-masks-1"  # a change of the parts, or of how they are painted, needs another name


class PartMasks:
    """The masks (N, parts, GRID, GRID) of a gallery, painted on first use."""

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        self.gallery = gallery
        shape = (len(PARTS), GRID, GRID)
        self.values = cache_rows(folder / f"{_NAME}.u8", gallery, shape, np.uint8, self._paint, "painting part masks")

    def take(self, rows: Tensor) -> Tensor:
        """Return the masks of these rows, (B, parts, GRID, GRID) in 0..1."""
        return torch.from_numpy(self.values[rows.numpy()]).float().div_(255)

    def _paint(self, rows: Tensor) -> Tensor:
        masks = part_masks(self.gallery.people(rows), self.gallery.contexts(rows), _PAINTED)
        return (F.avg_pool2d(masks, _PAINTED // GRID) * 255).round().byte()
