"""Pictures whose faces are squares of one colour, with a finder and a recogniser that know them by their colour."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagine.records import FaceBox

SIDE = 8  # pixels of a face
Colour = tuple[int, int, int]


def face(number: int) -> FaceBox:
    """Return the box of face `number` from the left."""
    return FaceBox(float(SIDE * number), 0.0, float(SIDE), float(SIDE), 1.0)


def picture(*colours: Colour) -> Image.Image:
    """Return a picture of one face per colour, from left to right."""
    image = Image.new("RGB", (SIDE * max(len(colours), 1), SIDE))
    for number, colour in enumerate(colours):
        image.paste(colour, (SIDE * number, 0, SIDE * (number + 1), SIDE))
    return image


class ColourRecogniser:
    """Embeds a face as its mean colour, 0 to 1; the distance is Euclidean."""

    same, is_certain = 0.6, True

    def embed(self, image: Image.Image, face: FaceBox) -> NDArray[np.float32]:
        box = (int(face.left), int(face.top), int(face.left + face.width), int(face.top + face.height))
        return np.asarray(image.convert("RGB").crop(box), np.float32).mean((0, 1)) / 255

    def distance(self, one: NDArray[np.float32], two: NDArray[np.float32]) -> float:
        return float(np.linalg.norm(np.asarray(one) - np.asarray(two)))


class Threshold(ColourRecogniser):
    """Takes a face for the person of any photo if it is brighter than a limit, so that some seeds fail."""

    same = 0.5

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def embed(self, image: Image.Image, face: FaceBox) -> NDArray[np.float32]:
        if image.size == (64, 64):  # a reference
            return np.zeros(3, np.float32)
        return np.full(3, super().embed(image, face).mean() > self.limit, np.float32)


class HalvesFinder:
    """Finds one face in each half of a picture, whatever it shows; of `missing` pictures, only the left one."""

    def __init__(self, count: int = 2, missing: Sequence[int] = ()) -> None:
        self.count, self.missing, self.searched = count, set(missing), 0

    def find(self, image: Image.Image) -> tuple[FaceBox, ...]:
        count = 1 if self.searched in self.missing else self.count
        self.searched += 1
        width = image.width / self.count
        return tuple(FaceBox(width * each, 0.0, width, float(image.height), 1.0) for each in range(count))
