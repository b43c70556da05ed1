"""Train on records that show several people, with the interface of a gallery: rows, captions, references, masks.

Each picture is cut to a canvas of one shape (`train.data.canvas`), so that pictures can be batched. A person is seen
where the record's mask says, or, without a mask, at least inside the face box; elsewhere it is then not known who is
seen. A person's references are
other records (`Records.groups`); the reference of a person without any is the face in the picture itself, as for single
photos. A record that cannot be used is counted by reason and never drawn.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imagine.errors import BadRecordError, ConfigError
from imagine.people.faces import FaceFinder
from imagine.shards.people import bind_caption
from imagine.shards.reading import Record, Records, open_records
from train.cache.face_crops import FaceCrops
from train.cache.latents import Codec, box_mask
from train.cache.rows import RowFormat, cache_rows, cache_rows_together
from train.data.canvas import CanvasCut
from train.data.recorded import (
    BROKEN,
    NAMED,
    SHARDS,
    USABLE,
    RecordGallery,
    RecordPictures,
    RecordSubset,
    describe_problems,
    same_shape,
)
from train.data.sources import in_order
from train.data.text_states import FrozenTextEncoder, TextStates
from train.run.checkpoint import write_json

log = logging.getLogger("train")
_BLOCK = 64  # pictures read at a time
_CUT_OFF = 5.0  # like USABLE and BROKEN
_REASONS = {BROKEN: "cannot be read", _CUT_OFF: "show people who do not fit into the canvas"}
_NO_REFERENCE = "have a person none of whose references can be used"
_FRAME, _BOXES = slice(2, 6), 6  # columns of the facts


class RecordGroupGallery:
    """The records of a data set that show `people` people, as rows; at most the first `most` of them."""

    def __init__(self, records: Records, people: int, shape: tuple[int, int], most: int | None = None) -> None:
        links = records.groups()
        fitting = [row for row, references in links.items() if len(references) == people]
        self.records, self.people, self.shape = records, people, shape
        self.rows, self.others = fitting[:most], len(links) - len(fitting)
        self.references = [links[row] for row in self.rows]  # of each row and person: indices of records

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        """The longer side of a picture in pixels."""
        return max(self.shape)

    @property
    def mark(self) -> str:
        """A fingerprint of everything that a row depends on besides its number."""
        height, width = self.shape
        return f"{self.records.mark}-{self.people}-{width}x{height}"

    def record(self, row: int) -> Record:
        """Return the record of a row."""
        return self.records[self.rows[row]]

    def name(self, row: int) -> str:
        """Return the key of a record, for messages."""
        return f"record {self.record(row).key}"

    def captions(self, rows: Tensor, caption_styles: Sequence[str]) -> list[str]:
        """Return each record's caption in the given style, in the plain words that a prompt gets."""
        each = zip(rows.tolist(), caption_styles, strict=True)
        return [bind_caption(_caption(record, style), record.people).text for record, style in self._records(each)]

    def order(self, rows: Tensor, caption_styles: Sequence[str]) -> Tensor:
        """Return the people of these records in the order of that caption, (B, P), as places in the record's list."""
        each = zip(rows.tolist(), caption_styles, strict=True)
        found = [bind_caption(_caption(record, style), record.people).order for record, style in self._records(each)]
        return torch.tensor(found).view(-1, self.people)

    def _records(self, each: Any) -> list[tuple[Record, str]]:
        return [(self.record(row), style) for row, style in each]


def _caption(record: Record, style: str) -> str:
    return record.captions.get(style, record.caption)


class RecordGroupPictures:
    """The pictures of a group gallery on their canvas, with face boxes and masks in the order of the records' lists."""

    def __init__(self, gallery: RecordGroupGallery, cells: tuple[int, int], folder: Path) -> None:
        """Read the pictures that are not cached. `cells` is the height and width of the masks."""
        self.gallery, self.cells, self.folder = gallery, cells, folder
        files: dict[Path, RowFormat] = {
            folder / "group_facts.f32": ((_BOXES + 4 * gallery.people,), np.float32),
            folder / f"group_masks-{cells[1]}x{cells[0]}.u8": ((gallery.people, *cells), np.uint8),
        }
        self.facts, self._masks = cache_rows_together(files, gallery, self._read, "reading groups", _BLOCK)

    @property
    def usable(self) -> Tensor:
        """Which rows can be drawn, (N,)."""
        return torch.from_numpy(self.facts[:, 0] == USABLE)

    def boxes(self, rows: Tensor) -> Tensor:
        """Return the face boxes on the canvas in pixels, (B, P, 4), of width 0 where a person has none."""
        return torch.from_numpy(self.facts[rows.numpy(), _BOXES:]).unflatten(1, (self.gallery.people, 4))

    def frames(self, rows: Tensor) -> Tensor:
        """Return width and height of each original picture, and the canvas's left and top in it, (B, 4)."""
        return torch.from_numpy(self.facts[rows.numpy(), _FRAME])

    def masks(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return masks (B, P, *cells) of the people, and where it is known who is seen, (B, *cells), both 0 to 1."""
        masks = torch.from_numpy(self._masks[rows.numpy()]).float() / 255
        whole = torch.from_numpy(self.facts[rows.numpy(), 1]) == 1
        return masks, torch.where(whole[:, None, None], 1.0, masks.sum(1).clamp(max=1))

    def images(self, rows: Tensor) -> Tensor:
        """Return the pictures (B, 3, H, W), 0 to 1; an unusable record gives a grey one."""
        return torch.stack([self._image(row) for row in rows.tolist()])

    def _image(self, row: int) -> Tensor:
        height, width = self.gallery.shape
        if self.facts[row, 0] == USABLE:
            try:
                picture = self.gallery.records.picture(self.gallery.rows[row])
            except BadRecordError as error:  # it could be read before
                log.warning("%s: a record is not used from now on: %s", self.folder.name, error)
                self.facts[row, 0] = BROKEN
                self.facts.flush()
            else:
                cut = CanvasCut.around(picture, self.gallery.record(row), (height, width))
                image = picture.resize((width, height), Image.Resampling.BOX, cut.edges)
                return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return torch.full((3, height, width), 0.5)

    def _read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        facts = torch.zeros(len(rows), _BOXES + 4 * self.gallery.people)
        masks = torch.zeros(len(rows), self.gallery.people, *self.cells, dtype=torch.uint8)
        for i, row in enumerate(rows.tolist()):
            record = self.gallery.record(row)
            try:
                picture = self.gallery.records.picture(self.gallery.rows[row])
            except BadRecordError:
                facts[i, 0] = BROKEN
                continue
            if not same_shape(picture, record):
                facts[i, 0] = _CUT_OFF
                continue
            cut = CanvasCut.around(picture, record, self.gallery.shape)
            seen = [cut.seen(person, self.cells) for person in record.people]
            facts[i, 0] = USABLE if all(map(cut.shows, record.people)) else _CUT_OFF
            facts[i, 1] = float(all(person.mask is not None for person in record.people))
            original = (picture.width, picture.height, *cut.edges[:2])
            facts[i, _FRAME] = torch.tensor([value / cut.shrunk for value in original])
            facts[i, _BOXES:] = torch.tensor([edge for person in record.people for edge in cut.box(person)])
            masks[i] = torch.from_numpy(np.stack(seen)).mul(255).round().byte()
        return facts, masks


class _OwnFaces:
    """The faces of people without a reference, cut from the pictures of their groups; one row each."""

    camera, pictures = False, 1

    def __init__(self, groups: RecordGroupPictures, faces: Sequence[tuple[int, int]]) -> None:
        self.groups, self.faces = groups, faces  # (row, person)
        self.gallery, self.size, self.mark = self, groups.gallery.size, f"{groups.gallery.mark}-own"

    def __len__(self) -> int:
        return len(self.faces)

    @property
    def rolls(self) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """Zeros (N,): boxes of records have no landmarks."""
        return np.zeros(len(self), np.float32)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pictures (B, 3, H, W), 0 to 1, and the boxes (B, 4) of these faces."""
        chosen = torch.tensor([self.faces[row] for row in rows.tolist()]).view(-1, 2)
        boxes = self.groups.boxes(chosen[:, 0])
        return self.groups.images(chosen[:, 0]), boxes[torch.arange(len(chosen)), chosen[:, 1]]


@dataclass(frozen=True)
class GroupTargets:
    """The targets of a batch, with the people in the order of the captions."""

    latents: Tensor  # (B, C, h, w)
    frames: Tensor  # (B, 4), as `RecordGroupPictures.frames`
    faces: Tensor  # (B, 1, h, w), 1 where a latent touches a face
    masks: Tensor  # (B, P, h, w), where each person is seen, 0 to 1
    known: Tensor  # (B, h, w), where it is known who is seen, 0 to 1


class RecordGroups:
    """The cached inputs of training for the records of one data set that show equally many people."""

    def __init__(
        self,
        gallery: RecordGroupGallery,
        size: int,
        folder: Path,
        codec: Codec,
        crop_side: int,
        text_encoders: Sequence[FrozenTextEncoder],
        finder: FaceFinder | None = None,
    ) -> None:
        """Compute what is not cached. `size` is the side of a reference's square, `crop_side` that of a face crop."""
        channels, cells, _ = codec.shape(size)
        step = size // cells
        shape = (gallery.shape[0] // step, gallery.shape[1] // step)
        self.gallery, self.codec, self.folder = gallery, codec, folder
        self.pictures = RecordGroupPictures(gallery, shape, folder)
        self._cache_references(size, crop_side, finder)
        self.latents = cache_rows(
            folder / f"latents-{codec.mark}.f16", gallery, (channels, *shape), np.float16, self._encode,
            "encoding groups",
        )  # fmt: skip
        self.sentences = TextStates(gallery, text_encoders, folder)
        self.rows = self._usable_rows()

    def read_captions(self, caption_styles: Sequence[str]) -> None:
        """Encode the captions of all usable rows in these styles, unless they are cached."""
        self.sentences.read(self.rows, caption_styles)

    def targets(self, rows: Tensor, order: Tensor) -> GroupTargets:
        """Return the targets of these rows, with the people in that order (B, P)."""
        masks, known = self.pictures.masks(rows)
        masks = masks.gather(1, order[..., None, None].expand(-1, -1, *masks.shape[2:]))
        faces = box_mask(self.pictures.boxes(rows), self.gallery.shape, (masks.shape[2], masks.shape[3]))
        latents = torch.from_numpy(self.latents[rows.numpy()]).float()
        return GroupTargets(latents, self.pictures.frames(rows), faces, masks, known)

    def crops(self, rows: Tensor, order: Tensor, draws: Tensor) -> Tensor:
        """Return the face crops (B, P, 3, S, S) of a reference of each person, in that order (B, P).

        draws: (B, P, 3), 0 to 1: which of a person's references is taken, and how far its crop is shifted.
        """
        wanted = zip(rows.repeat_interleave(order.shape[1]).tolist(), order.flatten().tolist(), strict=True)
        chosen, own = [], []
        for (row, person), draw in zip(wanted, draws[..., 0].flatten().tolist(), strict=True):
            options = self._options[row][person]
            own.append(not options)
            chosen.append(options[int(draw * len(options))] if options else self._own_rows[row, person])
        shifts, is_own, numbers = draws[..., 1:].flatten(0, 1), torch.tensor(own), torch.tensor(chosen)
        here = [where.nonzero().squeeze(1) for where in (~is_own, is_own)]
        pieces = [
            faces.take(numbers[some], shifts[some])
            for faces, some in zip((self._portraits, self._own), here, strict=True)
            if faces is not None and len(some)
        ]
        return in_order([some for some in here if len(some)], pieces).unflatten(0, order.shape)

    def _cache_references(self, size: int, crop_side: int, finder: FaceFinder | None) -> None:
        """Cache the face crops of all references, and of the people without one."""
        named = sorted({number for people in self.gallery.references for person in people for number in person})
        usable, self._portraits = {}, None
        if named:
            digest = hashlib.sha256(str(named).encode()).hexdigest()[:8]
            subset = RecordSubset(self.gallery.records, named, f"references-{digest}")
            pictures = RecordPictures(RecordGallery(subset, size), self.folder / "references", finder)
            self._portraits = FaceCrops(pictures, crop_side, self.folder / "references", noisy=True)
            usable = {number: row for row, number in enumerate(named) if pictures.gallery.usable[row]}
        self._options = [
            [[usable[number] for number in person if number in usable] for person in people]
            for people in self.gallery.references
        ]
        faces = [
            (row, person)
            for row, people in enumerate(self.gallery.references)
            for person in range(self.gallery.people)
            if not people[person]
        ]
        self._own_rows = {face: number for number, face in enumerate(faces)}
        own = _OwnFaces(self.pictures, faces)
        self._own = FaceCrops(own, crop_side, self.folder / "own", noisy=False) if faces else None

    def _encode(self, rows: Tensor) -> Tensor:
        return torch.cat([self.codec.encode(self.pictures.images(row) * 2 - 1).half().cpu() for row in rows.split(1)])

    def _usable_rows(self) -> Tensor:
        """Return the rows that can be drawn, and report the others."""
        found = [
            all(options or not named for options, named in zip(*each, strict=True))
            for each in zip(self._options, self.gallery.references, strict=True)
        ]
        usable = self.pictures.usable
        lacking = [row for row, there in enumerate(found) if bool(usable[row]) and not there]
        self._report(lacking)
        usable[lacking] = False
        return usable.nonzero().squeeze(1)

    def _report(self, lacking: Sequence[int]) -> None:
        """Write left_out.json, and log how many records are left out and why."""
        rows = {words: np.flatnonzero(self.pictures.facts[:, 0] == state).tolist() for state, words in _REASONS.items()}
        rows = {words: some for words, some in {**rows, _NO_REFERENCE: list(lacking)}.items() if some}
        problems, gallery = self.gallery.records.problems, self.gallery
        names = {words: [gallery.record(row).key for row in some[:NAMED]] for words, some in rows.items()}
        names |= {reason: keys[:NAMED] for reason, keys in problems.items()}
        counts = {words: len(some) for words, some in rows.items()}
        problem_counts = {reason: len(keys) for reason, keys in problems.items()}
        write_json(
            self.folder / "left_out.json",
            {"unusable": counts, "other number of people": gallery.others, "problems": problem_counts, "names": names},
        )
        if counts:
            words = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
            log.warning("%s: of %s records, %s; they are not used.", self.folder.name, f"{len(gallery):,}", words)
        if gallery.others:
            text = "%s: %s records show several people, but not %d; they are not used."
            log.info(text, self.folder.name, f"{gallery.others:,}", gallery.people)
        for sentence in describe_problems(problems) if self._portraits is None else ():  # else it is logged already
            log.warning("%s: %s", self.folder.name, sentence)


def open_record_groups(
    address: str, people: int, shape: tuple[int, int], folder: Path, most: int | None = None
) -> RecordGroupGallery:
    """Open the records at `address` that show so many people, on a canvas of `shape` (height, width) pixels.

    With `most`, at most that number of them, from the first shards. Raises ConfigError if there are none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = open_records(address, folder / "index", shards=None if most is None else SHARDS)
    gallery = RecordGroupGallery(records, people, shape, most)
    if not len(gallery):
        raise ConfigError(
            f"No record of {address} shows {people} people: check the field `people` of the records (docs/data.md), or "
            "the number of people of the group."
        )
    return gallery
