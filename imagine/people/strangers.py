"""Find the photo that shows another person among several photos that should show one person.

Photographs are compared by `photo_recogniser`, drawings of the portrait world by a recogniser of that world. Neither
judges the other's kind of picture, so a photo and a drawing are not compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagine.records import FaceBox


class FaceRecogniser(Protocol):
    """A recogniser of people in one kind of picture."""

    @property
    def same(self) -> float:
        """Return the largest distance at which two faces count as one person."""
        ...

    @property
    def is_certain(self) -> bool:
        """Return whether a larger distance is enough to refuse a photo, or only to warn."""
        ...

    def embed(self, image: Image.Image, face: FaceBox) -> NDArray[np.float32]:
        """Return the embedding of a face of an upright RGB picture."""
        ...

    def distance(self, one: NDArray[np.float32], two: NDArray[np.float32]) -> float:
        """Return the distance of two embeddings, 0 for the same picture."""
        ...


@dataclass(frozen=True, eq=False)
class Identity:
    """The embedding of one face, and the recogniser that made it."""

    recogniser: FaceRecogniser
    embedding: NDArray[Any]


@dataclass(frozen=True)
class Stranger:
    """A photo of another person: its index, the distance of its face to the nearest of the others, and the limit."""

    index: int
    distance: float
    recogniser: FaceRecogniser


def find_stranger(identities: Sequence[Identity | None]) -> Stranger | None:
    """Return the first face that does not belong to the person of most photos, or None if all faces belong together.

    Two faces belong together if their distance is at most the recogniser's limit, directly or through other faces.
    Faces are compared only with faces of the same recogniser; None stands for a face that no recogniser embedded. If
    two groups are equally large, the person of the first photo counts.
    """
    for recogniser in dict.fromkeys(one.recogniser for one in identities if one is not None):
        faces = {index: one.embedding for index, one in enumerate(identities) if one and one.recogniser is recogniser}
        person = max(_groups(faces, recogniser), key=len)
        for index in sorted(faces.keys() - person):
            distance = min(recogniser.distance(faces[index], faces[other]) for other in person)
            return Stranger(index, distance, recogniser)
    return None


def _groups(faces: Mapping[int, NDArray[Any]], recogniser: FaceRecogniser) -> list[set[int]]:
    """Return the connected groups of faces, the one with the first photo first."""
    left, groups = list(faces), list[set[int]]()
    while left:
        group, queue = {left[0]}, [left.pop(0)]
        while queue:
            one = queue.pop()
            near = [two for two in left if recogniser.distance(faces[one], faces[two]) <= recogniser.same]
            group.update(near)
            queue += near
            left = [two for two in left if two not in near]
        groups.append(group)
    return groups
