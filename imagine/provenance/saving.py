"""Save a picture with its marks: every part of the project that saves pictures uses this function.

The order matters: the watermark changes pixels, then the settings enter the file, then the credentials sign its bytes.
The pixels are not touched unless the watermark is applied. What cannot be made becomes a note and part of the record,
never an error: a missing package must not cost a picture.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from imagine.errors import ConfigError, ImagineError
from imagine.paths import VERSION, as_path
from imagine.provenance import credentials, watermark
from imagine.provenance.marks import OFF, ON, MarkedPicture, Marks
from imagine.provenance.metadata import save_options
from imagine.provenance.record import PictureRecord

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
QUALITY = 95
_INSTALL = "install them with pip install -e '.[provenance]'"
NOT_INSTALLED = "not installed"


@dataclass
class _Outcome:
    """What became of each mark so far."""

    applied: dict[str, Any]
    notes: list[str]


def save_picture(
    image: Image.Image, path: "str | os.PathLike[str]", record: PictureRecord, marks: Marks | None = None
) -> MarkedPicture:
    """Write a picture with its marks, whole or not at all; return what was written.

    The ending of `path` says the format: .png, .jpg or .webp. Raises ConfigError if the file cannot be written.
    """
    path = as_path(path)
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path} must end in {', '.join(FORMATS)}: choose another name.")
    made = encode_picture(image, FORMATS[path.suffix.lower()], record, marks)
    write_whole(made.data, path)
    return made


def numbered_paths(path: Path, count: int) -> list[Path]:
    """Return the path itself for one picture, else name-1.png, name-2.png ..."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, count + 1)]


def write_unmarked(image: Image.Image, path: Path) -> None:
    """Write a picture that nothing generated, such as a face crop, whole or not at all, and without any metadata."""
    buffer = io.BytesIO()
    clean = image.copy()
    clean.info = {}
    clean.save(buffer, FORMATS[path.suffix.lower()], quality=QUALITY)
    write_whole(buffer.getvalue(), path)


def write_whole(data: bytes, path: Path) -> None:
    """Write bytes to a file, whole or not at all. Raises ConfigError if the file cannot be written."""
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written ({error.strerror or error}): choose another --output.") from error


def encode_picture(
    image: Image.Image, file_format: str, record: PictureRecord, marks: Marks | None = None, quality: int = QUALITY
) -> MarkedPicture:
    """Return the bytes of a picture file ("PNG", "JPEG" or "WEBP") with its marks; `quality` is not used for PNG."""
    marks = Marks() if marks is None else marks
    outcome = _Outcome({"settings": ON if marks.settings else OFF, "prompt": ON if marks.prompt else OFF}, [])
    image = _watermarked(image, record, marks, outcome)
    # The file says of the credentials what was tried, since they are made from the finished file.
    signs = marks.credentials and credentials.is_installed()
    outcome.applied["credentials"] = ON if signs else NOT_INSTALLED if marks.credentials else OFF
    if marks.credentials and not signs:
        outcome.notes.append(f"The picture has no content credentials: c2pa-python is missing; {_INSTALL}.")
    data = _encoded(image, file_format, record, marks, outcome.applied, quality)
    if signs:
        try:
            data = credentials.sign(data, file_format, record.as_dict(outcome.applied, marks.prompt))
        except ImagineError as error:
            outcome.applied["credentials"] = "failed"
            outcome.notes.append(str(error))
            data = _encoded(image, file_format, record, marks, outcome.applied, quality)
    return MarkedPicture(data, outcome.applied, tuple(outcome.notes))


def watermarked(image: Image.Image, record: PictureRecord, marks: Marks) -> tuple[Image.Image, list[str]]:
    """Return the picture with the watermark that `marks` asks for, and notes, where another program saves it."""
    outcome = _Outcome({}, [])
    return _watermarked(image, record, marks, outcome), outcome.notes


def _watermarked(image: Image.Image, record: PictureRecord, marks: Marks, outcome: _Outcome) -> Image.Image:
    """Return the picture with a watermark, or the same object without one, and say so in `outcome`."""
    reliable = watermark.is_reliable(image.size)
    if marks.watermark is False or (marks.watermark is None and not reliable):
        outcome.applied["watermark"] = OFF if marks.watermark is False else "off: unreliable at this size"
        return image
    if image.width * image.height > watermark.MOST_PIXELS:
        outcome.applied["watermark"] = "off: the picture is too large"
        outcome.notes.append("The picture has no watermark: it is larger than 4.2 megapixels.")
        return image
    if not watermark.is_installed():
        outcome.applied["watermark"] = NOT_INSTALLED
        outcome.notes.append(
            f"The picture has no watermark: invisible-watermark or onnxruntime is missing; {_INSTALL}."
        )
        return image
    made = watermark.add_watermark(image, record.consent)
    if made is None:
        outcome.applied["watermark"] = "failed"
        outcome.notes.append("The picture has no watermark: it could not be read back from these pixels.")
        return image
    outcome.applied["watermark"] = ON
    outcome.applied["watermark_wrong_bits"] = made.wrong_bits
    outcome.applied["watermark_strength"] = made.strength
    if not reliable:
        outcome.notes.append("The watermark is not reliable at this size: saving the picture again may destroy it.")
    return made.image


def _encoded(
    image: Image.Image, file_format: str, record: PictureRecord, marks: Marks, applied: Any, quality: int
) -> bytes:
    """Return the bytes of the picture file with the settings, and with no metadata that the image object carries."""
    clean = image.copy()
    clean.info = {}  # Pillow would write a comment, a profile or EXIF that was read with a reference
    text, described = "", {}
    if marks.settings:
        text, described = record.as_text(image.size, marks.prompt), record.as_dict(applied, marks.prompt)
    options = save_options(file_format, text, described, f"imagine {VERSION}") if marks.settings else {}
    buffer = io.BytesIO()
    clean.save(buffer, file_format, quality=quality, **options)
    return buffer.getvalue()
