"""Read the marks of any picture file: settings, content credentials and watermark, each by itself.

What is absent proves nothing: any program may remove the settings and the credentials, and a watermark may not survive.
"""

import io
import os
import warnings
from dataclasses import dataclass
from typing import Any

from PIL import Image

from imagine.errors import PictureError
from imagine.paths import as_path, kind_of, why_no_file
from imagine.people.photos import MAX_BYTES, MAX_PIXELS, open_photo
from imagine.provenance import credentials, watermark
from imagine.provenance.metadata import read_settings

_INSTALL = "install it with pip install -e '.[provenance]'"


@dataclass(frozen=True)
class Detection:
    """What a picture file says of its origin. `verdict` is one sentence; `notes` says what was not looked for."""

    verdict: str
    text: str
    record: Any
    credentials: Any
    watermark: Any
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "verdict": self.verdict, "parameters": self.text or None, "record": self.record,
            "credentials": self.credentials, "watermark": self.watermark, "notes": list(self.notes),
        }  # fmt: skip


def detect(path: "str | os.PathLike[str]") -> Detection:
    """Return the marks of a picture file. Raises PictureError if it is no picture that can be read."""
    pixels = open_photo(path)  # with all checks of a reference
    data, notes = _bytes(path), list[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data)) as opened:
            size, file_format, found = opened.size, str(opened.format), read_settings(opened)
            exact = opened.convert("RGB") if opened.mode in ("RGB", "L", "RGBA", "P") else pixels
    signed = _credentials(data, file_format, notes)
    marked = _watermark(exact, size, notes)
    if found.others:
        notes.append(f"The file also holds settings of other programs: {', '.join(found.others)}.")
    return Detection(_verdict(found.record, signed, marked), found.text, found.record, signed, marked, tuple(notes))


def _bytes(path: "str | os.PathLike[str]") -> bytes:
    file = as_path(path)
    if (kind := kind_of(file, PictureError)) != "file":
        raise PictureError(why_no_file(path, kind))
    if file.stat().st_size > MAX_BYTES:
        raise PictureError(f"{path} is larger than {MAX_BYTES >> 20} MB.")
    return file.read_bytes()


def _credentials(data: bytes, file_format: str, notes: list[str]) -> dict[str, Any] | None:
    if file_format not in credentials.MIME:
        notes.append(f"Content credentials are looked for in {', '.join(credentials.MIME)} only, not in {file_format}.")
        return None
    if not credentials.is_installed():
        notes.append(f"Content credentials were not looked for: c2pa-python is missing; {_INSTALL}.")
        return None
    return credentials.read_credentials(data, file_format)


def _watermark(image: Image.Image, size: tuple[int, int], notes: list[str]) -> dict[str, Any] | None:
    if not watermark.is_installed():
        notes.append(f"A watermark was not looked for: invisible-watermark or onnxruntime is missing; {_INSTALL}.")
        return None
    if image.width * image.height > min(MAX_PIXELS, watermark.MOST_PIXELS):
        notes.append("A watermark was not looked for: the picture is larger than 4.2 megapixels.")
        return None
    reading = watermark.read_watermark(image)
    if not watermark.is_reliable(size):
        notes.append(f"Watermarks are not reliable below {watermark.RELIABLE_SIDE} pixels a side.")
    return {
        "found": reading.found, "consent": reading.consent if reading.found else None,
        "wrong_bits": reading.wrong_bits, "bits": watermark.BITS, "reliable": watermark.is_reliable(size),
    }  # fmt: skip


def _verdict(record: Any, signed: Any, marked: Any) -> str:
    """Return what the marks say together, from the strongest to the weakest."""
    if signed is not None and signed["state"] == "Invalid":
        return "The content credentials are broken: the file was changed after it was signed."
    if signed is not None:
        issuer = "a trusted issuer" if signed["trusted"] else "an issuer that is on no trust list"
        made = "an AI-generated picture" if signed["ai_generated"] else "a picture"
        return f"The content credentials are intact and describe {made}; they were signed by {issuer}."
    if record is not None:
        return "The settings in the file say that imagine generated the picture; they are not signed."
    if marked is not None and marked["found"]:
        return "The pixels hold the watermark of imagine, so the picture, or a part of it, was probably generated."
    return "No mark was found, which does not prove that the picture is a photograph."
