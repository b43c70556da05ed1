"""Write pictures and face crops to the files that --output and --save-crop name."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imagine.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from imagine.people.persona import Face

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def save_crops(faces: Sequence["Face"], path: Path) -> list[Path]:
    """Write the face crops to `path`, or to numbered files if there are several; a persona file has no crop."""
    crops = [face.crop for face in faces if face.crop is not None]
    if not crops:
        raise ConfigError("--save-crop has no crop to write: a persona file holds none; give the photo itself.")
    paths = output_paths(path, len(crops))
    for crop, crop_path in zip(crops, paths, strict=True):
        save_atomically(crop, crop_path)
    return paths


def output_paths(path: Path, count: int) -> list[Path]:
    """Return the path itself for one picture, else name-1.png, name-2.png ..."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, count + 1)]


def save_atomically(image: "Image.Image", path: Path) -> None:
    """Write a picture whole or not at all. Raises ConfigError if the file cannot be written."""
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        image.save(unfinished, FORMATS[path.suffix.lower()], quality=95)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written ({error.strerror or error}): choose another --output.") from error
