"""Train on a data set of records, with the same interface (rows, pairs, captions) as a gallery of the portrait world.

The pictures are not copied: they stay in webdataset shards or in a folder (`imagine.shards`) and are read again only to
compute latents or face crops. The position of each face is computed once and cached. A record that cannot be read, or
without a detected face, is counted by reason and never drawn.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imagine.errors import BadRecordError, ConfigError
from imagine.networks.weights import default_folder
from imagine.people.faces import FaceFinder, default_finder
from imagine.shards.reading import Record, Records, open_records
from train.cache.rows import cache_rows
from train.run.checkpoint import write_json

log = logging.getLogger("train")
Box = tuple[float, float, float, float]  # left, top, width, height
_USABLE, _BROKEN, _FACELESS = 0.0, 1.0, 2.0
_SHARDS = 8  # most shards that a trial reads: a shard is read completely before its first picture
_REASONS = {_BROKEN: "cannot be read", _FACELESS: "show no face"}


class RecordSubset:
    """At most `most` records of a data set, numbered anew: the records of the first pairs, then the first records."""

    def __init__(self, records: Records, most: int) -> None:
        self._records, self.mark = records, f"{records.mark}-{most}-of-it"
        paired = [row for pair in records.pairs() for row in pair]
        self._rows = list(dict.fromkeys([*paired, *range(min(most, len(records)))]))[:most]

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

    def letters(self, rows: Tensor) -> Tensor:
        """Return boxes (B, 4) of width 0: records do not contain the positions of words."""
        return torch.zeros(len(rows), 4)

    def pairs(self, target: Literal["self", "other"]) -> Tensor:
        """Return rows of references and targets, (P, 2), all usable.

        "other": the pairs of `Records.pairs`; "self": every record without a reference, paired with itself.
        """
        if target == "other":
            pairs = torch.tensor(self.records.pairs(), dtype=torch.long).view(-1, 2)
            return pairs[self.usable[pairs].all(1)]
        firsts = torch.tensor([row for row, record in enumerate(self.records) if record.reference is None])
        firsts = firsts.long()[self.usable[firsts.long()]]
        return torch.stack((firsts, firsts), 1)


class RecordPictures:
    """Squares of `size` pixels around the faces of a data set, and the face boxes in them."""

    def __init__(self, gallery: RecordGallery, folder: Path, finder: FaceFinder | None = None) -> None:
        self.gallery = gallery
        self._finder, self.folder = finder, folder
        self._facts = cache_rows(
            folder / "faces_and_frames.f32", gallery, (9,), np.float32, self._find_faces, "finding faces"
        )
        self.boxes, self._frames = np.asarray(self._facts[:, :4]), np.asarray(self._facts[:, 5:])
        gallery.usable = torch.from_numpy(self._facts[:, 4] == _USABLE)
        if left_out := self._write_left_out():
            words = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
            log.warning("%s: of %s records, %s; they are not used.", folder.name, f"{len(gallery):,}", words)

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
                square = _square(picture, self._box(picture, record.box, record.width), self.gallery.size)[0]
                return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
        return torch.full((3, self.gallery.size, self.gallery.size), 0.5)

    def _leave_out(self, row: int, error: BadRecordError) -> None:
        """Mark a record as unusable that could be read when faces were detected, but no longer can."""
        log.warning("%s: a record is not used from now on: %s", self.folder.name, error)
        self.gallery.usable[row] = False
        self._facts[row, 4] = _BROKEN
        self._facts.flush()
        self._write_left_out()

    def _find_faces(self, rows: Tensor) -> Tensor:
        """Return (B, 9): the face box in the square, whether the record is usable, and the square's `frames`."""
        facts = torch.zeros(len(rows), 9)
        for i, row in enumerate(rows.tolist()):
            record = self.gallery.records[row]
            try:
                picture = self.gallery.records.picture(row)
            except BadRecordError:
                facts[i, 4] = _BROKEN
                continue
            box = self._box(picture, record.box, record.width)
            if box is None:
                facts[i, 4] = _FACELESS
            else:
                facts[i, :4] = torch.tensor(_square(picture, box, self.gallery.size)[1])
                shrunk = picture.width / record.width if record.width else 1.0
                frame = (picture.width, picture.height, *_corner(picture, box))
                facts[i, 5:] = torch.tensor([value / shrunk for value in frame])
        return facts

    def _box(self, picture: Image.Image, known: Box | None, width: int | None) -> Box | None:
        """Return the face box in pixels of the opened picture, or None; a record's box is in pixels of the full one."""
        if known is not None:
            scale = picture.width / width if width else 1.0
            left, top, across, down = (value * scale for value in known)
            return left, top, across, down
        if self._finder is None:
            self._finder = default_finder(default_folder() / "finder")
        found = self._finder.find(picture)
        return (found[0].left, found[0].top, found[0].width, found[0].height) if found else None

    def _write_left_out(self) -> dict[str, int]:
        """Write left_out.json with the number of unusable records and other problems; return the former by reason."""
        states = Counter(self._facts[:, 4].tolist())
        left_out = {words: states[state] for state, words in _REASONS.items() if states[state]}
        problems = {reason: len(names) for reason, names in self.gallery.records.problems.items()}
        write_json(self.folder / "left_out.json", {"unusable": left_out, "problems": problems})
        return left_out


def open_recorded(
    address: str, size: int, folder: Path, finder: FaceFinder | None = None, most: int | None = None
) -> RecordPictures:
    """Open the data set at `address` (`imagine.shards.reading.open_records`), with squares of `size` pixels.

    With `most`, at most that number of records, from the first shards. Raises ConfigError if there is no data set, or
    if none of its records can be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = open_records(address, folder / "index", shards=None if most is None else _SHARDS)
    records = found if most is None else RecordSubset(found, most)
    pictures = RecordPictures(RecordGallery(records, size), folder, finder)
    if not bool(pictures.gallery.usable.any()):
        raise ConfigError(f"No record of {address} can be used. See {folder / 'left_out.json'} for the reasons.")
    return pictures


def _square(picture: Image.Image, box: Box | None, size: int) -> tuple[Image.Image, Box]:
    """Return the largest square, with the face as near its centre as the picture allows, and the face box in it.

    Pixels are averaged, so that small squares of large photos do not alias.
    """
    assert box is not None, "rows without a box are not used"
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
