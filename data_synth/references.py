"""Where a build's references come from, as numbered results in the store.

There are two kinds of sources. One that has a `count` draws any reference by its number, and its work is done like any
other step's (embedded.WorldPeople). One that can `collect` photos is read once from its first to its last, since
duplicates and strangers are found only by looking at all of them (Files); what it found is kept until a file changes.
Then all are read again, but only new ones are looked at: the faces of each photo are kept by themselves.
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

VERSION = 2
_BATCH = 64  # results a transaction


class Files:
    """Photos from a folder, from shards, or grouped by person (importing.py), their faces found by a recogniser."""

    class Settings(ImportSettings):
        """Where they are, which can be used, and who finds their faces."""

        recogniser: str = "judge"  # a name or module:Class, see recognisers.py; "none": faces are not looked for
        recogniser_settings: dict[str, Any] = Field(default_factory=dict, exclude=True)  # `identity` knows them

    def __init__(self, settings: "Files.Settings") -> None:
        self.settings = settings
        name = settings.recogniser
        self._recogniser = None if name == "none" else make_recogniser(name, settings.recogniser_settings)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Class, version, what is there, and who looks at it."""
        recogniser = {} if self._recogniser is None else _recogniser_identity(self._recogniser)
        return identity_of(self, VERSION, files=_listing(self.settings.source), recogniser=recogniser)

    def load(self) -> None:
        """Load the recogniser."""
        if self._recogniser is not None:
            self._recogniser.load()

    def collect(self, store: Store | None = None) -> Iterator[Reference | Rejection]:
        """Every photo there, in a fixed order; kept: where faces are found that were looked for before."""
        names = ImportSettings.model_fields
        wanted = {name: value for name, value in self.settings.model_dump().items() if name in names}
        known = None if store is None or self._recogniser is None else _StoredFaces(store, self._recogniser)
        return import_references(ImportSettings(**wanted), self._recogniser, known)


def _recogniser_identity(recogniser: Recogniser) -> dict[str, Any]:
    """What faces follow from, besides the photos."""
    return {**recogniser.identity, "settings": recogniser.settings.model_dump(mode="json")}


class _StoredFaces:
    """The faces of photos, in the store, under who looked for them."""

    def __init__(self, store: Store, recogniser: Recogniser) -> None:
        self._store = store
        self._identity = json.dumps(_recogniser_identity(recogniser), sort_keys=True, default=dict)

    def find(self, keys: Sequence[str]) -> dict[str, tuple[KnownFace, ...]]:
        """Those of photos that were looked at."""
        found = self._store.find([self._key(key) for key in keys])
        return {key: _faces_of(str(found[mark])) for key in keys if (mark := self._key(key)) in found}

    def save(self, found: Mapping[str, tuple[KnownFace, ...]]) -> None:
        """Keep the faces of these photos."""
        self._store.save((self._key(key), "look", _as_text(faces)) for key, faces in found.items())

    def _key(self, key: str) -> bytes:
        return Recipe.key("look", self._identity, key)


def _as_text(faces: Sequence[KnownFace]) -> str:
    """Boxes as they are, and embeddings as the bytes of little-endian float32 numbers."""
    rows = [[asdict(face.box), base64.b64encode(face.embedding.astype("<f4").tobytes()).decode()] for face in faces]
    return json.dumps(rows, default=float)


def _faces_of(text: str) -> tuple[KnownFace, ...]:
    return tuple(
        KnownFace(FaceBox(**box), np.frombuffer(base64.b64decode(code), "<f4").astype(np.float32))
        for box, code in json.loads(text)
    )


def _listing(source: str) -> str:
    """A hash of the names, sizes and times of the files at an address; of a glob or braces, of what they begin with."""
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
    """Read a source that collects into the store, unless this very content is there; (references, rejections).

    If it is killed, the next one reads all again, and has the faces that were found from the store. Reference number n
    lies under the key of Recipe.request("import", ...). `report` is told how many there are so far.
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
                store.save(
                    waiting, overwrite=True
                )  # a kill before may have left others, under numbers that do not hold
                report(count)
                waiting = []
        store.save(waiting, overwrite=True)
        noted = {"count": count, "rejections": [vars(one) for one in rejections]}
        store.write_note(f"import {identity}", noted)
    return noted["count"], [Rejection(**one) for one in noted["rejections"]]


def import_key(identity: str, number: int) -> bytes:
    """The key of a reference in the store."""
    return Recipe.key("import", identity, number)


def people_of(identity: str, count: int, store: Store) -> Iterator[tuple[int, Reference]]:
    """The numbered references of a source that collected, without their pictures being kept."""
    for number in range(count):
        key = import_key(identity, number)
        found: Result = store.find([key])[key]
        assert isinstance(found, Reference), "a source collects references"
        yield number, found
