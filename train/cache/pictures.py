"""Cached renders for training: rendered once and stored on disk; an interrupted rendering is resumed.

A gallery is `identities` people with `pictures` pictures each. The first picture of a person is the real one; the
others show an identity that has drifted a little, as a generator of synthetic pairs (SynPairs) would make them. People
and contexts are not stored: both are pure functions of the row number.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from imagine.world import (
    VERSION,
    Contexts,
    People,
    captions,
    drift,
    give_words,
    render,
    sample_contexts,
    sample_people,
)
from imagine.world.body import letter_boxes
from imagine.world.render import Painters, compiled_painters
from imagine.world.seeds import HELD_OUT, JUDGE, SECOND_JUDGE, TRAIN
from train.cache.rows import RowFormat, cache_rows_together
from train.run.checkpoint import write_json

SPLITS = {"train": TRAIN, "judge": JUDGE, "second judge": SECOND_JUDGE, "held out": HELD_OUT}
BLOCK = 512  # pictures rendered and stored at a time
WORTH_COMPILING = 2_000  # pictures to render from which compiling saves more time than it takes


@dataclass(frozen=True)
class Gallery:
    """`identities` x `pictures` renders of `size` pixels, of people from one seed range (a split).

    With `camera`, each person's first picture, the real one, gets the noise of a cheap camera. With `words`, all other
    pictures show a word on the clothes.
    """

    split: str  # one of SPLITS
    identities: int
    pictures: int
    size: int = 128
    drift: float = 0.06
    first: int = 0  # number of the first person within the split
    camera: bool = True
    words: bool = False

    def __len__(self) -> int:
        return self.identities * self.pictures

    @property
    def first_seed(self) -> int:
        return SPLITS[self.split].start + self.first

    @property
    def mark(self) -> str:
        """Eight hexadecimal digits: a fingerprint of everything that a row depends on besides its number."""
        # Only values that are not the default, so that a new field does not change the marks of files on disk.
        plain = Gallery("", self.identities, 0)
        facts = {name: value for name, value in asdict(self).items() if value != getattr(plain, name)}
        facts["world"] = VERSION
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]

    def people(self, rows: Tensor) -> People:
        """Return the people in these rows, with drift in all but each person's first picture."""
        people = sample_people([self.first_seed + int(i) for i in rows // self.pictures])
        moved = drift(people, [self.first_seed + int(i) for i in rows], self.drift)
        real = rows % self.pictures == 0
        names = People.__dataclass_fields__
        return moved.replace(**{n: torch.where(real, getattr(people, n), getattr(moved, n)) for n in names})

    def contexts(self, rows: Tensor) -> Contexts:
        numbers = [self.first_seed + int(i) for i in rows]
        contexts = sample_contexts(numbers)
        return give_words(contexts, numbers, rows % self.pictures != 0) if self.words else contexts

    def letters(self, rows: Tensor) -> Tensor:
        """Return the boxes of the words on shirts in pixels (B, 4), of width 0 where there is none."""
        return letter_boxes(self.contexts(rows), self.size)

    def captions(self, rows: Tensor, caption_styles: Sequence[str]) -> list[str]:
        """Return each picture's caption in the given style; it is the same at every call."""
        people, contexts = self.people(rows), self.contexts(rows)
        texts = [""] * len(rows)
        for caption_style in set(caption_styles):
            mine = [i for i, name in enumerate(caption_styles) if name == caption_style]
            for i, text in zip(
                mine, captions(people[mine], contexts[mine], caption_style, rows[mine].tolist()), strict=True
            ):
                texts[i] = text
        return texts

    def name(self, row: int) -> str:
        """Return the name of a row in messages."""
        return f"picture {row}"

    def pairs(self, target: Literal["self", "other"]) -> Tensor:
        """Return rows of references and targets, (P, 2): each real picture with itself, or with the person's others."""
        firsts = torch.arange(self.identities) * self.pictures
        if target == "self":
            return torch.stack((firsts, firsts), 1)
        others = torch.arange(1, self.pictures)
        return torch.stack(torch.broadcast_tensors(firsts[:, None], firsts[:, None] + others), 2).flatten(0, 1)


class AnyGallery(Protocol):
    """The interface of a gallery for the denoiser's stages, of the portrait world or of a data set."""

    @property
    def size(self) -> int:
        """Side of a picture in pixels."""
        ...

    @property
    def pictures(self) -> int:
        """Number of consecutive pictures of one person; the first is the real one."""
        ...

    @property
    def camera(self) -> bool:
        """Whether real pictures get the noise of a cheap camera."""
        ...

    @property
    def mark(self) -> str:
        """A fingerprint of everything that a row depends on besides its number."""
        ...

    def __len__(self) -> int: ...

    def captions(self, rows: Tensor, caption_styles: Sequence[str]) -> list[str]:
        """Return each picture's caption in the given style; it is the same at every call."""
        ...

    def letters(self, rows: Tensor) -> Tensor:
        """Return the boxes of words in pixels (B, 4), of width 0 where there is none or its position is unknown."""
        ...

    def name(self, row: int) -> str:
        """Return the name of a row in messages."""
        ...

    def pairs(self, target: Literal["self", "other"]) -> Tensor:
        """Return rows of references and targets, (P, 2)."""
        ...


class FaceGallery(Protocol):
    """The interface of a gallery whose faces are cut out; its properties are those of `AnyGallery`."""

    @property
    def size(self) -> int: ...

    @property
    def pictures(self) -> int: ...

    @property
    def camera(self) -> bool: ...

    @property
    def mark(self) -> str: ...

    def __len__(self) -> int: ...


class FacePictures(Protocol):
    """Pictures with one face each, indexed by row number."""

    @property
    def gallery(self) -> FaceGallery: ...

    @property
    def rolls(self) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """The angle of each face's eye line in radians (N,), as `FaceBox.roll`; 0 where crops are not turned."""
        ...

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, H, W), 0 to 1, and face boxes (B, 4)."""
        ...


class AnyPictures(Protocol):
    """The pictures of a gallery, indexed by row number, and the face box in each, in pixels (N, 4)."""

    @property
    def gallery(self) -> AnyGallery: ...

    @property
    def boxes(self) -> "np.ndarray[Any, np.dtype[np.float32]]": ...

    @property
    def rolls(self) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """The angle of each face's eye line in radians (N,), as `FaceBox.roll`; 0 where crops are not turned."""
        ...

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, S, S), 0 to 1, and face boxes (B, 4)."""
        ...

    def frames(self, rows: Tensor) -> Tensor:
        """Return width and height of each square's original picture, and the square's left and top in it, (B, 4)."""
        ...


@dataclass(frozen=True)
class Pictures:
    """A gallery on disk: `images` (N, 3, S, S) uint8 and `boxes` (N, 4), both memory-mapped."""

    gallery: Gallery
    images: "np.memmap[tuple[int, ...], np.dtype[np.uint8]]"
    boxes: "np.memmap[tuple[int, ...], np.dtype[np.float32]]"

    @property
    def rolls(self) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """Zeros (N,): the finder of drawings gives no landmarks, so crops of drawings are not turned."""
        return np.zeros(len(self.gallery), np.float32)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, S, S), 0 to 1, and face boxes (B, 4)."""
        index = rows.numpy()
        return torch.from_numpy(self.images[index]).float().div_(255), torch.from_numpy(self.boxes[index])

    def frames(self, rows: Tensor) -> Tensor:
        """Return the size of the render, which is already square, and left and top 0, (B, 4) pixels."""
        side = float(self.gallery.size)
        return torch.tensor([side, side, 0.0, 0.0]).expand(len(rows), 4)


def open_pictures(gallery: Gallery, folder: Path) -> Pictures:
    """Render the pictures that are missing in `folder`, and map the gallery's files."""
    size, images, boxes = gallery.size, folder / "images.u8", folder / "boxes.f32"
    _migrate_state(folder / "done.json", images.with_suffix(".json"))
    formats: dict[Path, RowFormat] = {images: ((3, size, size), np.uint8), boxes: ((4,), np.float32)}
    rows = cache_rows_together(formats, gallery, _Renderer(gallery), f"rendering {gallery.split}", BLOCK)
    return Pictures(gallery, *rows)


class _Renderer:
    """Renders rows of a gallery, with compiled painters if many pictures are missing at the first call."""

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery
        self.painters: Painters | None = None

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, S, S) uint8, and face boxes (B, 4)."""
        if self.painters is None:
            many = len(self.gallery) - int(rows[0]) >= WORTH_COMPILING
            self.painters = compiled_painters() if many else Painters()
        out = render(self.gallery.people(rows), self.gallery.contexts(rows), self.gallery.size, self.painters)
        return (out.images * 255).round().byte(), out.boxes


def _migrate_state(old: Path, new: Path) -> None:
    """Convert the state file of an earlier version to the format of `train.cache.rows`."""
    if not old.exists():
        return
    known = json.loads(old.read_text(encoding="utf-8"))
    gallery, blocks = Gallery(**known["gallery"]), set(known["blocks"])
    rows = next(start for start in itertools.count(0, BLOCK) if start not in blocks)
    write_json(new, {"gallery": gallery.mark, "rows": min(rows, len(gallery))})
    old.unlink()
