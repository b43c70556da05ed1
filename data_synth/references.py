"""Where a build's references come from, as numbered results in the store.

There are two kinds of sources. One that has a `count` draws any reference by its number, and its work is done like any
other step's (embedded.WorldPeople). One that can `collect` photos is read once from its first to its last, since
duplicates and strangers are found only by looking at all of them (Files); what it found is kept until a file changes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fsspec.core import url_to_fs
from pydantic import Field

from data_synth.importing import ImportSettings, import_references
from data_synth.local_models import identity_of
from data_synth.recognisers import make_recogniser
from data_synth.records import Reference, Rejection
from data_synth.steps import Recipe
from data_synth.store import Result, Store
from imagine.errors import ConfigError

VERSION = 2
_TOGETHER = 64  # results a transaction


class Files:
    """Photos from a folder, from shards, or grouped by person (importing.py), their faces found by a recogniser."""

    class Settings(ImportSettings):
        """Where they are, which can be used, and who finds their faces."""

        recogniser: str = "judge"  # a name or module:Class, see recognisers.py; "none": faces are not looked for
        recogniser_settings: dict[str, Any] = Field(default_factory=dict)

    def __init__(self, settings: "Files.Settings") -> None:
        self.settings = settings
        name = settings.recogniser
        self._recogniser = None if name == "none" else make_recogniser(name, settings.recogniser_settings)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Class, version, what is there, and who looks at it."""
        looked = {} if self._recogniser is None else dict(self._recogniser.identity)
        return identity_of(self, VERSION, files=_listing(self.settings.source), recogniser=looked)

    def load(self) -> None:
        """Load the recogniser."""
        if self._recogniser is not None:
            self._recogniser.load()

    def collect(self) -> Iterator[Reference | Rejection]:
        """Every photo there, in a fixed order."""
        names = ImportSettings.model_fields
        wanted = {name: value for name, value in self.settings.model_dump().items() if name in names}
        return import_references(ImportSettings(**wanted), self._recogniser)


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

    Reference number n lies under the key of Recipe.request("import", ...). `report` is told how many there are so far.
    """
    noted = store.note(f"import {identity}")
    if noted is None:
        source.load()
        rejections, waiting, count = [], [], 0
        for found in source.collect():
            if isinstance(found, Rejection):
                rejections.append(found)
                continue
            waiting.append((import_key(identity, count), "import", found))
            count += 1
            if len(waiting) == _TOGETHER:
                store.save(waiting)
                report(count)
                waiting = []
        store.save(waiting)
        noted = {"count": count, "rejections": [vars(one) for one in rejections]}
        store.take_note(f"import {identity}", noted)
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
