"""Train on a data set of records, with the same interface (rows, pairs, captions) as a gallery of the portrait world.

The pictures are not copied: they stay in webdataset shards or in a folder (`imagine.shards`) and are read again only to
compute latents or face crops. The position of each face is computed once and cached. A record that cannot be read, or
without a detected face, is counted by reason and never drawn. The box of a record is used only if it lies in the
picture; otherwise the face is searched.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imagine.errors import BadRecordError, ConfigError
from imagine.networks.weights import default_folder
from imagine.people.faces import FaceFinder, choose_face, default_finder
from imagine.people.photos import MAX_SIDE
from imagine.records import FaceBox
from imagine.shards.facts import BOX_OUTSIDE, box_problem
from imagine.shards.reading import Record, Records, open_records
from imagine.shards.writing import check_picture
from train.cache.rows import cache_rows
from train.run.checkpoint import write_json

log = logging.getLogger("train")
Box = tuple[float, float, float, float]  # left, top, width, height
USABLE, BROKEN, _FACELESS, _BOX_REFUSED = 0.0, 1.0, 2.0, 3.0  # the last one is usable: its face was found
_SEVERAL = 4.0  # shows several people: `train.data.recorded_groups` reads these records
SHARDS = 8  # most shards that a trial reads: a shard is read completely before its first picture
_REASONS = {BROKEN: "cannot be read", _FACELESS: "show no face"}
NAMED = 20  # most records that left_out.json names for one reason
_SAME_SHAPE = 0.03  # largest difference between the ratios of width and height of one picture, by rounding


class RecordSubset:
    """Some records of a data set, numbered anew in the order of `rows`. `name` identifies the choice in the mark."""

    def __init__(self, records: Records, rows: Sequence[int], name: str) -> None:
        self._records, self._rows, self.mark = records, list(rows), f"{records.mark}-{name}"

    @classmethod
    def first(cls, records: Records, most: int) -> "RecordSubset":
        """Return at most `most` records: those of the first pairs, then the first ones."""
        paired = [row for pair in records.pairs() for row in pair]
        rows = list(dict.fromkeys([*paired, *range(min(most, len(records)))]))[:most]
        return cls(records, rows, f"{most}-of-it")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self._records[self._rows[index]]

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def picture(self, index: int) -> Image.Image:
        """As `Records.picture`."""
        return self._records.picture(self._rows[index])

    def pairs(self) -> list[tuple[int, int]]:
        """As `Records.pairs`, for pairs whose reference and target are both in the subset."""
        here = {row: index for index, row in enumerate(self._rows)}
        return [(here[one], here[other]) for one, other in self._records.pairs() if one in here and other in here]

    @property
    def problems(self) -> dict[str, list[str]]:
        """As `Records.problems`."""
        return self._records.problems


class RecordGallery:
    """The rows of a data set, numbered as its records. Pictures of a person need not be adjacent: `pictures` is 1."""

    camera, pictures = False, 1

    def __init__(self, records: Records | RecordSubset, size: int) -> None:
        self.records, self.size = records, size
        self.usable = torch.ones(len(records), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def mark(self) -> str:
        """A fingerprint of everything that a row depends on besides its number."""
        return f"{self.records.mark}-{self.size}"

    def captions(self, rows: Tensor, caption_styles: Sequence[str]) -> list[str]:
        """Return each record's caption in the given style, or its main caption if it has none in that style."""
        records = [self.records[row] for row in rows.tolist()]
        return [
            record.captions.get(caption_style, record.caption)
            for record, caption_style in zip(records, caption_styles, strict=True)
        ]

    def name(self, row: int) -> str:
        """Return the key of a record, for messages."""
        return f"record {self.records[row].key}"

    @cached_property
    def repeats(self) -> Tensor:
        """How often each record counts in an epoch, (N,): its field `repeats`, or 1."""
        return torch.tensor([int(record.extra.get("repeats", 1)) for record in self.records], dtype=torch.long)

    def letters(self, rows: Tensor) -> Tensor:
        """Return boxes (B, 4) of width 0: records do not contain the positions of words."""
        return torch.zeros(len(rows), 4)

    def pairs(self, target: Literal["self", "other"]) -> Tensor:
        """Return rows of references and targets, (P, 2), all usable.

        "other": the pairs of `Records.pairs`; "self": every record without a reference, paired with itself. A pair
        comes as often as its target is repeated.
        """
        if target == "other":
            pairs = torch.tensor(self.records.pairs(), dtype=torch.long).view(-1, 2)
        else:
            singles = (each for each in enumerate(self.records) if len(each[1].people) < 2)
            firsts = [row for row, record in singles if record.reference is None]
            pairs = torch.tensor(firsts, dtype=torch.long)[:, None].expand(-1, 2)
        pairs = pairs[self.usable[pairs].all(1)]
        return pairs.repeat_interleave(self.repeats[pairs[:, 1]], 0)


class RecordPictures:
    """Squares of `size` pixels around the faces of a data set, and the face boxes in them."""

    def __init__(self, gallery: RecordGallery, folder: Path, finder: FaceFinder | None = None) -> None:
        self.gallery = gallery
        self._finder, self.folder = finder, folder
        self._facts = cache_rows(
            folder / "face_facts.f32", gallery, (10,), np.float32, self._find_faces, "finding faces"
        )
        self.boxes, self._frames = np.asarray(self._facts[:, :4]), np.asarray(self._facts[:, 5:9])
        self.rolls = np.asarray(self._facts[:, 9])
        gallery.usable = torch.from_numpy(np.isin(self._facts[:, 4], (USABLE, _BOX_REFUSED)))
        if left_out := self._write_left_out():
            words = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
            log.warning("%s: of %s records, %s; they are not used.", folder.name, f"{len(gallery):,}", words)
        for sentence in describe_problems(self._problems()):
            log.warning("%s: %s", folder.name, sentence)
        if several := int((self._facts[:, 4] == _SEVERAL).sum()):
            log.info("%s: %s records show several people; only groups use them.", folder.name, f"{several:,}")
        if repeated := int((gallery.repeats > 1).sum()):
            log.info("%s: %s records count several times, as their `repeats` say.", folder.name, f"{repeated:,}")

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, S, S), 0 to 1, and face boxes (B, 4); an unusable record gives a grey image."""
        boxes = torch.from_numpy(self.boxes[rows.numpy()])
        return torch.stack([self._image(row) for row in rows.tolist()]), boxes

    def frames(self, rows: Tensor) -> Tensor:
        """Return width and height of each square's original picture, and the square's left and top in it, (B, 4)."""
        return torch.from_numpy(self._frames[rows.numpy()])

    def _image(self, row: int) -> Tensor:
        if self.gallery.usable[row]:
            record = self.gallery.records[row]
            try:
                picture = self.gallery.records.picture(row)
            except BadRecordError as error:
                self._leave_out(row, error)
            else:
                square = _square(picture, _edges(self._face(picture, record)), self.gallery.size)[0]
                return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
        return torch.full((3, self.gallery.size, self.gallery.size), 0.5)

    def _leave_out(self, row: int, error: BadRecordError) -> None:
        """Mark a record as unusable that could be read when faces were detected, but no longer can."""
        log.warning("%s: a record is not used from now on: %s", self.folder.name, error)
        self.gallery.usable[row] = False
        self._facts[row, 4] = BROKEN
        self._facts.flush()
        self._write_left_out()

    def _find_faces(self, rows: Tensor) -> Tensor:
        """Return (B, 10): the face box in the square, whether the record is usable, the square's `frames`, the roll."""
        facts = torch.zeros(len(rows), 10)
        for i, row in enumerate(rows.tolist()):
            record = self.gallery.records[row]
            if len(record.people) > 1:
                facts[i, 4] = _SEVERAL
                continue
            try:
                picture = self.gallery.records.picture(row)
            except BadRecordError:
                facts[i, 4] = BROKEN
                continue
            face = self._face(picture, record)
            if face is None:
                facts[i, 4] = _FACELESS
            else:
                if record.box is not None and _placed_box(picture, record) is None:
                    facts[i, 4] = _BOX_REFUSED
                box = _edges(face)
                facts[i, :4] = torch.tensor(_square(picture, box, self.gallery.size)[1])
                shrunk = picture.width / full_width(picture, record)
                frame = (picture.width, picture.height, *_corner(picture, box))
                facts[i, 5:9] = torch.tensor([value / shrunk for value in frame])
                facts[i, 9] = face.roll
        return facts

    def _face(self, picture: Image.Image, record: Record) -> FaceBox | None:
        """Return the face in pixels of the opened picture, or None; a record's box is in pixels of the full one.

        A found face is chosen as at inference, and has landmarks if the finder gives them. A record's box has none, so
        its crop is not turned.
        """
        known = _placed_box(picture, record)
        if known is not None:
            return FaceBox(*known, score=1.0)
        if self._finder is None:
            self._finder = default_finder(default_folder() / "finder")
        found = self._finder.find(picture)
        return found[choose_face(found, "largest", picture.size)] if found else None

    def _write_left_out(self) -> dict[str, int]:
        """Write left_out.json with unusable records and other problems; return the count of the former by reason."""
        states = self._facts[:, 4]
        unusable = {words: np.flatnonzero(states == state).tolist() for state, words in _REASONS.items()}
        left_out = {words: len(rows) for words, rows in unusable.items() if rows}
        problems = self._problems()
        names = {words: [self.gallery.records[row].key for row in rows[:NAMED]] for words, rows in unusable.items()}
        names |= {reason: keys[:NAMED] for reason, keys in problems.items()}
        counts = {reason: len(keys) for reason, keys in problems.items()}
        named = {reason: keys for reason, keys in names.items() if keys}
        write_json(self.folder / "left_out.json", {"unusable": left_out, "problems": counts, "names": named})
        return left_out

    def _problems(self) -> dict[str, list[str]]:
        """Return the problems of the records by reason, also with the boxes that were refused when faces were found."""
        problems = {reason: list(keys) for reason, keys in self.gallery.records.problems.items()}
        refused = np.flatnonzero(self._facts[:, 4] == _BOX_REFUSED).tolist()
        if refused:
            problems[BOX_OUTSIDE] = [
                *problems.get(BOX_OUTSIDE, []), *(self.gallery.records[row].key for row in refused)
            ]  # fmt: skip
        return problems


def describe_problems(problems: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one sentence per reason: how many records have this problem, and the first of them."""
    return [
        f"{len(names):,} times {reason}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for reason, names in problems.items()
    ]


def open_recorded(
    address: str, size: int, folder: Path, finder: FaceFinder | None = None, most: int | None = None
) -> RecordPictures:
    """Open the data set at `address` (`imagine.shards.reading.open_records`), with squares of `size` pixels.

    With `most`, at most that number of records, from the first shards. Raises ConfigError if there is no data set, or
    if none of its records can be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = open_records(address, folder / "index", shards=None if most is None else SHARDS)
    records = found if most is None else RecordSubset.first(found, most)
    pictures = RecordPictures(RecordGallery(records, size), folder, finder)
    if not bool(pictures.gallery.usable.any()):
        raise ConfigError(f"No record of {address} can be used. See {folder / 'left_out.json'} for the reasons.")
    return pictures


def _placed_box(picture: Image.Image, record: Record) -> Box | None:
    """Return the record's box in pixels of the opened picture; None if it has none that lies in the picture."""
    if record.box is None or not same_shape(picture, record):
        return None
    scale = picture.width / full_width(picture, record)
    left, top, across, down = (value * scale for value in record.box)
    return None if box_problem((left, top, across, down), *picture.size) else (left, top, across, down)


def same_shape(picture: Image.Image, record: Record) -> bool:
    """Return whether the size in the record may be that of the picture, which is shrunk if it is very large."""
    if record.width is None or record.height is None:
        return True
    return abs(record.width * picture.height / (record.height * picture.width) - 1) <= _SAME_SHAPE


def full_width(picture: Image.Image, record: Record) -> float:
    """Return the width of the full picture: as its record says, else as its file says."""
    if record.width is not None and same_shape(picture, record):
        return record.width
    if max(picture.size) < MAX_SIDE:
        return picture.width
    try:
        return check_picture(record.key, record.read())[0]
    except BadRecordError:  # not a JPEG, PNG or WebP file
        return picture.width


def _edges(face: FaceBox | None) -> Box:
    assert face is not None, "rows without a face are not used"
    return face.left, face.top, face.width, face.height


def _square(picture: Image.Image, box: Box, size: int) -> tuple[Image.Image, Box]:
    """Return the largest square, with the face as near its centre as the picture allows, and the face box in it.

    Pixels are averaged, so that small squares of large photos do not alias.
    """
    side, (x, y) = min(picture.size), _corner(picture, box)
    square = picture.resize((size, size), Image.Resampling.BOX, (x, y, x + side, y + side))
    left, top, width, height = box
    scale = size / side
    return square, ((left - x) * scale, (top - y) * scale, width * scale, height * scale)


def _corner(picture: Image.Image, box: Box) -> tuple[float, float]:
    """Return left and top of that square in the picture."""
    side, (left, top, width, height) = min(picture.size), box
    x = min(max(left + width / 2 - side / 2, 0), picture.width - side)
    return x, min(max(top + height / 2 - side / 2, 0), picture.height - side)
