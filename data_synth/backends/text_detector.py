"""Detect writing with a simple method: watermarks, captions and signatures that a generator has learnt from the web.

A line of writing is a row of several small shapes on a straight line. Each shape has strokes of one width that contrast
clearly with their surroundings, and the shapes have similar height, stroke width and brightness. These are the rules of
Epshtein, Ofek and Wexler's "Stroke Width Transform" (CVPR 2010), applied to connected components. Eyes behind glasses
also fit these rules, so shapes on a known face are ignored.

The detector does not find:

- lines of fewer than four letters, and lines tilted by more than about 15 degrees;
- joined-up handwriting, and letters on the face;
- letters higher than a quarter of the picture or lower than about 8 pixels (of 512);
- watermarks that change the brightness by less than a tenth.

Rows of other small open shapes (railings, trees) and grass can be mistaken for letters: of six photographs without
writing, two had 2 to 3 % of their area detected. Use a trained detector for real watermarks.
"""

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagine.records import FaceBox

SIDE = 512  # pixels; larger pictures are shrunk to this longest side
LETTERS = 4  # minimum number in a line, because shirts of the portrait world have up to three

_STROKES = (3, 7, 15)  # pixels: maximum stroke widths; strokes below each of them are detected separately
_WIDEST = 0.03  # of the picture's shorter side: the larger widths of _STROKES above it are skipped
_CONTRAST = 0.1  # minimum difference of brightness, 0 to 1, between a stroke and its surroundings
_CLEAREST = 0.5  # minimum share of the strongest contrast nearby, so that texture does not connect letters
_HEIGHTS = (5, 0.25)  # of a letter: minimum in pixels, maximum as a share of the picture's height
_SOLID = 0.85  # share of its box above which a shape is solid (a window, a dot), unless it is as narrow as an I
_OPEN = 0.6  # minimum share of a line's shapes that are not solid
_UNEVEN = 0.1  # maximum median distance of a line's letters from a straight line, in heights of a letter
_SHADES = 0.15  # maximum difference of brightness between neighbouring letters

Box = tuple[int, int, int, int]  # left, top, right, bottom
Shape = tuple[float, float, float, float, float, float, float]  # a box, 1 if solid, half the stroke width, brightness


def text_share(image: Image.Image, face: FaceBox | None = None) -> float:
    """Return the share of the picture, 0 to 1, that the boxes of lines of writing cover, except letters on the face."""
    grey = image.convert("L")
    if max(grey.size) > SIDE:
        grey.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    brightness = np.asarray(grey, np.float32) / np.float32(255)
    covered = np.zeros(brightness.shape, bool)
    widths = [width for width in _STROKES if width <= max(_STROKES[0], _WIDEST * min(grey.size))]
    for picture in (brightness, 1 - brightness):  # bright strokes, then dark ones
        for width in widths:
            shapes = _outside(_shapes(picture, width), face, grey.width / image.width)
            for left, top, right, bottom in _lines(shapes):
                covered[top:bottom, left:right] = True
    return float(covered.mean())


def _shapes(picture: NDArray[np.float32], width: int) -> NDArray[np.float64]:
    """Return possible letters in bright strokes narrower than `width`, left to right: (S, 7), each row a `Shape`."""
    ndimage: Any = importlib.import_module("scipy.ndimage")  # a dependency of scikit-image
    contrast = picture - ndimage.grey_opening(picture, size=(width, width))
    strokes = contrast > np.maximum(_CONTRAST, _CLEAREST * ndimage.maximum_filter(contrast, 2 * width + 1))
    labels, count = ndimage.label(strokes, structure=np.ones((3, 3)))
    if not count:
        return np.zeros((0, 7))
    boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels)], np.float64)
    wide, high = (boxes[:, 2:] - boxes[:, :2]).T
    sizes = np.bincount(labels.ravel())[1:]
    filled = sizes / (wide * high)
    fits = (high >= _HEIGHTS[0]) & (high <= _HEIGHTS[1] * len(picture)) & (wide <= 2 * high) & (filled > 0.15)
    depth, even = _depths(ndimage, strokes, labels, count)
    shades = np.bincount(labels.ravel(), picture.ravel())[1:] / sizes
    found = np.column_stack((boxes, (filled > _SOLID) & (2 * wide > high), depth, shades))[fits & even]
    return found[np.lexsort((found[:, 1], found[:, 0]))]


def _depths(
    ndimage: Any, strokes: NDArray[np.bool_], labels: NDArray[np.int32], count: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return half the stroke width of each shape (S,), measured on its centre lines, and whether it is uniform (S,)."""
    depth = ndimage.distance_transform_edt(strokes)
    ridge = strokes & (depth >= ndimage.maximum_filter(depth, 3))
    where = labels[ridge]
    number = np.bincount(where, minlength=count + 1)[1:].clip(1)
    mean = np.bincount(where, depth[ridge], count + 1)[1:] / number
    square = np.bincount(where, depth[ridge] ** 2, count + 1)[1:] / number
    return mean, np.sqrt(np.maximum(square - mean**2, 0)) <= 0.5 * mean


def _outside(shapes: NDArray[np.float64], face: FaceBox | None, scale: float) -> NDArray[np.float64]:
    """Return the shapes whose centre is not in the face's box."""
    if face is None or not len(shapes):
        return shapes
    middle = (shapes[:, :2] + shapes[:, 2:4]) / 2 / scale
    corner, size = np.array([face.left, face.top]), np.array([face.width, face.height])
    return shapes[~((middle >= corner) & (middle <= corner + size)).all(axis=1)]


def _lines(shapes: NDArray[np.float64]) -> list[Box]:
    """Return the boxes of lines: rows of similar shapes at the same height and close together."""
    lines: list[list[Shape]] = []
    for row in shapes.tolist():
        shape: Shape = tuple(row)
        line = next((line for line in reversed(lines) if _follows(line[-1], shape)), None)
        if line is None:
            lines.append([shape])
        else:
            line.append(shape)
    return [
        _around(line) for line in lines if len(line) >= LETTERS and _share_open(line) >= _OPEN and _is_straight(line)
    ]


def _follows(one: Shape, two: Shape) -> bool:
    """Return whether `two` may be the next letter after `one`."""
    low, high = sorted((one[3] - one[1], two[3] - two[1]))
    level = min(one[3], two[3]) - max(one[1], two[1])
    near = -0.2 * high <= two[0] - one[2] <= high and 2 * level >= low
    thin, thick = sorted((one[5], two[5]))
    return near and high <= 1.8 * low and thick <= 1.6 * thin and abs(one[6] - two[6]) <= _SHADES


def _share_open(line: list[Shape]) -> float:
    return 1 - sum(shape[4] for shape in line) / len(line)


def _is_straight(line: list[Shape]) -> bool:
    """Return whether the letters' lower edges are on one straight line, possibly tilted, unlike leaves and grass."""
    rows = np.array(line)
    middle, foot = (rows[:, 0] + rows[:, 2]) / 2, rows[:, 3]
    off = np.abs(foot - np.polyval(np.polyfit(middle, foot, 1), middle))
    return bool(np.median(off) <= _UNEVEN * np.median(rows[:, 3] - rows[:, 1]))


def _around(line: list[Shape]) -> Box:
    left, top, right, bottom = (round(edge(shape[n] for shape in line)) for n, edge in enumerate((min, min, max, max)))
    return left, top, right, bottom
