"""Find out which face of a drawn picture shows which person of its references.

Every face is compared with every person by a recogniser (`strangers.FaceRecogniser`), and faces are assigned to people
so that the sum of their similarities is as large as possible (the Hungarian method, Kuhn 1955).
"""

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagine.people.persona import Persona
from imagine.people.strangers import FaceRecogniser
from imagine.records import FaceBox

# Similarity to a person whom the recogniser cannot compare: such a person gets a face that nobody else needs.
_UNKNOWN = -10.0


@dataclass(frozen=True)
class PersonResult:
    """One person of a drawn picture.

    name: the person's name in the prompt; "" if the reference has none.
    found: whether a face of the picture was assigned to the person.
    similarity: 1 minus the recogniser's distance between this face and the nearest of the person's photos; None if no
        face was found, or if the recogniser cannot compare them.
    matched: whether the similarity exceeds the recogniser's limit, and nobody else of the picture is more similar to
        this face; None if the recogniser cannot compare them.
    """

    name: str
    found: bool
    similarity: float | None = None
    matched: bool | None = None

    @property
    def failed(self) -> bool:
        """Whether the picture does not show the person, as far as that is known."""
        return not self.found or self.matched is False

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON; the similarity is rounded to three decimals."""
        return asdict(self) | {"similarity": None if self.similarity is None else round(self.similarity, 3)}


@dataclass(frozen=True)
class KnownPerson:
    """A person whom a picture should show: the name, and one recogniser's embeddings of the photos, if any."""

    name: str
    embeddings: tuple[NDArray[Any], ...] = ()

    @classmethod
    def of(cls, name: str, persona: Persona, recogniser: FaceRecogniser | None) -> "KnownPerson":
        """Return a persona with those of its photos' embeddings that this recogniser made."""
        identities = [face.identity for face in persona.faces if face.identity is not None]
        return cls(name, tuple(each.embedding for each in identities if each.recogniser is recogniser))


def check_people(
    image: Image.Image, faces: Sequence[FaceBox], people: Sequence[KnownPerson], recogniser: FaceRecogniser | None
) -> list[PersonResult]:
    """Return for each person whether a face of the picture (RGB) shows them. `faces` are all faces of the picture.

    Without a recogniser, faces are assigned to people in any order.
    """
    similarities = np.full((len(people), len(faces)), _UNKNOWN)
    if recogniser is not None and any(person.embeddings for person in people):
        embedded = [recogniser.embed(image, face) for face in faces]
        for row, person in enumerate(people):
            for column, face in enumerate(embedded):
                distances = [recogniser.distance(photo, face) for photo in person.embeddings]
                similarities[row, column] = 1 - min(distances) if distances else _UNKNOWN
    limit = None if recogniser is None else 1 - recogniser.same
    assigned = assign(similarities)
    return [_result(person, similarities, row, assigned.get(row), limit) for row, person in enumerate(people)]


def assign(similarities: NDArray[Any]) -> dict[int, int]:
    """Return the column of each row in the assignment with the largest sum; rows beyond the columns are left out."""
    optimise: Any = importlib.import_module("scipy.optimize")  # not before it is needed: importing it takes a moment
    rows, columns = optimise.linear_sum_assignment(similarities, maximize=True)
    return dict(zip(rows.tolist(), columns.tolist(), strict=True))


def _result(
    person: KnownPerson, similarities: NDArray[Any], row: int, column: int | None, limit: float | None
) -> PersonResult:
    """Return the result of the person in one row, to whom the face in one column was assigned."""
    comparable = limit is not None and bool(person.embeddings)
    if column is None:
        return PersonResult(person.name, False, None, False if comparable else None)
    if not comparable or limit is None:
        return PersonResult(person.name, True)
    similarity = float(similarities[row, column])
    is_best = similarity >= float(similarities[:, column].max())
    return PersonResult(person.name, True, similarity, similarity > limit and is_best)
