"""The files beside the database: photos until they are encoded, personas, and finished pictures.

A file appears whole under its final name, which nobody else uses, before the row that names it is written. A file
without a row is therefore left over from a process that was killed, and is removed. Names are ids that the server drew,
so no name from a request becomes a path.
"""

import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

_ID = re.compile(r"[a-z]{3}_[0-9a-f]{32}")
SUFFIXES = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}
LEFT_OVER = 600.0  # seconds after which a file without a row cannot be one that is about to get it


class Files:
    """The folders of files under the server's own folder."""

    def __init__(self, folder: Path) -> None:
        self.photos, self.personas, self.pictures = (folder / name for name in ("photos", "personas", "pictures"))

    def create(self) -> None:
        """Create the folders, which only this user may read."""
        for folder in (self.photos, self.personas, self.pictures):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def photo(self, upload: str) -> Path:
        return self.photos / f"{_checked(upload)}.png"

    def uploaded_persona(self, upload: str) -> Path:
        return self.photos / f"{_checked(upload)}.safetensors"

    def persona(self, persona: str) -> Path:
        return self.personas / f"{_checked(persona)}.safetensors"

    def picture(self, picture: str, media: str) -> Path:
        return self.pictures / f"{_checked(picture)}{SUFFIXES[media]}"

    def remove_upload(self, upload: str) -> None:
        self.photo(upload).unlink(missing_ok=True)
        self.uploaded_persona(upload).unlink(missing_ok=True)

    def remove_persona(self, persona: str) -> None:
        self.persona(persona).unlink(missing_ok=True)

    def remove_pictures(self, pictures: Iterable[str]) -> None:
        for picture in pictures:
            for media in SUFFIXES:
                self.picture(picture, media).unlink(missing_ok=True)

    def remove_left_over(self, known: Callable[[str], bool], older: float = LEFT_OVER) -> int:
        """Remove files without a row, and unfinished ones, that are older than so many seconds; return how many."""
        removed = 0
        for folder in (self.photos, self.personas, self.pictures):
            for path in folder.iterdir():
                try:
                    is_old = path.stat().st_mtime < time.time() - older
                except FileNotFoundError:
                    continue
                if is_old and not (path.suffix != ".partial" and known(path.name.split(".")[0])):
                    path.unlink(missing_ok=True)
                    removed += 1
        return removed


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it survives a crash whole, or not at all."""
    unfinished = path.with_name(f"{path.name}.partial")
    try:
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _checked(name: str) -> str:
    """Return an id of ours. Anything else is a bug, because routes look ids up before they open files."""
    if not _ID.fullmatch(name):
        raise ValueError(f"{name!r} is not an id")
    return name
