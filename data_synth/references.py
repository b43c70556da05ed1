"""Provide a build's references, as numbered results in the store.

There are two kinds of sources. A source with a `count` generates any reference by its number, as a step like any other
(embedded.WorldPeople). A source with `collect` (Files) is read once from start to end, because duplicates and strangers
are found only by comparing all photos. Its result is stored until a file changes. Then all photos are read again, but
the recogniser runs only on new ones, because the faces of each photo are stored separately.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from fsspec.core import url_to_fs
from pydantic import Field

from data_synth.backends.local_models import identity_of
from data_synth.backends.recognisers import KnownFace, Recogniser, make_recogniser
from data_synth.importing import ImportSettings, import_references
from data_synth.records import Reference, Rejection
from data_synth.steps import Recipe
from data_synth.store import Result, Store
from imagine.errors import ConfigError
from imagine.records import FaceBox

VERSION = 3
_BATCH = 64  # results per transaction


class Files:
    """Photos from a folder, from shards, or grouped by person (importing.py), with faces found by a recogniser."""

    class Settings(ImportSettings):
        """Where the photos are, which are accepted, and the recogniser that finds the faces."""

        recogniser: str = "judge"  # a name or module:Class, see recognisers.py; "none": no face detection
        recogniser_settings: dict[str, Any] = Field(default_factory=dict, exclude=True)  # included in `identity`

    def __init__(self, settings: "Files.Settings") -> None:
        self.settings = settings
        name = settings.recogniser
        self._recogniser = None if name == "none" else make_recogniser(name, settings.recogniser_settings)

    @property
    def identity(self) -> Mapping[str, Any]:
        """The class, its version, the files at the source, and the recogniser."""
        recogniser = {} if self._recogniser is None else _recogniser_identity(self._recogniser)
        return identity_of(self, VERSION, files=_listing(self.settings.source), recogniser=recogniser)

    def load(self) -> None:
        """Load the recogniser."""
        if self._recogniser is not None:
            self._recogniser.load()

    def collect(self, store: Store | None = None) -> Iterator[Reference | Rejection]:
        """Yield every photo at the source, in a fixed order. store: the cache of faces that were found before."""
        names = ImportSettings.model_fields
        wanted = {name: value for name, value in self.settings.model_dump().items() if name in names}
        known = None if store is None or self._recogniser is None else _StoredFaces(store, self._recogniser)
        return import_references(ImportSettings(**wanted), self._recogniser, known)


def _recogniser_identity(recogniser: Recogniser) -> dict[str, Any]:
    """Return everything that the faces depend on besides the photos."""
    return {**recogniser.identity, "settings": recogniser.settings.model_dump(mode="json")}


class _StoredFaces:
    """A cache of the faces of photos in the store, separate for each recogniser."""

    def __init__(self, store: Store, recogniser: Recogniser) -> None:
        self._store = store
        self._identity = json.dumps(_recogniser_identity(recogniser), sort_keys=True, default=dict)

    def find(self, keys: Sequence[str]) -> dict[str, tuple[KnownFace, ...]]:
        """Return the faces of those photos that are in the cache."""
        found = self._store.find([self._key(key) for key in keys])
        return {key: _faces_of(str(found[mark])) for key in keys if (mark := self._key(key)) in found}

    def save(self, found: Mapping[str, tuple[KnownFace, ...]]) -> None:
        """Add the faces of these photos to the cache."""
        self._store.save((self._key(key), "look", _as_text(faces)) for key, faces in found.items())

    def _key(self, key: str) -> bytes:
        return Recipe.key("look", self._identity, key)


def _as_text(faces: Sequence[KnownFace]) -> str:
    """Encode faces as JSON: boxes as numbers, embeddings as base64 of little-endian float32 values."""
    rows = [[asdict(face.box), base64.b64encode(face.embedding.astype("<f4").tobytes()).decode()] for face in faces]
    return json.dumps(rows, default=float)


def _faces_of(text: str) -> tuple[KnownFace, ...]:
    return tuple(
        KnownFace(FaceBox.from_dict(box), np.frombuffer(base64.b64decode(code), "<f4").astype(np.float32))
        for box, code in json.loads(text)
    )


def _listing(source: str) -> str:
    """Hash names, sizes and times of the files at an address, or of those in the folder of a glob or of braces."""
    root = source.split("{")[0].split("*")[0]
    try:
        filesystem, path = url_to_fs(root)
        whole = root == source or filesystem.isdir(path)
        found = filesystem.find(path if whole else path.rpartition("/")[0], detail=True)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{source} cannot be opened ({error}): check the address.") from error
    marks = ("size", "mtime", "ETag", "etag", "LastModified", "updated")
    rows = [[name, *(str(info[mark]) for mark in marks if info.get(mark) is not None)] for name, info in found.items()]
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:16]


def collect(source: Any, identity: str, store: Store, report: Callable[[int], None]) -> tuple[int, list[Rejection]]:
    """Read a source with `collect` into the store, unless it holds the same content; return (references, rejections).

    After an interruption the next run reads all photos again but takes the faces found so far from the store. Reference
    number n has the key of Recipe.request("import", ...). report: receives the number of references so far.
    """
    noted = store.read_note(f"import {identity}")
    if noted is None:
        source.load()
        rejections, waiting, count = [], [], 0
        for found in source.collect(store) if isinstance(source, Files) else source.collect():
            if isinstance(found, Rejection):
                rejections.append(found)
                continue
            waiting.append((import_key(identity, count), "import", found))
            count += 1
            if len(waiting) == _BATCH:
                # an interrupted import may have stored other references under these numbers
                store.save(waiting, overwrite=True)
                report(count)
                waiting = []
        store.save(waiting, overwrite=True)
        noted = {"count": count, "rejections": [vars(one) for one in rejections]}
        store.write_note(f"import {identity}", noted)
    return noted["count"], [Rejection(**one) for one in noted["rejections"]]


def import_key(identity: str, number: int) -> bytes:
    """Return the key of a reference in the store."""
    return Recipe.key("import", identity, number)


def people_of(identity: str, count: int, store: Store) -> Iterator[tuple[int, Reference]]:
    """Yield the numbered references of a collected source, one at a time, so that only one picture is in memory."""
    for number in range(count):
        key = import_key(identity, number)
        found: Result = store.find([key])[key]
        assert isinstance(found, Reference), "a source must collect references"
        yield number, found
