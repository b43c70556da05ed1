"""Name the files of pictures, and write face crops to the files that --save-crop names."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imagine.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from imagine.people.persona import Face

FORMATS = (".png", ".jpg", ".jpeg", ".webp")


def save_crops(faces: Sequence["Face"], path: Path) -> list[Path]:
    """Write the face crops to `path`, or to numbered files if there are several; a persona file has no crop."""
    crops = [face.crop for face in faces if face.crop is not None]
    if not crops:
        raise ConfigError("--save-crop has no crop to write: a persona file holds none; give the photo itself.")
    paths = output_paths(path, len(crops))
    for crop, crop_path in zip(crops, paths, strict=True):
        save_crop(crop, crop_path)
    return paths


def save_crop(image: "Image.Image", path: Path) -> None:
    """Write a face crop, a part of a photo and therefore without marks, whole or not at all."""
    from imagine.provenance.saving import write_unmarked

    write_unmarked(image, path)


def output_paths(path: Path, count: int) -> list[Path]:
    """Return the path itself for one picture, else name-1.png, name-2.png ..."""
    from imagine.provenance.saving import numbered_paths

    return numbered_paths(path, count)
