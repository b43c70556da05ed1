"""The cached inputs of the denoiser's stages for one gallery: pictures, latents, caption tokens, face crops."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from train.cache.face_crops import FaceCrops
from train.cache.latents import Codec, Latents
from train.cache.pictures import AnyPictures
from train.data.sources import DrawnPairs, in_order

Captions = TypeVar("Captions")


@dataclass(frozen=True)
class GalleryCache(Generic[Captions]):
    """The cached data of one gallery, indexed by row number; `face_crops` only if the stage needs references."""

    pictures: AnyPictures
    latents: Latents
    sentences: Captions  # the cache of its captions' tokens
    face_crops: FaceCrops | None = None

    def faces(self, rows: Tensor) -> Tensor:
        """Return the face masks of these rows on the latent grid, (B, 1, h, w), 1 or 0."""
        return self.latents.faces(rows)

    def letters(self, rows: Tensor) -> Tensor:
        """Return the masks of the words on shirts, (B, 1, h, w), 1 or 0."""
        return self.latents.letters(rows)

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
