"""The cached inputs of the denoiser's stages for one gallery: pictures, latents, caption tokens, face crops."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from train.cache.face_crops import FaceCrops
from train.cache.latents import Codec, Latents
from train.cache.pictures import AnyPictures
from train.cache.truths import PartMasks, WordPlaces
from train.data.sources import DrawnPairs, in_order

Captions = TypeVar("Captions")


@dataclass(frozen=True)
class Truth:
    """What the world knows of pictures; of records nothing is known."""

    letters: Tensor  # (B, 3) of the word, 1 to 26; 0 for none
    boxes: Tensor  # (B, 4) of the word in pixels: left, top, width, height; width 0 for none
    parts: Tensor  # (B, parts, GRID, GRID) masks of the parts, or (B, 0) if the stage does not need them

    @staticmethod
    def join(positions: Sequence[Tensor], pieces: "Sequence[Truth]") -> "Truth":
        """Concatenate `pieces`, with their rows at the indices `positions`, (n,) each."""
        return Truth(*(in_order(positions, [getattr(piece, name) for piece in pieces]) for name in _TRUTHS))


_TRUTHS = tuple(Truth.__dataclass_fields__)


@dataclass(frozen=True)
class GalleryCache(Generic[Captions]):
    """The cached data of one gallery, indexed by row number; `face_crops` only if the stage needs references."""

    pictures: AnyPictures
    latents: Latents
    sentences: Captions  # the cache of its captions' tokens
    face_crops: FaceCrops | None = None
    words: WordPlaces | None = None
    part_masks: PartMasks | None = None

    def faces(self, rows: Tensor) -> Tensor:
        """Return the face masks of these rows on the latent grid, (B, 1, h, w), 1 or 0."""
        return self.latents.faces(rows)

    def letters(self, rows: Tensor) -> Tensor:
        """Return the masks of the words on shirts, (B, 1, h, w), 1 or 0."""
        return self.latents.letters(rows)

    def truth(self, rows: Tensor) -> Truth:
        """Return what is known of these rows: no word and no part, unless the stage caches them."""
        nothing = torch.zeros(len(rows), 3, dtype=torch.long), torch.zeros(len(rows), 4)
        letters, boxes = nothing if self.words is None else self.words.take(rows)
        parts = torch.zeros(len(rows), 0) if self.part_masks is None else self.part_masks.take(rows)
        return Truth(letters, boxes, parts)

    def crops(self, rows: Tensor, shifts: Tensor) -> Tensor:
        """Return the face crops (B, 3, S, S) of these rows, shifted a little: `FaceCrops.take`."""
        assert self.face_crops is not None, "this task caches the face crops of all its galleries"
        return self.face_crops.take(rows, shifts)


def cache_gallery(
    pictures: AnyPictures,
    codec: Codec,
    sentences: Captions,
    folder: Path,
    side: int | None = None,
    crop_side: int | None = None,
) -> GalleryCache[Captions]:
    """Cache in `folder` what is missing: latents of pictures of `side` pixels, face crops of `crop_side` if given."""
    latents = Latents(pictures, codec, folder, side)
    face_crops = None if crop_side is None else FaceCrops(pictures, crop_side, folder, noisy=True)
    return GalleryCache(pictures, latents, sentences, face_crops)


def references(gallery_caches: Mapping[str, GalleryCache[Any]], drawn: DrawnPairs, shifts: Tensor) -> Tensor:
    """Return the face crops (B, 3, S, S) of a batch's references, each shifted a little by `shifts` (B, 2)."""
    by_gallery = drawn.by_gallery()
    crops = [gallery_caches[name].crops(drawn.references[here], shifts[here]) for name, here in by_gallery.items()]
    return in_order(list(by_gallery.values()), crops)
