"""The rendered pictures that training reads: made once, kept on disk, carried on after any interruption.

A gallery is `identities` people with `pictures` pictures each. The first picture of a person is the real one; the
others are drawn of somebody who has drifted a little, as a generator of synthetic pairs would (DESIGN: SynPairs). Who
and how is not stored: both are pure functions of the row number.
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

from imagine.world import Contexts, People, captions, drift, render, sample_contexts, sample_people
from imagine.world.body import letter_boxes
from imagine.world.render import Painters, compiled_painters
from imagine.world.seeds import HELD_OUT, JUDGE, TRAIN
from train.cache.rows import RowFormat, cache_rows_together
from train.run.checkpoint import write_json

BLOCK = 512  # pictures rendered and stored at a time
_WORTH_COMPILING = 2_000  # pictures; for fewer, compiling takes longer than it saves


@dataclass(frozen=True)
class Gallery:
    """`identities` x `pictures` renders of `size` pixels of people from one seed range (a split).

    With `camera` each person's first picture, the real one, is seen as a cheap camera takes it.
    """

    split: str  # "train", "judge" or "held out"
    identities: int
    pictures: int
    size: int = 128
    drift: float = 0.06
    first: int = 0  # people of the split that come before these
    camera: bool = True

    def __len__(self) -> int:
        return self.identities * self.pictures

    @property
    def first_seed(self) -> int:
        return {"train": TRAIN, "judge": JUDGE, "held out": HELD_OUT}[self.split].start + self.first

    @property
    def mark(self) -> str:
        """Eight hexadecimal digits for what a row depends on besides its number."""
        # Only what is not the default, so that a new field leaves the marks of what is on disk alone.
        plain = Gallery("", self.identities, 0)
        facts = {name: value for name, value in asdict(self).items() if value != getattr(plain, name)}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]

    def people(self, rows: Tensor) -> People:
        """Who is in these rows, drifted in all but each person's first picture."""
        people = sample_people([self.first_seed + int(i) for i in rows // self.pictures])
        moved = drift(people, [self.first_seed + int(i) for i in rows], self.drift)
        real = rows % self.pictures == 0
        names = People.__dataclass_fields__
        return moved.replace(**{n: torch.where(real, getattr(people, n), getattr(moved, n)) for n in names})

    def contexts(self, rows: Tensor) -> Contexts:
        return sample_contexts([self.first_seed + int(i) for i in rows])

    def letters(self, rows: Tensor) -> Tensor:
        """Where the words on the shirts are, in pixels (B, 4), of no width where there is none."""
        return letter_boxes(self.contexts(rows), self.size)

    def captions(self, rows: Tensor, caption_styles: Sequence[str]) -> list[str]:
        """Each picture's caption in the manner given for it, always the same one."""
        people, contexts = self.people(rows), self.contexts(rows)
        texts = [""] * len(rows)
        for caption_style in set(caption_styles):
            mine = [i for i, name in enumerate(caption_styles) if name == caption_style]
            for i, text in zip(
                mine, captions(people[mine], contexts[mine], caption_style, rows[mine].tolist()), strict=True
            ):
                texts[i] = text
        return texts

    def pairs(self, target: Literal["self", "other"]) -> Tensor:
        """Rows of all references with their targets, (P, 2): each real picture with itself, or with its SynPairs."""
        firsts = torch.arange(self.identities) * self.pictures
        if target == "self":
            return torch.stack((firsts, firsts), 1)
        others = torch.arange(1, self.pictures)
        return torch.stack(torch.broadcast_tensors(firsts[:, None], firsts[:, None] + others), 2).flatten(0, 1)


class AnyGallery(Protocol):
    """What the denoiser's stages need to know of a gallery, the world's or a data set's."""

    @property
    def size(self) -> int:
        """Pixels of a picture's side."""
        ...

    @property
    def pictures(self) -> int:
        """How many pictures of one person follow each other; the first is the real one."""
        ...

    @property
    def camera(self) -> bool:
        """Whether the real ones are to be seen as a cheap camera takes them."""
        ...

    @property
    def mark(self) -> str:
        """Digits for what a row depends on besides its number."""
        ...

    def __len__(self) -> int: ...

    def captions(self, rows: Tensor, caption_styles: Sequence[str]) -> list[str]:
        """Each picture's caption in the manner given for it, always the same one."""
        ...

    def letters(self, rows: Tensor) -> Tensor:
        """Where words to be read are, in pixels (B, 4), of no width where there is none or nobody knows."""
        ...

    def pairs(self, target: Literal["self", "other"]) -> Tensor:
        """Rows of references with their targets, (P, 2)."""
        ...


class AnyPictures(Protocol):
    """The pictures of a gallery behind their row numbers, and where the face is in each, in pixels (N, 4)."""

    @property
    def gallery(self) -> AnyGallery: ...

    @property
    def boxes(self) -> "np.ndarray[Any, np.dtype[np.float32]]": ...

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S), 0 to 1, and face boxes (B, 4)."""
        ...

    def frames(self, rows: Tensor) -> Tensor:
        """Width and height of the picture each square was cut from, and its left and top there, in pixels, (B, 4)."""
        ...


@dataclass(frozen=True)
class Pictures:
    """A gallery on disk: `images` (N, 3, S, S) uint8 and `boxes` (N, 4), both memory-mapped."""

    gallery: Gallery
    images: "np.memmap[tuple[int, ...], np.dtype[np.uint8]]"
    boxes: "np.memmap[tuple[int, ...], np.dtype[np.float32]]"

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S), 0 to 1, and face boxes (B, 4)."""
        index = rows.numpy()
        return torch.from_numpy(self.images[index]).float().div_(255), torch.from_numpy(self.boxes[index])

    def frames(self, rows: Tensor) -> Tensor:
        """Rendered pictures are squares already: their size, and no corner cut off, (B, 4)."""
        side = float(self.gallery.size)
        return torch.tensor([side, side, 0.0, 0.0]).expand(len(rows), 4)


def open_pictures(gallery: Gallery, folder: Path) -> Pictures:
    """Map the gallery's files in `folder`, rendering what is missing first."""
    size, images, boxes = gallery.size, folder / "images.u8", folder / "boxes.f32"
    _migrate_state(folder / "done.json", images.with_suffix(".json"))
    formats: dict[Path, RowFormat] = {images: ((3, size, size), np.uint8), boxes: ((4,), np.float32)}
    rows = cache_rows_together(formats, gallery, _Renderer(gallery), f"rendering {gallery.split}", BLOCK)
    return Pictures(gallery, *rows)


class _Renderer:
    """Renders rows of a gallery; with compiled painters if many are missing when it begins."""

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery
        self.painters: Painters | None = None

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) in bytes, and boxes (B, 4)."""
        if self.painters is None:
            many = len(self.gallery) - int(rows[0]) >= _WORTH_COMPILING
            self.painters = compiled_painters() if many else Painters()
        out = render(self.gallery.people(rows), self.gallery.contexts(rows), self.gallery.size, self.painters)
        return (out.images * 255).round().byte(), out.boxes


def _migrate_state(old: Path, new: Path) -> None:
    """Say as `train.cache.rows` does what an earlier version left of a gallery."""
    if not old.exists():
        return
    known = json.loads(old.read_text(encoding="utf-8"))
    gallery, blocks = Gallery(**known["gallery"]), set(known["blocks"])
    rows = next(start for start in itertools.count(0, BLOCK) if start not in blocks)
    write_json(new, {"gallery": gallery.mark, "rows": min(rows, len(gallery))})
    old.unlink()
