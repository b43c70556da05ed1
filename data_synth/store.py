"""All results of a build in one SQLite file, each under the hash of what it follows from; only the driver opens it.

A row is either there, whole, or not: results are written in transactions, and with a write-ahead log a process that is
killed loses no finished one. So a build that is started again asks only for what is missing, and one with another
threshold for nothing at all. Rows of settings that nobody uses any more stay, in case somebody goes back to them.
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
_KEYS_PER_QUERY = 500  # keys a query: SQLite takes a limited number of parameters


class Store:
    """Results by key, and notes by name; a context manager. Raises ConfigError if the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")  # a kill loses nothing; a power cut, the last rows
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _FORMAT):
                raise ConfigError(f"{path} was written by another version: give another folder, or delete it.")
            self._connection.executescript(f"{_SCHEMA} PRAGMA user_version = {_FORMAT};")
            # Two drivers would do everything twice. Held until this one ends, however it does.
            self._lock = sqlite3.connect(path.with_suffix(".lock"), timeout=0, isolation_level=None)
            self._lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            why = "another build is at work in it" if "locked" in str(error) else str(error)
            raise ConfigError(f"{path} cannot be used ({why}): wait for it, or give another folder.") from error
        except (OSError, sqlite3.DatabaseError) as error:
            raise ConfigError(f"{path} cannot be used ({error}): give another folder.") from error

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._lock.close()

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Result]:
        """Those of the results that are there."""
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
        """Keep (key, step, result) rows: all of them, or none if this is killed.

        A key that is there stays as it is; anew: its result is replaced.
        """
        rows = [(key, step, *_encode(result)) for key, step, result in results]
        how = "REPLACE" if overwrite else "IGNORE"
        with _transaction(self._connection):
            self._connection.executemany(f"INSERT OR {how} INTO results VALUES (?, ?, ?, ?)", rows)

    def read_note(self, name: str) -> Any:
        """What is noted under that name; None if nothing is."""
        row = self._connection.execute("SELECT body FROM notes WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def write_note(self, name: str, body: Any) -> None:
        """Note something that JSON can say, in place of what was noted under that name."""
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
    """A result as JSON, and the picture that belongs to it."""
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
