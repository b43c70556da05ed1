"""Check the metadata of a record and bring it into the types of `Record`; every refused value is counted with a reason.

A refused value counts as missing: a record without a box gets the box that a face finder finds.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from imagine.request import MOST_PEOPLE
from imagine.shards.masks import is_mask_of
from imagine.shards.people import RecordPerson, bind_caption
from imagine.shards.texts import parse_json, unicode_text

FIELDS = ("key", "caption", "captions", "identity", "reference", "box", "source", "width", "height")  # in our JSON
PICTURES = (
    "jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jp2",
)  # fmt: skip
PEOPLE = "people"  # a further field of our JSON: the people of a picture that shows several
TEXTS = ("txt", "caption")
PICTURE_ENDING = re.compile(rf"\.({'|'.join(PICTURES)})$", re.IGNORECASE)

BOX_NOT_NUMBERS = "a box that is not four numbers"
BOX_EMPTY = "a box that is smaller than 2 pixels"
BOX_OUTSIDE = "a box outside the picture"
NO_CAPTION = "a record without a caption"
NO_PICTURE = "a record without a picture"
BAD_JSON = "JSON that cannot be read"
BAD_ENCODING = "a caption whose encoding is not known"
TOO_LONG = "a caption or JSON of more than 16 MiB"
USED_TWICE = "a key that is used twice"
UNREAD_FIELD = "a file of a record that is not read"
UNREAD_FILE = "a file that belongs to no record"
UNREAD_SPLIT = "a split that is not read"
BAD_CAPTION = "a caption that is not a text"
BAD_CAPTIONS = "captions that are not texts by style"
BAD_IDENTITY = "an identity that is not a name"
BAD_REFERENCE = "a reference that is not a name"
BAD_SOURCE = "a source that is not a word"
BAD_WIDTH = "a width that is not a number of pixels"
BAD_HEIGHT = "a height that is not a number of pixels"
BAD_LANDMARKS = "landmarks that are not points in the picture"
BAD_REPEATS = "repeats that are not a number from 1 to 1000"
BAD_PEOPLE = "people that are not a list of objects"
BAD_NAME = "a name or a phrase of a person that is not a text"
BAD_MASK = "a mask that is not run lengths in the shape of the picture"
UNMENTIONED = "a person whom no caption mentions"
TOO_MANY_PEOPLE = f"a record of more than {MOST_PEOPLE} people"
SAME_NAME = "a record with two people of one name or phrase"
NOT_PLACED = "a record with a person who has neither a box nor a mask"
# Problems with one value or with one further file; the record itself is read.
RECORD_IS_READ = frozenset({
    BOX_NOT_NUMBERS, BOX_EMPTY, BOX_OUTSIDE, BAD_CAPTION, BAD_CAPTIONS, BAD_IDENTITY, BAD_REFERENCE, BAD_SOURCE,
    BAD_WIDTH, BAD_HEIGHT, BAD_LANDMARKS, BAD_REPEATS, BAD_PEOPLE, BAD_NAME, BAD_MASK, UNMENTIONED,
    BAD_ENCODING, UNREAD_FIELD, UNREAD_FILE, UNREAD_SPLIT,
})  # fmt: skip

SMALLEST_BOX = 2.0  # pixels; boxes in shares of the picture, 0 to 1, are smaller and would give a crop of one colour
_LEAST_INSIDE = 0.5  # share of a box that must lie inside the picture
MOST_REPEATS = 1000
_LARGEST_SIDE = 1 << 20  # pixels

Problems = dict[str, list[str]]  # reason -> keys


def add_problem(problems: Problems, reason: str, key: str) -> None:
    """Add a key to the list of keys with this problem."""
    names = problems.setdefault(reason, [])
    if key not in names[-1:]:  # the members of one record are consecutive
        names.append(key)


def normalised_facts(text: str, facts: Mapping[str, Any], key: str, problems: Problems) -> dict[str, Any]:
    """Return the metadata with the names and types of `Record`; add a problem for every value that is refused.

    `text` is the short caption beside the JSON. If the JSON has another caption, `text` becomes the terse one. The
    entry `people` is missing if there are none, and None if the record must be left out because of them.
    """

    def checked(name: str, check: Callable[[Any], Any], reason: str) -> Any:
        value = facts.get(name)
        if value is None or value == "" or _is_nan(value):  # tables write NaN for a missing value
            return None
        found = check(value)
        if found is None:
            add_problem(problems, reason, key)
        return found

    captions = checked("captions", _captions, BAD_CAPTIONS) or {}
    main = checked("caption", lambda value: unicode_text(value) if isinstance(value, str) else None, BAD_CAPTION)
    caption = main or captions.get("dense") or text or next(iter(captions.values()), "")
    if text and text != caption:
        captions.setdefault("terse", text)
    width, height = checked("width", _side, BAD_WIDTH), checked("height", _side, BAD_HEIGHT)
    extra = {name: value for name, value in facts.items() if name not in FIELDS}
    for name, check, reason in (
        ("repeats", _repeats, BAD_REPEATS),
        ("landmarks", lambda value: _landmarks(value, width, height), BAD_LANDMARKS),
    ):
        if name in extra and (found := checked(name, check, reason)) is None:
            del extra[name]
        elif name in extra:
            extra[name] = found
    row = {
        "caption": caption,
        "captions": captions,
        "identity": checked("identity", _name, BAD_IDENTITY),
        "reference": checked("reference", _name, BAD_REFERENCE),
        "box": _box(facts.get("box"), width, height, key, problems),
        "source": checked("source", lambda value: unicode_text(value) or None, BAD_SOURCE) or "",
        "width": width,
        "height": height,
        "extra": extra,
    }
    return row if facts.get(PEOPLE) in (None, "", []) else _with_people(row, key, problems)


def _with_people(row: dict[str, Any], key: str, problems: Problems) -> dict[str, Any]:
    """Return the metadata with the people that `extra` lists, checked; the values of one person are the record's."""
    given = row["extra"][PEOPLE]
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        add_problem(problems, BAD_PEOPLE, key)
        return row
    extra = {name: value for name, value in row["extra"].items() if name != PEOPLE}
    people = [_person(one, number, row["width"], row["height"], key, problems) for number, one in enumerate(given, 1)]
    if len(people) == 1:
        (one,) = people
        own = {
            "box": None if one.box is None else list(one.box),
            "identity": one.identity,
            "reference": next(iter(one.references), None),
        }
        row |= {name: value for name, value in own.items() if row[name] is None}
    elif (reason := _people_problem(people)) is not None:
        add_problem(problems, reason, key)
        return {**row, "extra": extra, PEOPLE: None}
    elif not all(_mentioned(people, [row["caption"], *row["captions"].values()])):
        add_problem(problems, UNMENTIONED, key)
    return {**row, "extra": extra, PEOPLE: [one.as_dict() for one in people]}


def _person(
    given: Mapping[str, Any], number: int, width: int | None, height: int | None, key: str, problems: Problems
) -> RecordPerson:
    """Return one person of a record. A value that is refused counts as missing; the default name is the number."""
    words: dict[str, str | None] = {}
    for name in ("name", "phrase"):
        value = given.get(name)
        words[name] = _name(value) if value not in (None, "") else None
        if (words[name] is None and value not in (None, "")) or re.search(r"[{}|]", words[name] or ""):
            add_problem(problems, BAD_NAME, key)
            words[name] = None
    listed = given.get("references", given.get("reference"))
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    references = [_name(value) for value in listed]
    identity = given.get("identity")
    mask = given["mask"] if is_mask_of(given.get("mask"), width, height) else None
    for reason, wrong in (
        (BAD_REFERENCE, None in references),
        (BAD_IDENTITY, identity is not None and _name(identity) is None),
        (BAD_MASK, mask is None and given.get("mask") is not None),
    ):
        if wrong:
            add_problem(problems, reason, key)
    box = _box(given.get("box"), width, height, key, problems)
    return RecordPerson(
        words["name"] or words["phrase"] or str(number),
        words["phrase"],
        None if box is None else (box[0], box[1], box[2], box[3]),
        None if mask is None else {"size": mask["size"], "counts": mask["counts"]},
        tuple(filter(None, references)),
        None if identity is None else _name(identity),
    )


def _people_problem(people: Sequence[RecordPerson]) -> str | None:
    """Return why a record of several people must be left out; None if it can be used."""
    if len(people) > MOST_PEOPLE:
        return TOO_MANY_PEOPLE
    for words in ([one.name for one in people], [one.phrase for one in people if one.phrase]):
        if len({word.lower() for word in words}) < len(words):
            return SAME_NAME
    return NOT_PLACED if any(one.box is None and one.mask is None for one in people) else None


def _mentioned(people: Sequence[RecordPerson], texts: Sequence[str]) -> list[bool]:
    """Return which of the people at least one of the captions mentions."""
    mentioned = frozenset[int]().union(*(bind_caption(text, people).mentioned for text in texts if text))
    return [number in mentioned for number in range(len(people))]


def box_problem(box: Sequence[float], width: float | None, height: float | None) -> str:
    """Return what is wrong with a box of four finite numbers in a picture of this size, or an empty string.

    At least half of the box must lie inside the picture. Without a size, only the part left of or above it is known.
    """
    left, top, across, down = box
    if min(across, down) < SMALLEST_BOX:
        return BOX_EMPTY
    inside_x = min(left + across, math.inf if width is None else width) - max(left, 0)
    inside_y = min(top + down, math.inf if height is None else height) - max(top, 0)
    inside = max(inside_x, 0) * max(inside_y, 0)
    return BOX_OUTSIDE if inside < _LEAST_INSIDE * across * down else ""


def of_table(row: Mapping[str, str | None]) -> dict[str, Any]:
    """Return a row of a CSV file as metadata: numbers, lists and objects are parsed where a field is not a text."""
    facts: dict[str, Any] = {}
    for name, value in row.items():
        if name and value:
            structured = name in ("width", "height", "repeats") or value[:1] in "[{"
            parsed = parse_json(value) if structured else None
            facts[name] = value if parsed is None else parsed
    return facts


def _box(value: Any, width: int | None, height: int | None, key: str, problems: Problems) -> list[float] | None:
    if value is None:
        return None
    numbers = _numbers(value)
    reason = BOX_NOT_NUMBERS if numbers is None or len(numbers) != 4 else box_problem(numbers, width, height)
    if reason:
        add_problem(problems, reason, key)
        return None
    return numbers


def _numbers(value: object) -> list[float] | None:
    """Return a list of finite numbers, or None."""
    if not isinstance(value, (list, tuple)):
        return None
    numbers = [number for one in value if (number := _number(one)) is not None]
    return numbers if len(numbers) == len(value) else None


def _number(value: object) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _landmarks(value: object, width: int | None, height: int | None) -> Any:
    """Return the landmarks unchanged if they are points (x, y) whose middle lies in the picture, else None."""
    points = [_numbers(point) for point in value] if isinstance(value, (list, tuple)) else []
    known = [point for point in points if point is not None and len(point) == 2]
    if not known or len(known) != len(points):
        return None
    for axis, side in enumerate((width, height)):
        middle = sum(point[axis] for point in known) / len(known)
        if middle < 0 or (side is not None and middle > side):
            return None
    return value


def _captions(value: object) -> dict[str, str] | None:
    if not isinstance(value, dict) or not all(isinstance(word, str) or word is None for word in value.values()):
        return None
    return {name: text for name, word in value.items() if (text := unicode_text(word))}


def _name(value: object) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    if isinstance(value, float):  # a table with missing values stores whole numbers so
        return str(int(value)) if value.is_integer() else None
    return unicode_text(str(value)) or None


def _side(value: object) -> int | None:
    number = _number(value)
    whole = number is not None and number.is_integer() and 0 < number <= _LARGEST_SIDE
    return int(number) if whole and number is not None else None


def _repeats(value: object) -> int | None:
    number = _side(value)
    return number if number is not None and number <= MOST_REPEATS else None


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
