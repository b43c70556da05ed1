"""The pictures of several people and of nobody on which the face finder trains and is validated.

Groups stand on wide canvases and are letterboxed into a square, as `imagine.people.finder` does it. Pictures without a
face are scenes of the world, photographs of things, portraits with shuffled tiles, and noise. Without photographs and
shuffled portraits among its negatives the finder finds faces in animals and fabrics (docs/experiments.md).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from torch import Tensor

from imagine.world import render, render_groups, sample_contexts, sample_people
from imagine.world.groups import MAX_PEOPLE
from imagine.world.scenes import paint_scenes

# Photographs without a person that scikit-image carries. Its other ones test the finder, so they must not train it.
PHOTOGRAPHS = (
    "cell", "coins", "gravel", "hubble_deep_field", "immunohistochemistry", "page", "retina", "text",
    "stereo_motorcycle",
)  # fmt: skip
_TILES = 4  # a shuffled portrait is cut into 4 x 4 tiles


class FinderPictures(NamedTuple):
    """Square pictures and the faces in them."""

    images: Tensor  # (N, 3, side, side), 0 to 1
    boxes: Tensor  # (N, MAX_PEOPLE, 4) left, top, width, height in pixels
    valid: Tensor  # (N, MAX_PEOPLE) which of the boxes hold a face


def groups(first: int, count: int, pictures: int, side: int) -> FinderPictures:
    """Render pictures of `count` people; the world's seeds start at `first`. Every other one has a wide canvas."""
    seeds = range(first, first + pictures * count)
    parts = []
    for width, part in ((side, seeds[: pictures // 2 * count]), (None, seeds[pictures // 2 * count :])):
        if part:
            out = render_groups(sample_people(part), sample_contexts(part), count, size=side, width=width)
            parts.append(_letterboxed(out.images, out.boxes, side))
    images, boxes = (torch.cat(part) for part in zip(*parts, strict=True))
    return _padded(images, boxes)


def sheets(images: Tensor, boxes: Tensor) -> FinderPictures:
    """Join four portraits (4N, 3, S, S) with face boxes (4N, 4) into each square sheet (N, 3, S, S)."""
    side = images.shape[-1]
    small = F.avg_pool2d(images, 2).unflatten(0, (-1, 2, 2))
    sheet = small.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, side, side)
    corners = torch.tensor([(0, 0, 0, 0), (side / 2, 0, 0, 0), (0, side / 2, 0, 0), (side / 2, side / 2, 0, 0)])
    return _padded(sheet, boxes.unflatten(0, (-1, 4)) / 2 + corners)


def scenes(seeds: Sequence[int], side: int) -> Tensor:
    """Return scenes of the world without a person, (N, 3, side, side)."""
    return paint_scenes(sample_contexts(seeds), side)


def no_faces(seeds: Sequence[int], side: int) -> Tensor:
    """Return pictures (N, 3, side, side) without a face that are not scenes of the world, one per seed.

    They are cuts of photographs, portraits with shuffled tiles, and smooth or sharp noise, in equal shares.
    """
    photographs = [_photograph(name) for name in PHOTOGRAPHS]
    portraits = render(sample_people(seeds), sample_contexts(seeds), size=side).images
    made = []
    for seed, portrait in zip(seeds, portraits, strict=True):
        random = np.random.default_rng([seed, 11])
        kind = int(random.integers(3))
        if kind == 0:
            made.append(_cut(photographs[int(random.integers(len(photographs)))], random, side))
        else:
            made.append(_shuffled(portrait, random) if kind == 1 else _noise(random, side))
    return torch.stack(made)


def _photograph(name: str) -> Tensor:
    data = getattr(skimage.data, name)()
    array = np.asarray(data[0] if isinstance(data, tuple) else data)
    grey = array if array.ndim == 3 else np.repeat(array[..., None], 3, -1)
    return torch.from_numpy(np.ascontiguousarray(grey[..., :3])).permute(2, 0, 1).float() / 255


def _cut(photograph: Tensor, random: np.random.Generator, side: int) -> Tensor:
    """Cut a square of random size and place, turn it, and scale it to the side."""
    shortest = min(photograph.shape[-2:])
    size = int(random.integers(min(64, shortest), shortest + 1))
    top, left = (int(random.integers(length - size + 1)) for length in photograph.shape[-2:])
    cut = photograph[None, :, top : top + size, left : left + size].rot90(int(random.integers(4)), (-2, -1))
    return F.interpolate(cut, (side, side), mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


def _shuffled(portrait: Tensor, random: np.random.Generator) -> Tensor:
    """Shuffle the tiles of a portrait and turn each, so that it keeps skin, eyes and clothes, and no face."""
    tile = portrait.shape[-1] // _TILES
    tiles = portrait.unfold(1, tile, tile).unfold(2, tile, tile).permute(1, 2, 0, 3, 4).flatten(0, 1)
    turned = torch.stack([tiles[int(i)].rot90(1 + int(random.integers(3)), (-2, -1)) for i in random.permutation(16)])
    return turned.unflatten(0, (_TILES, _TILES)).permute(2, 0, 3, 1, 4).reshape(portrait.shape)


def _noise(random: np.random.Generator, side: int) -> Tensor:
    """Return noise of a random grain, from single pixels to a few large spots."""
    cells = int(2 ** random.integers(2, 8))
    noise = torch.from_numpy(random.random((1, 3, cells, cells), dtype=np.float32))
    return F.interpolate(noise, (side, side), mode="bicubic", align_corners=False)[0].clamp(0, 1)


def _letterboxed(images: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Fit pictures (N, 3, H, W) and boxes (N, P, 4) into grey squares of the side."""
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    size = round(height * scale), round(width * scale)
    small = images if size == (height, width) else F.interpolate(images, size, mode="area")
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    square = torch.full((len(images), 3, side, side), 0.5)
    square[:, :, top : top + size[0], left : left + size[1]] = small
    return square, boxes * scale + torch.tensor([left, top, 0, 0])


def _padded(images: Tensor, boxes: Tensor) -> FinderPictures:
    count = boxes.shape[1]
    valid = (torch.arange(MAX_PEOPLE) < count).expand(len(images), -1)
    return FinderPictures(images, F.pad(boxes, (0, 0, 0, MAX_PEOPLE - count)), valid)
