"""Pictures that exist already, in a folder: from a method that runs elsewhere, or in another language.

The folder holds either `manifest.jsonl`, one line {"id": ..., "file": ...} per picture with paths relative to the
folder, or pictures whose names are their ids. `python -m imagine benchmark` writes the list of ids with their prompts
and references (see `imagine.evaluation.benchmark`).
"""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from imagine.errors import ConfigError, PictureError
from imagine.evaluation.systems.contracts import FULL, System
from imagine.paths import as_path, kind_of, shorten_path
from imagine.people.photos import open_photo

MANIFEST = "manifest.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class FinishedPictures:
    """A folder of finished pictures. Raises ConfigError if there is no such folder or its manifest cannot be read."""

    rows = (FULL,)

    def __init__(self, folder: str | Path, name: str = "") -> None:
        self.folder = as_path(folder)
        if kind_of(self.folder, ConfigError) != "folder":
            raise ConfigError(f"There is no folder {shorten_path(folder)} of pictures: check the path.")
        self.name = name or self.folder.absolute().name
        self.files = _read_manifest(self.folder / MANIFEST) if (self.folder / MANIFEST).exists() else None

    def path(self, picture: str) -> Path:
        """Return where the picture with this id is, or would be."""
        if self.files is not None:
            return self.folder / self.files.get(picture, f"{picture}.png")
        found = (self.folder / f"{picture}{suffix}" for suffix in SUFFIXES)
        return next((path for path in found if path.exists()), self.folder / f"{picture}.png")

    def check(self, ids: Sequence[str]) -> int:
        """Return how many of these pictures the folder has. Raises ConfigError if it has none of them."""
        here = sum(self.path(each).exists() for each in ids)
        if not here:
            raise ConfigError(
                f"{shorten_path(self.folder)} has no picture of this suite: name the files {ids[0]}.png and so on, or "
                f"list them in {MANIFEST}, as docs/evaluation.md describes."
            )
        return here

    def fingerprint(self) -> str:
        """Return the folder's name: its pictures are read anew in every run, so they may change."""
        return f"pictures in {self.folder.absolute().name}"


Judgeable = System | FinishedPictures  # what an evaluation takes


def open_finished(path: Path, side: int | None = None) -> Image.Image:
    """Open a finished picture as RGB; with `side`, as a square of its middle. Raises PictureError."""
    if not path.exists():
        raise PictureError(f"There is no picture {path.name}.")
    image = open_photo(path)
    if side is None or image.size == (side, side):
        return image
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def _read_manifest(path: Path) -> dict[str, str]:
    files: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shorten_path(path)} cannot be read ({error}): check its permissions.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            files[str(entry["id"])] = str(entry["file"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'Line {number} of {shorten_path(path)} is not {{"id": ..., "file": ...}} with the id of a picture and '
                "its file: correct the line."
            ) from error
    return files
