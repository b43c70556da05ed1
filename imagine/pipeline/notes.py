"""Notes of a call: one sentence for each result that the user may not expect."""

from collections.abc import Callable, Sequence

from PIL import Image

from imagine.adapter.adapter import Adapter
from imagine.people.faces import LEARNED, FaceFinder
from imagine.people.persona import Face, Persona
from imagine.world import VERSION

PORTRAIT_WORLD = "imagine portrait world"  # the base that an adapter's file names


def photo_notes(adapter: Adapter | None, faces: Sequence[Face]) -> list[str]:
    """Return a note if weights that draw only the portrait world got a photograph as reference."""
    finders = {face.box.finder for face in faces if face.box is not None}
    if adapter is None or adapter.metadata.get("base") != PORTRAIT_WORLD or not finders - {LEARNED, ""}:
        return []
    return [
        "These weights draw the stylised people of the portrait world, so a photograph gives a drawing with some of "
        "the person's traits; docs/backbones.md describes bases that draw photographs."
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


def count_people(
    images: Sequence[Image.Image], people: Sequence[Sequence[Persona]], load_finder: Callable[[], FaceFinder]
) -> tuple[list[int], list[str]]:
    """Count the faces in pictures of several people.

    people: the people of each picture. load_finder: returns the finder, and is called only if it is needed. Return the
    number of faces per picture, and a warning for each picture with fewer faces than people; both are empty if no
    picture should show several people.
    """
    if all(len(persons) < 2 for persons in people):
        return [], []
    finder = load_finder()
    counts = [len(finder.find(image)) for image in images]
    warnings = [
        f"Warning: picture {number} shows {count} of {len(persons)} people; draw each person alone, or try other seeds."
        for number, (count, persons) in enumerate(zip(counts, people, strict=True), 1)
        if count < len(persons)
    ]
    return counts, warnings
