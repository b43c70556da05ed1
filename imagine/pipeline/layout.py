"""Where the people of a picture stand: the layout of a call, and the size of a picture of several people.

A call's `layout` becomes weights between 0 and 1 for each person and each latent (`Conditioning.regions`), which guide
the identity branch. A layout is optional. It says where a person may appear, and does not force a person to be there.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from imagine.errors import ConfigError
from imagine.request import Request

LEFT_TO_RIGHT = "left to right"
MOST_OVERLAP = 0.1  # of the smaller of two places
CANVAS = {
    1: (1.0, 1.0),
    2: (1.0, 1.5),
    3: (1.0, 2.0),
    4: (1.5, 2.0),
}  # height and width, in sides of the model's square

Layout = str | Mapping[str, Any]  # LEFT_TO_RIGHT, or a name -> box or mask
Box = tuple[float, float, float, float]


def canvas_shape(people: int, side: int, step: int = 1) -> tuple[int, int]:
    """Return the height and width of a picture of so many people, so that heads are as large as in portraits.

    side: the model's own square. Both are multiples of `step`.
    """
    height, width = (max(step, round(side * factor / step) * step) for factor in CANVAS[min(max(people, 1), 4)])
    return height, width


def trained_people(metadata: Mapping[str, str]) -> int:
    """Return the most people in one picture that an adapter was trained with, as its metadata says; 1 if it does not.

    Raises ConfigError if this is not a number.
    """
    given = metadata.get("people", "1")
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"The adapter's metadata says people={given!r}, which is no number: save the adapter again.")
    return int(given)


def call_regions(
    layout: Layout | None, requests: Sequence[Request], size: tuple[int, int], copies: int = 1
) -> Tensor | None:
    """Return the regions (pictures, people, height, width) of all pictures of a call; None if there is no layout.

    size: height and width of the latents. A picture with fewer people than another one has zeros for the missing ones.
    The copies of a picture are adjacent. Raises ConfigError if the layout cannot be used.
    """
    if layout is None:
        return None
    names = list(dict.fromkeys(person.name for request in requests for person in request.people))
    _check_names(layout, names)
    most = max((len(request.people) for request in requests), default=0)
    if most == 0 or (layout == LEFT_TO_RIGHT and most == 1):
        return None
    regions = torch.zeros(len(requests), most, *size)
    for row, request in enumerate(requests):
        if request.people:
            regions[row, : len(request.people)] = layout_regions(
                layout,
                [person.name for person in request.people],
                size,
                [person.place for person in request.people],
            )
    return regions.repeat_interleave(copies, 0)


def layout_regions(
    layout: Layout, names: Sequence[str], size: tuple[int, int], places: Sequence[int] | None = None
) -> Tensor:
    """Return the region (people, height, width) of each named person of one picture, 0 to 1.

    layout: "left to right", in the order of `places` (by default the order of the names); or for each name a box (left,
        top, right, bottom, as shares of the picture) or a mask (a grey picture or array of the picture's shape).
        A person without an entry may be anywhere outside the others' places.
    size: height and width of the regions.

    Raises ConfigError if the layout cannot be used. Names that are not in this picture are ignored.
    """
    if isinstance(layout, str):
        order = sorted(range(len(names)), key=lambda person: person if places is None else places[person])
        columns = [(column / len(names), 0.0, (column + 1) / len(names), 1.0) for column in range(len(names))]
        return torch.stack([_box_region(columns[order.index(person)], size) for person in range(len(names))])
    given = {str(name): each for name, each in layout.items() if str(name) in names}
    boxes = {name: _box(name, each) for name, each in given.items() if not _is_mask(each)}
    masks = {name: _mask(name, each, size) for name, each in given.items() if _is_mask(each)}
    _check_overlaps(boxes, masks)
    found = {name: _box_region(box, size) for name, box in boxes.items()}
    found |= {name: _resized(mask, size) for name, mask in masks.items()}
    taken = torch.stack([*found.values(), torch.zeros(size)]).amax(0)
    return torch.stack([found.get(name, 1 - taken) for name in names])


def _check_names(layout: Any, names: Sequence[str]) -> None:
    """Raise ConfigError for a layout of an unknown kind, or one with a name that is not among the people."""
    if isinstance(layout, str) and layout == LEFT_TO_RIGHT:
        return
    if not isinstance(layout, Mapping) or not layout:
        raise ConfigError(
            f"layout={layout!r} is unknown: give {LEFT_TO_RIGHT!r}, or a box or a mask for each name, such as "
            "{'a': (0, 0, 0.5, 1), 'b': (0.5, 0, 1, 1)}."
        )
    known = [name for name in names if name]
    if unknown := [str(name) for name in layout if str(name) not in known]:
        have = f"the references are for {_listed(known)}" if known else "the references have no names"
        raise ConfigError(f"The layout names {_listed(unknown)}, but {have}: use the same names in both.")


def _is_mask(given: Any) -> bool:
    """Return whether a place is a mask rather than a box; everything that is not four numbers counts as a mask."""
    return isinstance(given, Image.Image) or len(getattr(given, "shape", ())) > 1


def _box(name: str, given: Any) -> Box:
    """Return a box as four floats. Raises ConfigError unless it lies within the picture."""
    try:
        edges = [] if isinstance(given, str) else [float(edge) for edge in given]
    except (TypeError, ValueError):
        edges = []
    if len(edges) != 4 or not all(map(math.isfinite, edges)):
        raise ConfigError(
            f"The layout of {name!r} must be a box of four numbers (left, top, right, bottom) or a mask, not {given!r}."
        )
    left, top, right, bottom = edges
    shown = f"({left:g}, {top:g}, {right:g}, {bottom:g})"
    if min(edges) < 0 or max(edges) > 1:
        raise ConfigError(
            f"The box {shown} of {name!r} is outside the picture: give left, top, right and bottom as shares of the "
            "picture, from 0 to 1."
        )
    if left >= right or top >= bottom:
        raise ConfigError(f"The box {shown} of {name!r} is empty: left must be below right, and top below bottom.")
    return left, top, right, bottom


def _mask(name: str, given: Any, size: tuple[int, int]) -> Tensor:
    """Return a mask (height, width) in 0..1 at its own size.

    Raises ConfigError unless it has the picture's shape and a pixel above 0.
    """
    pixels = np.asarray(given.convert("L") if isinstance(given, Image.Image) else given)
    if pixels.dtype == np.uint8:
        pixels = pixels / 255
    if pixels.ndim != 2 or abs(pixels.shape[1] * size[0] - pixels.shape[0] * size[1]) > max(pixels.shape):
        raise ConfigError(
            f"The mask of {name!r} has the shape {tuple(pixels.shape)}, but the picture's height and width are as "
            f"{size[0]} to {size[1]}: give a mask of the picture's shape."
        )
    mask = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))
    if not mask.isfinite().all() or mask.min() < 0 or mask.max() > 1:
        raise ConfigError(f"The mask of {name!r} must hold numbers from 0 to 1, or bytes from 0 to 255.")
    if not mask.any():
        raise ConfigError(f"The mask of {name!r} is empty: mark where the person may appear, or leave the mask out.")
    return mask


def _check_overlaps(boxes: Mapping[str, Box], masks: Mapping[str, Tensor]) -> None:
    """Raise ConfigError if two places have more than MOST_OVERLAP of the smaller one in common."""
    for one, other in combinations([*boxes, *masks], 2):
        if one in boxes and other in boxes:
            common = _common_share(boxes[one], boxes[other])
        else:
            height, width = next(masks[name] for name in (one, other) if name in masks).shape
            size = (height, width)
            first, second = (
                _box_region(boxes[name], size) if name in boxes else _resized(masks[name], size)
                for name in (one, other)
            )
            common = float(torch.minimum(first, second).sum() / torch.minimum(first.sum(), second.sum()))
        if common > MOST_OVERLAP + 1e-6:
            raise ConfigError(
                f"The places of {one!r} and {other!r} overlap by {common:.0%} of the smaller one, and at most "
                f"{MOST_OVERLAP:.0%} is possible: move them apart."
            )


def _common_share(one: Box, other: Box) -> float:
    """Return the area that two boxes have in common, as a share of the smaller one's area."""
    across = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    down = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    return across * down / min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))


def _box_region(box: Box, size: tuple[int, int]) -> Tensor:
    """Return the share of each cell of a grid (height, width) that a box covers."""
    return torch.outer(_covered(box[1], box[3], size[0]), _covered(box[0], box[2], size[1]))


def _covered(start: float, end: float, cells: int) -> Tensor:
    edges = torch.arange(cells + 1, dtype=torch.float64)
    inside = edges.clamp(start * cells, end * cells)
    return (inside[1:] - inside[:-1]).float()


def _resized(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a mask averaged over the cells of a grid (height, width)."""
    if mask.shape[0] < size[0] or mask.shape[1] < size[1]:
        return F.interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    return F.adaptive_avg_pool2d(mask[None, None], size)[0, 0]


def _listed(names: Sequence[str]) -> str:
    *others, last = map(repr, names)
    return f"{', '.join(others)} and {last}" if others else last
