"""List, describe and delete persona files, from their headers alone.

A persona is a safetensors file whose metadata describe it. An encrypted one is a safetensors file that holds only the
ciphertext, and its metadata tell nothing but how it was encrypted.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from imagine.errors import WeightsError
from imagine.networks.files import is_safetensors, why_unreadable
from imagine.paths import as_path, kind_of, shorten_path, why_no_file
from imagine.personas.consent import UNRECORDED, from_text

KIND, SEALED_KIND = "persona", "encrypted persona"
SUFFIX = ".safetensors"
PARTIAL = ".partial"  # the ending of a file that was not finished


@dataclass(frozen=True)
class PersonaFacts:
    """What the header of a persona file says; of an encrypted one only `path` and `bytes` are known."""

    path: Path
    encrypted: bool
    bytes: int
    encoder: str = ""
    encoder_name: str = ""
    references: int = 0
    tokens: int = 0
    pooling: str = ""
    created: str = ""
    consent: Any = None  # a Consent, or None
    photo_weights: tuple[float, ...] = ()
    faces: tuple[Any, ...] = ()

    def state(self, today: date | None = None) -> str:
        """Return "valid", "expired", "consent not recorded" or "encrypted"."""
        if self.encrypted:
            return "encrypted"
        if self.consent is None:
            return f"consent {UNRECORDED}"
        return "valid" if self.consent.is_valid(today) else "expired"

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, words and lists, ready for JSON."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **plain, "path": str(self.path), "state": self.state(), "photo_weights": list(self.photo_weights),
            "consent": None if self.consent is None else self.consent.as_dict(), "faces": list(self.faces),
        }  # fmt: skip


@dataclass(frozen=True)
class Deleted:
    """What was deleted: the facts of the persona, every file that was unlinked, and what could not be."""

    facts: PersonaFacts
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def read_persona_facts(path: str | os.PathLike[str]) -> PersonaFacts:
    """Return what a persona file says of itself. Raises WeightsError if it is none."""
    file = as_path(path)
    if (kind := kind_of(file, WeightsError)) != "file":
        raise WeightsError(why_no_file(path, kind, "persona file"))
    metadata = read_metadata(file)
    if metadata.get("kind") not in (KIND, SEALED_KIND):
        raise WeightsError(f"{shorten_path(path)} is not a persona; give a file made by `imagine enroll`.")
    size = file.stat().st_size
    if metadata["kind"] == SEALED_KIND:
        return PersonaFacts(file, True, size)
    try:
        faces = tuple(json.loads(metadata.get("faces", "[]")))
        weights = tuple(map(float, json.loads(metadata.get("photo_weights", "[]"))))
        return PersonaFacts(
            file, False, size, metadata["encoder"], metadata.get("encoder_name", ""),
            int(metadata.get("references", len(faces))), int(metadata["tokens"]),
            metadata.get("pooling", "concatenate"), metadata.get("created", ""),
            from_text(metadata.get("consent", "null")), weights, faces,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} does not describe its persona properly; enroll the person again.") from error


def list_personas(folder: str | os.PathLike[str]) -> tuple[list[PersonaFacts], list[str]]:
    """Return the personas in a folder by name, and a sentence for each file that looks like one but is damaged.

    Raises WeightsError if there is no such folder.
    """
    path = as_path(folder)
    if kind_of(path, WeightsError) != "folder":
        raise WeightsError(f"There is no folder {shorten_path(folder)}: name the folder that holds the personas.")
    found, notes = [], []
    for file in sorted(path.glob(f"*{SUFFIX}")):
        metadata = read_metadata(file) if file.is_file() and is_safetensors(file) else None
        if metadata is None or metadata.get("kind") not in (KIND, SEALED_KIND):
            continue  # weights of another kind, or no such file at all
        try:
            found.append(read_persona_facts(file))
        except WeightsError as error:
            notes.append(str(error))
    return found, notes


def delete_persona(path: str | os.PathLike[str]) -> Deleted:
    """Unlink a persona file, the file that it links to, and what an interrupted save left beside it.

    Nothing but a persona is deleted: raises WeightsError for any other file, and if the file cannot be unlinked. Copies
    elsewhere cannot be found; another name of the same file on this disk is reported.
    """
    file = as_path(path)
    facts = read_persona_facts(file)
    target = file.resolve()
    names = target.stat().st_nlink
    leftovers = [each.with_name(each.name + PARTIAL) for each in (file, target)]
    doomed = [*dict.fromkeys([file, target]), *(each for each in dict.fromkeys(leftovers) if each.is_file())]
    doomed = [each for number, each in enumerate(doomed) if each.absolute() not in map(Path.absolute, doomed[:number])]
    gone = list[Path]()
    for each in doomed:
        try:
            each.unlink()
        except OSError as error:
            done = f"; deleted so far: {', '.join(map(str, gone))}" if gone else ""
            raise WeightsError(
                f"{each} cannot be deleted ({error.strerror or error}){done}: check the permissions of its folder."
            ) from error
        gone.append(each)
    notes = []
    if names > 1:
        notes.append(f"The file has {names - 1} other name(s) on this disk (hard links), which still hold the persona.")
    return Deleted(facts, tuple(gone), tuple(notes))


def read_header(data: bytes) -> dict[str, str]:
    """Return the metadata of the bytes of a safetensors file. Raises ValueError if there is no header."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def read_metadata(file: Path) -> Mapping[str, str]:
    """Return the metadata of a safetensors file. Raises WeightsError if it cannot be read."""
    try:
        with safe_open(file, framework="np") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(why_unreadable(file, "enroll the person again")) from error
