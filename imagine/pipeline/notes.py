"""Notes of a call: one sentence for each result that the user may not expect."""

from collections.abc import Sequence

from imagine.adapter.adapter import Adapter
from imagine.people.faces import LEARNED
from imagine.people.persona import Face
from imagine.pipeline.attempts import PictureCheck
from imagine.world import VERSION

PORTRAIT_WORLD = "imagine portrait world"  # the base that an adapter's file names


def photo_notes(adapter: Adapter | None, faces: Sequence[Face]) -> list[str]:
    """Return a note if weights that draw only the portrait world got a photograph as reference."""
    finders = {face.box.finder for face in faces if face.box is not None}
    if adapter is None or adapter.metadata.get("base") != PORTRAIT_WORLD or not finders - {LEARNED, ""}:
        return []
    return [
        "These weights draw the stylised people of the portrait world, so a photograph gives a drawing with some of "
        "the person's traits; docs/bases.md describes bases that draw photographs."
    ]


def world_notes(adapter: Adapter | None) -> list[str]:
    """Return a note if weights of the portrait world were trained on renders of another version of it."""
    if adapter is None or adapter.metadata.get("base") != PORTRAIT_WORLD:
        return []
    trained = adapter.metadata.get("world", "portrait-world-1")
    if trained == VERSION:
        return []
    return [
        f"These weights were trained in {trained}, and this version renders {VERSION}, where people look different: "
        "scores are too low."
    ]


def people_notes(checks: Sequence[PictureCheck], attempts: Sequence[int], seeds: Sequence[int | None]) -> list[str]:
    """Return a warning for each picture that does not show all its people, and a note for each picture drawn again.

    checks, attempts, seeds: as in `attempts.Attempts`.
    """
    notes = []
    for number, (check, tried, seed) in enumerate(zip(checks, attempts, seeds, strict=True), 1):
        if check.failed:
            advice = "try other seeds, more attempts, or each person alone"
            notes.append(f"Warning: picture {number} {_shortcomings(check)}; {advice}.")
        if seed is not None:
            notes.append(f"Picture {number} was drawn {tried} times; the seed {seed} draws it at once.")
        elif tried > 1:
            notes.append(f"Picture {number} was drawn {tried} times, and the first one was the best.")
    return notes


def _shortcomings(check: PictureCheck) -> str:
    """Return what a picture lacks, such as "shows 1 of 2 people" or "shows nobody who is like 'ann'"."""
    found = sum(person.found for person in check.people)
    if found < len(check.people):
        return f"shows {found} of {len(check.people)} people"
    unlike = [repr(person.name) if person.name else "the person" for person in check.people if person.matched is False]
    return f"shows nobody who is like {' and '.join(unlike)}"
