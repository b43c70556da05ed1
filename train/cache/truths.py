"""Cached facts of portraits that the auxiliary losses need: which word is where, and the masks of the parts.

They follow from the number of a row, but take longer to compute than to read.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from imagine.world.body import letter_boxes
from imagine.world.parts import PARTS, part_masks
from train.cache.pictures import Gallery
from train.cache.rows import RowFormat, cache_rows, cache_rows_together

GRID = 16  # cells of a stored mask in each direction
_PAINTED = 32  # side at which masks are painted, ten times as fast as whole pictures
_NAME = "part-masks-1"  # a change of the parts, or of how they are painted, needs another name
_BLOCK = 512


class WordPlaces:
    """The words on the shirts of a gallery, and where they are."""

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        self.gallery = gallery
        files: dict[Path, RowFormat] = {
            folder / "words.u8": ((3,), np.uint8),
            folder / "word-boxes.f32": ((4,), np.float32),
        }
        self.letters, self.boxes = cache_rows_together(files, gallery, self._list, "listing words", _BLOCK)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the letters (B, 3), 1 to 26 and 0 for none, and the boxes of the words in pixels (B, 4)."""
        index = rows.numpy()
        return torch.from_numpy(self.letters[index]).long(), torch.from_numpy(self.boxes[index])

    def carried(self) -> Tensor:
        """Return which pictures carry a word, (N,) bool."""
        return torch.from_numpy(self.letters[:, 0] > 0)

    def _list(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        contexts = self.gallery.contexts(rows)
        return contexts.letters.byte(), letter_boxes(contexts, self.gallery.size).float()


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
