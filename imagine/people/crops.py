"""The parts of a photo that identity adapters read: the chosen face, cut as an adapter was trained.

masked           our own adapters: a square around the head with a masked background (`faces.crop_faces`)
aligned          IP-Adapter Plus Face, FaceID and InstantID: the face, moved to the places of ArcFace's template
aligned-masked   IP-Adapter Full Face: the same without background
picture          base and Plus IP-Adapters: a square of the whole picture, as large as it can be, that shows the face
"""

from dataclasses import replace
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagine.people.faces import TURNS, ellipse
from imagine.records import FaceBox, FaceCrop

CropKind = Literal["masked", "aligned", "aligned-masked", "picture"]
CROPS: tuple[CropKind, ...] = ("masked", "aligned", "aligned-masked", "picture")

# Left eye, right eye, nose, left and right corner of the mouth in ArcFace's aligned crop of 112 x 112 pixels
# (Deng et al., CVPR 2019; insightface/utils/face_align.py).
TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
TEMPLATE_SIDE = 112
# For a face without landmarks: a box from brow to chin and from ear to ear covers about 83 of the template's 112
# pixels, and its centre lies about 15 of them below the template's, for eyes 35 pixels apart and a usual head.
BOX_SIDE, BOX_RISE = 1.35, 0.18


def crop_as_trained(image: Image.Image, crop: FaceCrop, kind: CropKind, size: int) -> FaceCrop:
    """Return a crop of `faces.crop_face` with its picture cut as `kind` says, (size, size).

    image: the opened photo. Where no face was found, the whole picture is kept for "masked", and its centre square for
    the others.
    """
    if kind == "masked":
        return crop
    upright = image.transpose(TURNS[crop.turned]) if crop.turned else image
    if kind == "picture" or crop.box is None:
        return replace(crop, image=square_with(upright, crop.box, size))
    aligned = align(upright, crop.box, size)
    if kind == "aligned-masked":
        mask = ellipse(size).numpy()[..., None]
        pixels = (np.asarray(aligned, np.float32) - 127.5) * mask + 127.5
        aligned = Image.fromarray(pixels.round().astype(np.uint8))
    return replace(crop, image=aligned)


def square_with(image: Image.Image, box: FaceBox | None, size: int) -> Image.Image:
    """Return the largest square of an RGB picture whose centre is nearest to the face, resized to (size, size).

    It is the square that CLIP's preprocessing takes, the centre of the picture, moved as far as the face needs.
    """
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if box is not None:
        left = _shifted(left, side, image.width, box.left, box.width)
        top = _shifted(top, side, image.height, box.top, box.height)
    left, top = round(left), round(top)
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), Image.Resampling.BICUBIC)


def _shifted(start: float, side: int, whole: int, face: float, length: float) -> float:
    """Return the start of a square that holds the face with half its length around it, as near to `start` as it can."""
    margin = length / 2
    start = min(start, face - margin)
    start = max(start, face + length + margin - side)
    if length + 2 * margin > side:
        start = face + length / 2 - side / 2
    return min(max(start, 0.0), float(whole - side))


def align(image: Image.Image, face: FaceBox, size: int) -> Image.Image:
    """Return the face (size, size) of an upright RGB picture, moved to the places of ArcFace's template.

    The move is the least-squares similarity of the five landmarks (Umeyama, TPAMI 1991). Without landmarks it comes
    from the box. Pixels outside the picture are black, as in InsightFace.
    """
    scale, shift = _similarity(face)
    factor = size / TEMPLATE_SIDE
    forward = np.column_stack((scale * factor, shift * factor))
    smaller = float(np.hypot(*forward[:2, 0]))
    # Pillow samples single pixels; a picture that is much larger than the crop is reduced first.
    reduced = image.convert("RGB")
    shrink = max(1, int(1 / smaller / 1.5)) if smaller < 1 else 1
    if shrink > 1:
        reduced = reduced.reduce(shrink)
        forward[:, :2] *= shrink
    inverse = np.linalg.inv(np.vstack((forward, (0, 0, 1))))[:2]
    rows = tuple(float(each) for each in inverse.flatten())
    return reduced.transform((size, size), Image.Transform.AFFINE, rows, Image.Resampling.BICUBIC)


def _similarity(face: FaceBox) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the matrix (2, 2) and shift (2,) that take picture coordinates to the template's."""
    if not face.landmarks:
        side = BOX_SIDE * max(face.width, face.height)
        across, down = face.centre
        factor = TEMPLATE_SIDE / side
        corner = np.array((across - side / 2, down - BOX_RISE * face.height - side / 2))
        return np.eye(2) * factor, -corner * factor
    source = np.asarray(face.landmarks, np.float64)
    middle, wanted = source.mean(0), TEMPLATE.mean(0)
    centred, target = source - middle, TEMPLATE - wanted
    left, sizes, right = np.linalg.svd(target.T @ centred / len(source))
    sign = np.array((1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))))
    turn = left @ np.diag(sign) @ right
    scale = float((sizes * sign).sum() / centred.var(0).sum())
    matrix = cast("NDArray[np.float64]", scale * turn)
    return matrix, wanted - matrix @ middle
