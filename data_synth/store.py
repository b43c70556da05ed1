"""Store all results of a build in one SQLite file, each under the hash of its inputs; only the driver opens it.

Results are written in transactions with a write-ahead log, so a killed process leaves no partial row and loses no
finished transaction. A resumed build computes only the missing results, and a changed threshold repeats no work. Rows
of earlier settings are not deleted, so a build can return to those settings.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

from data_synth.backends.contracts import Failed
from data_synth.records import Candidate, Measures, Reference, Rejection
from imagine.errors import ConfigError

FILE = "store.sqlite"
Result = str | Reference | Candidate | Measures | Rejection | Failed

_FORMAT = 1
_KINDS: Mapping[str, Any] = {kind.__name__: kind for kind in (Reference, Candidate, Measures, Rejection, Failed)}
_SCHEMA = """
CREATE TABLE IF NOT EXISTS results (key BLOB PRIMARY KEY, step TEXT NOT NULL, body TEXT NOT NULL, picture BLOB);
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
"""
_KEYS_PER_QUERY = 500  # SQLite limits the number of parameters


class Store:
    """Results by key, and JSON notes by name; a context manager. Raises ConfigError if the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode = WAL")
            # a kill loses nothing; a power failure loses the last rows
            self._connection.execute("PRAGMA synchronous = NORMAL")
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _FORMAT):
                raise ConfigError(
                    f"{path} was written by another version of this program: choose another folder, or delete the file."
                )
            self._connection.executescript(f"{_SCHEMA} PRAGMA user_version = {_FORMAT};")
            # Two drivers would compute everything twice. The operating system releases the lock when the process ends.
            self._lock = sqlite3.connect(path.with_suffix(".lock"), timeout=0, isolation_level=None)
            self._lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            why = "another build is using it" if "locked" in str(error) else str(error)
            raise ConfigError(
                f"{path} cannot be used ({why}): wait until it is free, or choose another folder."
            ) from error
        except (OSError, sqlite3.DatabaseError) as error:
            raise ConfigError(f"{path} cannot be used ({error}): choose another folder.") from error

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._lock.close()

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Result]:
        """Return the stored results among these keys."""
        found: dict[bytes, Result] = {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            some = keys[start : start + _KEYS_PER_QUERY]
            placeholders = ",".join("?" * len(some))
            rows = self._connection.execute(
                f"SELECT key, body, picture FROM results WHERE key IN ({placeholders})", some
            )
            found |= {key: _decode(body, picture) for key, body, picture in rows}
        return found

    def save(self, results: Iterable[tuple[bytes, str, Result]], overwrite: bool = False) -> None:
        """Store (key, step, result) rows in one transaction: all of them, or none if the process is killed.

        An existing key keeps its result, unless `overwrite` is true.
        """
        rows = [(key, step, *_encode(result)) for key, step, result in results]
        how = "REPLACE" if overwrite else "IGNORE"
        with _transaction(self._connection):
            self._connection.executemany(f"INSERT OR {how} INTO results VALUES (?, ?, ?, ?)", rows)

    def read_note(self, name: str) -> Any:
        """Return the note with this name, or None."""
        row = self._connection.execute("SELECT body FROM notes WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def write_note(self, name: str, body: Any) -> None:
        """Store a JSON value under this name, in place of an earlier one."""
        self._connection.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, json.dumps(body)))


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _encode(result: Result) -> tuple[str, bytes | None]:
    """Encode a result as JSON and its picture, if it has one."""
    if isinstance(result, str):
        return json.dumps(["str", result]), None
    facts = {spec.name: getattr(result, spec.name) for spec in fields(result)}
    picture = facts.pop("image", None)
    return json.dumps([type(result).__name__, facts]), picture


def _decode(body: str, picture: bytes | None) -> Result:
    kind, facts = json.loads(body)
    if kind == "str":
        return str(facts)
    known = facts if picture is None else {**facts, "image": picture}
    result: Result = _KINDS[kind](**known)
    return result
