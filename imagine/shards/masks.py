"""Masks as run lengths, the format of COCO's annotations: `{"size": [height, width], "counts": ...}`.

The counts are the lengths of runs in column order (from top to bottom, column after column), first of zeros, then of
ones, and so on: a list of numbers, or the text that pycocotools writes. In the text, every count from the fourth on is
replaced by its difference from the count two places before, and each number is written in groups of 5 bits, the lowest
first, as characters from "0" on; bit 6 says that another group follows.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_PIXELS = 1 << 26  # of a mask, so that a few bytes cannot ask for all memory
_SAME_SHAPE = 0.03  # largest difference between the ratios of width and height of a mask and its picture
_FIRST_CHARACTER, _BITS, _MORE, _SIGN = 48, 5, 0x20, 0x10


def encode_mask(mask: NDArray[Any]) -> dict[str, Any]:
    """Return a mask (height, width), where values other than 0 are covered, as run lengths with counts as a text."""
    values = np.asarray(mask).astype(bool).ravel(order="F")
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    edges = [0, *([0] if values.size and values[0] else []), *changes.tolist(), values.size]
    counts = [end - start for start, end in pairwise(edges)]
    height, width = mask.shape
    return {"size": [int(height), int(width)], "counts": _as_text(counts)}


def decode_mask(mask: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Return a mask (height, width) from its run lengths. Raises ValueError if they are not a mask."""
    size = mask.get("size")
    if not isinstance(size, Sequence) or len(size) != 2 or not all(_is_count(side) and side > 0 for side in size):
        raise ValueError("the size is not a height and a width")
    height, width = size
    if height * width > MOST_PIXELS:
        raise ValueError("the mask is too large")
    counts = mask.get("counts")
    if isinstance(counts, str):
        counts = _of_text(counts)
    if not isinstance(counts, list) or not all(map(_is_count, counts)) or sum(counts) != height * width:
        raise ValueError("the counts do not cover the mask")
    values = np.zeros(len(counts), bool)
    values[1::2] = True
    return np.repeat(values, np.asarray(counts, np.int64)).reshape((height, width), order="F")


def is_mask_of(mask: Any, width: float | None, height: float | None) -> bool:
    """Return whether this is a mask that covers something, in the shape of a picture of that size, if it is known."""
    if not isinstance(mask, Mapping):
        return False
    try:
        values = decode_mask(mask)
    except ValueError:
        return False
    rows, columns = values.shape
    fits = width is None or height is None or abs(columns * height / (rows * width) - 1) <= _SAME_SHAPE
    return fits and bool(values.any())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_PIXELS


def _as_text(counts: Sequence[int]) -> str:
    characters = []
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            group, value = value & (_MORE - 1), value >> _BITS
            more = value != (-1 if group & _SIGN else 0)
            characters.append(chr(_FIRST_CHARACTER + group + (_MORE if more else 0)))
    return "".join(characters)


def _of_text(text: str) -> list[int] | None:
    """Return the counts that a text holds; None if it is not such a text."""
    counts: list[int] = []
    value, shift = 0, 0
    for character in text:
        group = ord(character) - _FIRST_CHARACTER
        if not 0 <= group < 2 * _MORE or shift > 8 * _BITS:
            return None
        value |= (group & (_MORE - 1)) << shift
        shift += _BITS
        if not group & _MORE:
            value -= (1 << shift) if group & _SIGN else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return None if shift else counts
