"""Cached pictures of several people, for stages that learn to draw them together.

A group gallery shows the people of a gallery of portraits, whose face crops are the references. Everything about a row
follows from its number: who is in the picture, where they stand, what each one wears, and in which order the references
are given, which is independent of the places.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from imagine.world import (
    Contexts,
    Groups,
    People,
    canvas_shape,
    drift,
    group_captions,
    render_groups,
    sample_contexts,
    sample_groups,
    sample_people,
)
from imagine.world.render import Painters, compiled_painters
from train.cache.latents import Codec
from train.cache.pictures import WORTH_COMPILING, Gallery
from train.cache.rows import RowFormat, cache_rows_together

MASK_CELL = 8  # pixels of a picture in each direction per value of a stored mask
_BLOCK = 96  # pictures rendered and stored at a time
_SEEDS = 1_000_000_000  # contexts of groups have seeds of their own, far from those of portraits


@dataclass(frozen=True)
class GroupGallery:
    """`count` pictures of `people` people each, who are drawn at random from a gallery of portraits."""

    portraits: Gallery
    people: int
    count: int

    def __len__(self) -> int:
        return self.count

    @property
    def size(self) -> int:
        """Side of a portrait at this scale, in pixels; the pictures are `shape` high and wide."""
        return self.portraits.size

    @property
    def shape(self) -> tuple[int, int]:
        return canvas_shape(self.people, self.size)

    @property
    def mark(self) -> str:
        facts = [self.portraits.mark, self.portraits.identities, self.people]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]

    def name(self, row: int) -> str:
        """Return the name of a row in messages."""
        return f"picture {row} of {self.people} people"

    def members(self, rows: Tensor) -> Tensor:
        """Return the numbers of the people in these rows, from left to right, (B, P); all of a row differ."""
        drawn = [
            np.random.default_rng([row, self.people, 7]).choice(self.portraits.identities, self.people, replace=False)
            for row in rows.tolist()
        ]
        return torch.from_numpy(np.stack(drawn))

    def order(self, rows: Tensor) -> Tensor:
        """Return the place of the person of each reference, (B, P): reference r shows the person at order[:, r]."""
        drawn = [np.random.default_rng([row, self.people, 8]).permutation(self.people) for row in rows.tolist()]
        return torch.from_numpy(np.stack(drawn))

    def references(self, rows: Tensor) -> Tensor:
        """Return the rows of the portraits that are the references, (B, P), in the order of the references."""
        who = self.members(rows).gather(1, self.order(rows))
        which = [
            np.random.default_rng([row, self.people, 9]).integers(self.portraits.pictures, size=self.people)
            for row in rows.tolist()
        ]
        return who * self.portraits.pictures + torch.from_numpy(np.stack(which))

    def shown(self, rows: Tensor) -> tuple[People, Contexts, Groups]:
        """Return the people (with drift) and contexts of these rows, P per row, and their arrangement."""
        seeds = [self.portraits.first_seed + int(i) for i in self.members(rows).flatten()]
        slots = (rows.unsqueeze(1) * self.people + torch.arange(self.people)).flatten()
        own = [_SEEDS * self.people + int(i) for i in slots]
        people = drift(sample_people(seeds), own, self.portraits.drift)
        height, width = self.shape
        return people, sample_contexts(own), sample_groups(own[:: self.people], self.people, width / height)

    def captions(self, rows: Tensor, caption_styles: Sequence[str]) -> list[str]:
        """Return each picture's caption in the given style; it is the same at every call."""
        people, contexts, groups = self.shown(rows)
        order, texts = self.order(rows), [""] * len(rows)
        for style in set(caption_styles):
            mine = [i for i, name in enumerate(caption_styles) if name == style]
            slots = [i * self.people + p for i in mine for p in range(self.people)]
            some = (people[slots], contexts[slots], groups[mine], order[mine])
            for i, text in zip(mine, group_captions(*some, style, rows[mine].tolist()), strict=True):
                texts[i] = text
        return texts

    def render(self, rows: Tensor, painters: Painters) -> tuple[Tensor, Tensor, Tensor]:
        """Return images (B, 3, H, W) uint8, face boxes (B, P, 4), and masks (B, P, H/8, W/8) uint8 of what is seen.

        Boxes and masks are in the order of the references.
        """
        people, contexts, groups = self.shown(rows)
        out = render_groups(people, contexts, self.people, self.size, painters, groups)
        order = self.order(rows)
        boxes = out.boxes.gather(1, order[..., None].expand(-1, -1, 4))
        small = F.avg_pool2d(out.masks, MASK_CELL)
        masks = small.gather(1, order[..., None, None].expand(-1, -1, *small.shape[2:]))
        return (out.images * 255).round().byte(), boxes, (masks * 255).round().byte()


@dataclass(frozen=True)
class GroupRows:
    """The rows of a batch: latents (B, C, h, w), face boxes (B, P, 4) in pixels, and masks (B, P, H/8, W/8), 0 to 1."""

    latents: Tensor
    boxes: Tensor
    masks: Tensor


class GroupPictures:
    """The pictures of a group gallery on disk, with their latents."""

    def __init__(self, gallery: GroupGallery, codec: Codec, folder: Path) -> None:
        """Render and encode the pictures that are not cached."""
        self.gallery = gallery
        height, width = gallery.shape
        files: dict[Path, RowFormat] = {
            folder / "images.u8": ((3, height, width), np.uint8),
            folder / "boxes.f32": ((gallery.people, 4), np.float32),
            folder / "masks.u8": ((gallery.people, height // MASK_CELL, width // MASK_CELL), np.uint8),
        }
        self.painters = compiled_painters() if len(gallery) >= WORTH_COMPILING else Painters()
        self.images, self.boxes, self.masks = cache_rows_together(
            files, gallery, self._render, f"rendering groups of {gallery.people}", _BLOCK
        )
        channels, cells, _ = codec.shape(gallery.size)
        step = gallery.size // cells
        latents: dict[Path, RowFormat] = {
            folder / f"latents-{codec.mark}.f16": ((channels, height // step, width // step), np.float16)
        }
        self.codec = codec
        (self.latents,) = cache_rows_together(latents, gallery, self._encode, "encoding groups", _BLOCK)

    def take(self, rows: Tensor) -> GroupRows:
        """Return the latents, face boxes and masks of these rows."""
        index = rows.numpy()
        values: list[Any] = [self.latents[index], self.boxes[index], self.masks[index]]
        latents, boxes, masks = (torch.from_numpy(value) for value in values)
        return GroupRows(latents.float(), boxes, masks.float() / 255)

    def _render(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.gallery.render(rows, self.painters)

    def _encode(self, rows: Tensor) -> tuple[Tensor]:
        images = torch.from_numpy(self.images[rows.numpy()]).float().div_(127.5) - 1
        return (self.codec.encode(images).half().cpu(),)
