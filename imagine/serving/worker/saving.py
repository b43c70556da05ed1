"""Write and read the files of a worker's results: pictures and personas. Nothing else of the server does either."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from imagine.people.persona import Persona
from imagine.provenance.marks import MarkedPicture
from imagine.serving.store.files import Files, write_whole
from imagine.serving.store.records import NewPicture, draw_id

MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
PREVIEW_SIDE = 256


def save_picture(
    files: Files, picture: MarkedPicture, size: tuple[int, int], number: int, seed: int, settings: Mapping[str, Any],
    form: str,
) -> NewPicture:  # fmt: skip
    """Write one picture of a job under a new id, and return what its row holds. size: width and height in pixels."""
    made = NewPicture(
        draw_id("pic"), number, MEDIA[form], hashlib.sha256(picture.data).hexdigest(), *size, seed, dict(settings)
    )
    write_whole(files.picture(made.id, made.media), lambda file: file.write(picture.data))
    return made


def preview_jpeg(image: Image.Image) -> bytes:
    """Return a small JPEG of an unfinished picture."""
    small = image.copy()
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=80)
    return encoded.getvalue()


def save_persona(files: Files, persona: Persona, name: str) -> None:
    """Write a persona under its id, whole or not at all."""
    path = files.persona(name)
    persona.save(path)
    path.chmod(0o600)


def load_persona(path: Path) -> Persona:
    """Read a persona. Raises WeightsError if the file is not one."""
    return Persona.load(path)
