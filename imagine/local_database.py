"""One SQLite file that several people write through a small local server: a review of pairs, or a study of pictures.

It uses a rollback journal and no write-ahead log: people write about one row per second, and the file remains a single
one that can be sent to others.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from pathlib import Path

from imagine.errors import ConfigError


def create_tables(database: Path, schema: Sequence[str]) -> None:
    """Create the tables, unless the file has some; the program may have been killed while it created the file.

    Raises ConfigError if the file cannot be used.
    """
    try:
        with closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in schema:
                    connection.execute(statement)
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"{database} cannot be used ({error}): move it away, or choose another folder.") from error


@contextmanager
def transaction(
    database: Path, version: int, missing: str, other_version: str, write: bool = False
) -> Iterator[sqlite3.Connection]:
    """Open a connection with one transaction, which is committed completely or not at all.

    `version` is the file's `user_version`. Raises ConfigError with the sentence `missing` if there is no file, with
    `other_version` if it has another version, and with one of its own if the file cannot be used.
    """
    if not database.is_file():
        raise ConfigError(missing)
    address = f"{database.resolve().as_uri()}?mode=rw"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=30, isolation_level=None)) as connection:
            if connection.execute("PRAGMA user_version").fetchone()[0] != version:
                raise ConfigError(other_version)
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            with connection:
                yield connection
    except sqlite3.IntegrityError:
        raise  # an error in this program, not in the file
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"{database} cannot be used ({error}): try again, or move it away.") from error


def now() -> str:
    """Return the time in UTC, to the millisecond, in ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
