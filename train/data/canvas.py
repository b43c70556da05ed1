"""Cut pictures of several people to one canvas, with the face boxes and masks of the people.

The part that is cut is the largest one with the shape of the canvas; its centre is as near that of the people as the
picture allows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from imagine.pipeline.layout import CANVAS
from imagine.shards.masks import decode_mask
from imagine.shards.people import RecordPerson
from imagine.shards.reading import Record
from train.data.recorded import full_width

_LEAST_INSIDE = 0.5  # share of a face, or of a mask, that must lie on the canvas


def group_canvas(people: int, side: int, step: int) -> tuple[int, int]:
    """Return height and width in pixels of pictures of so many people.

    Their ratio is that of the portrait world's pictures, and their area about that of a square of `side`, on which a
    public base was trained. `step` is the number of pixels per latent; both sides are multiples of 8 of them (of 2 for
    very small pictures), because a denoiser halves its latents three times.
    """
    height, width = CANVAS[people]
    unit = step * (8 if side >= 32 * step else 2)
    ratio = (width / height) ** 0.5
    return max(unit, round(side / ratio / unit) * unit), max(unit, round(side * ratio / unit) * unit)


@dataclass(frozen=True)
class CanvasCut:
    """The part of an opened picture that becomes the canvas."""

    size: tuple[int, int]  # width and height of the opened picture, which is shrunk if it is very large
    shrunk: float  # how much smaller the opened picture is than the full one, to which boxes refer
    edges: tuple[float, float, float, float]  # left, top, right and bottom of the part, in pixels of the opened one
    shape: tuple[int, int]  # height and width of the canvas in pixels

    @classmethod
    def around(cls, picture: Image.Image, record: Record, shape: tuple[int, int]) -> "CanvasCut":
        """Return the largest part with that shape, its centre as near that of the people as possible."""
        (across, down), (height, width) = picture.size, shape
        shrunk = across / full_width(picture, record)
        scale = min(across / width, down / height)
        places = np.array([_place(person, shrunk, picture.size) for person in record.people])
        middle = (places[:, :2].min(0) + places[:, 2:].max(0)) / 2
        left = min(max(float(middle[0]) - scale * width / 2, 0.0), across - scale * width)
        top = min(max(float(middle[1]) - scale * height / 2, 0.0), down - scale * height)
        right, bottom = min(left + scale * width, across), min(top + scale * height, down)
        return cls(picture.size, shrunk, (max(left, 0.0), max(top, 0.0), right, bottom), shape)

    @property
    def scale(self) -> float:
        """Pixels of the canvas per pixel of the opened picture."""
        return self.shape[1] / (self.edges[2] - self.edges[0])

    def box(self, person: RecordPerson) -> tuple[float, float, float, float]:
        """Return a person's face box on the canvas in pixels; of width 0 if it is not known."""
        if person.box is None:
            return 0.0, 0.0, 0.0, 0.0
        left, top, width, height = (value * self.shrunk for value in person.box)
        x, y = self.edges[:2]
        return (left - x) * self.scale, (top - y) * self.scale, width * self.scale, height * self.scale

    def seen(self, person: RecordPerson, cells: tuple[int, int]) -> np.ndarray[Any, Any]:
        """Return how much of each cell of the canvas a person's mask, or else the face box, covers, (*cells)."""
        if person.mask is None:
            left, top, width, height = self.box(person)
            down = _covered(top, height, self.shape[0], cells[0])
            return np.outer(down, _covered(left, width, self.shape[1], cells[1]))
        mask = decode_mask(person.mask)
        factors = [mask.shape[1] / self.size[0], mask.shape[0] / self.size[1]] * 2
        limits = (mask.shape[1], mask.shape[0]) * 2
        edges = [min(e * factor, limit) for e, factor, limit in zip(self.edges, factors, limits, strict=True)]
        whole = Image.fromarray(mask.astype(np.float32), "F")
        return np.asarray(whole.resize((cells[1], cells[0]), Image.Resampling.BOX, tuple(edges)))

    def shows(self, person: RecordPerson) -> bool:
        """Return whether at least half of a person's face, or else of the mask, lies on the canvas."""
        if person.box is not None:
            left, top, width, height = self.box(person)
            across = min(left + width, self.shape[1]) - max(left, 0)
            down = min(top + height, self.shape[0]) - max(top, 0)
            return max(across, 0) * max(down, 0) >= _LEAST_INSIDE * width * height
        assert person.mask is not None, "the reader leaves out people with neither"
        whole = float(decode_mask(person.mask).mean()) * self.size[0] * self.size[1]
        left, top, right, bottom = self.edges
        inside = float(self.seen(person, (64, 64)).mean()) * (right - left) * (bottom - top)
        return inside >= _LEAST_INSIDE * whole


def _place(person: RecordPerson, shrunk: float, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the edges of a person's face, or else of the mask, in pixels of the opened picture."""
    if person.box is not None:
        left, top, width, height = (value * shrunk for value in person.box)
        return left, top, left + width, top + height
    assert person.mask is not None, "the reader leaves out people with neither"
    mask = decode_mask(person.mask)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = size[0] / mask.shape[1], size[1] / mask.shape[0]
    return columns[0] * x, rows[0] * y, (columns[-1] + 1) * x, (rows[-1] + 1) * y


def _covered(start: float, length: float, side: int, cells: int) -> np.ndarray[Any, Any]:
    """Return the share of each cell of a side that an interval covers."""
    edges = np.clip(np.arange(cells + 1) * side / cells, start, start + length)
    return np.diff(edges) * cells / side
