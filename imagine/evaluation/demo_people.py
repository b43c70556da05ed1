"""The second picture of `imagine demo`: two of the four people together, with three sentences for each pair.

Under each picture stands, for each person, whether the check of the pipeline finds and recognises them
(`imagine.people.assignment`). Nothing is drawn again, so that the picture shows what one call gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from imagine.errors import ConfigError
from imagine.evaluation import report
from imagine.people.assignment import PersonResult
from imagine.people.photos import open_photo
from imagine.pipeline.layout import trained_people
from imagine.records import Progress, no_progress

PAIRS = ((0, 1), (2, 3))  # numbers of the references in weights/examples
SENTENCES = (
    "two people on a beach: {a} on the left, smiling, wearing a red t-shirt; "
    "{b} on the right, laughing, wearing a blue suit",
    "two people in a city, at sunset: {a} on the right, laughing, in a beanie; {b} on the left, smiling",
    "a watercolour painting of two people in a forest: {a} on the left, smiling, wearing a purple hoodie; "
    "{b} on the right, laughing, in a cap",
)
_WIDTH, _HEIGHT = 240, 160  # pixels of a picture on the sheet, in the shape of a canvas for two


@dataclass(frozen=True)
class PeopleSheet:
    """The sheet that was drawn; `matched` of the `shown` people were found and recognised."""

    path: Path
    matched: int
    shown: int


def draws_two_people(pipeline: Any) -> bool:
    """Return whether the pipeline's adapter was trained with two or more people in a picture."""
    adapter = getattr(pipeline, "adapter", None)
    return adapter is not None and trained_people(adapter.metadata) > 1


def draw_people_sheet(
    pipeline: Any, references: Sequence[Path], output: Path, seed: int = 7, progress: Progress = no_progress
) -> PeopleSheet:
    """Draw each pair with each sentence and write people.png into the folder `output`, which must exist.

    Raises ConfigError if the file cannot be written.
    """
    photos = [open_photo(path) for path in references]
    rows: list[list[report.Cell]] = []
    people: list[PersonResult] = []
    for number, pair in enumerate(PAIRS):
        progress("drawing two people", number * len(SENTENCES), len(PAIRS) * len(SENTENCES))
        own = [photos[one] for one in pair]
        drawn = _draw_pair(pipeline, own, seed * 100 + 50 + number * len(SENTENCES))
        cells = [report.Cell(picture, notes(found)) for picture, found in zip(drawn.images, drawn.people, strict=True)]
        rows.append([*map(report.Cell, own), *cells])
        people += [person for found in drawn.people for person in found]
    sheet = PeopleSheet(output / "people.png", sum(not person.failed for person in people), len(people))
    title = "Two photos and a prompt; under each picture who was recognised"
    try:
        report.contact_sheet(["{a}", "{b}", *SENTENCES], rows, _WIDTH, title, _HEIGHT).save(sheet.path)
    except OSError as error:
        raise ConfigError(
            f"{sheet.path} cannot be written ({error.strerror or error}): choose another --output."
        ) from error
    return sheet


def notes(people: Sequence[PersonResult]) -> list[tuple[str, bool | None]]:
    """Return one line for each person of a picture: whether they were found and recognised."""
    return [(f"{person.name}: {_finding(person)}", not person.failed) for person in people]


def _draw_pair(pipeline: Any, photos: Sequence[Image.Image], seed: int) -> Any:
    references = dict(zip("ab", (pipeline.enroll([photo]) for photo in photos), strict=True))
    return pipeline(
        list(SENTENCES),
        reference=[references] * len(SENTENCES),
        generator=[torch.Generator().manual_seed(seed + number) for number in range(len(SENTENCES))],
        output_type="pil",
    )


def _finding(person: PersonResult) -> str:
    if not person.found:
        return "missing"
    if person.similarity is None:
        return "found"
    return f"{'recognised' if person.matched else 'found, not recognised'} ({person.similarity:.2f})"
