"""The people of a record that shows several: who they are in the caption and in the picture, and their references.

A caption names people as a prompt does (`imagine.request`): by `{name}` in braces, by a phrase ("the man on the left"),
or by number ("the first person"). Training reads it in the plain words that a prompt gets when a picture is drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imagine.errors import PromptError
from imagine.request import in_plain_words, number_in_words, people_in


@dataclass(frozen=True)
class RecordPerson:
    """One of several people in a record's picture; boxes and masks are in its upright orientation."""

    name: str  # as in a prompt's braces; the people of a record have different names
    phrase: str | None = None  # the words of the captions that mean this person
    box: tuple[float, float, float, float] | None = None  # left, top, width, height of the face, in pixels
    mask: Mapping[str, Any] | None = None  # run lengths (`imagine.shards.masks`) of where the person is seen
    references: tuple[str, ...] = ()  # keys of records that show this person alone
    identity: str | None = None  # the same for all pictures of a person

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that are not empty, ready for JSON."""
        plain = {**vars(self), "references": list(self.references)}
        plain |= {"box": None if self.box is None else list(self.box)}
        plain |= {"mask": None if self.mask is None else dict(self.mask)}
        return {name: value for name, value in plain.items() if value not in (None, [], "")}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "RecordPerson":
        """Return the person that `as_dict` wrote."""
        box, references = plain.get("box"), tuple(plain.get("references", ()))
        return cls(**{**plain, "box": None if box is None else tuple(box), "references": references})


@dataclass(frozen=True)
class BoundCaption:
    """A caption in plain words, and the people in the order of these words: the first person, the second person."""

    text: str
    order: tuple[int, ...]  # places in the record's list; people whom the caption does not mention come last
    mentioned: frozenset[int]  # places of the people whom it mentions


def bind_caption(caption: str, people: Sequence[RecordPerson]) -> BoundCaption:
    """Return a caption with plain words for names and phrases, and the order of the people in it.

    A caption that mentions nobody keeps its words, and the people keep the record's order.
    """
    places = tuple(range(len(people)))
    numbers = [number_in_words(person.phrase or "") for person in people]
    if None not in numbers:  # the phrases are the plain words themselves
        lowered = caption.lower()
        mentioned = frozenset(i for i in places if (people[i].phrase or "").lower() in lowered)
        return BoundCaption(caption, tuple(sorted(places, key=lambda i: numbers[i] or 0)), mentioned)
    names = [_called(person, caption) for person in people]
    try:
        found = people_in(caption, names)
        order = [*found, *(name for name in names if name not in found)]
        text = in_plain_words(caption, order)
    except PromptError:  # it mentions nobody, or has other words in braces
        return BoundCaption(caption, places, frozenset())
    mentioned = frozenset(map(names.index, found))
    if text == caption:  # it has the plain words already
        return BoundCaption(caption, places, mentioned)
    return BoundCaption(text, tuple(map(names.index, order)), mentioned)


def _called(person: RecordPerson, caption: str) -> str:
    """Return what a caption calls a person: the name if it has the name in braces, else the phrase."""
    return person.name if person.phrase is None or f"{{{person.name}}}" in caption else person.phrase
