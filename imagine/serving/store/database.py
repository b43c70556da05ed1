"""Open the database: SQLite with a write-ahead log by default, or PostgreSQL by URL, brought to the newest tables.

Every change is one short transaction. On SQLite it takes the write lock at its beginning, so that two processes never
fail half-way for a lock; readers are not held up by it. Deleted rows are overwritten (secure_delete).
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from imagine.errors import ConfigError

MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATING = 0x696D6167  # key of PostgreSQL's advisory lock while tables change


class Database:
    """A pool of connections. `writing` and `reading` give one of them for one transaction."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError if the URL cannot be used or the database cannot be opened."""
        try:
            self.engine = sa.create_engine(
                url, **({"connect_args": {"timeout": 30}} if url.startswith("sqlite") else {"pool_pre_ping": True})
            )
        except (SQLAlchemyError, ImportError) as error:
            raise ConfigError(
                f"The database {_without_password(url)} cannot be used ({_first_line(error)}): give sqlite:///FILE or "
                "postgresql+psycopg://USER:PASSWORD@HOST/NAME."
            ) from error
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        if self.is_sqlite:
            sa.event.listen(self.engine, "connect", _set_up_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)

    def migrate(self) -> None:
        """Create the tables, or bring them to the newest version. Raises ConfigError if that fails."""
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        try:
            with self.writing() as connection:
                if not self.is_sqlite:
                    connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_MIGRATING})"))
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except OperationalError as error:
            raise ConfigError(
                f"The database {self.engine.url.render_as_string()} cannot be opened ({_first_line(error)}): check "
                "that it runs, and that this user may write to it."
            ) from error

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """Give a connection in a transaction that may write, and commit it."""
        with self.engine.connect().execution_options(imagine_writes=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Give a connection in a transaction that only reads."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    def dispose(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _set_up_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # `_begin_sqlite` begins transactions
    for setting in ("journal_mode=WAL", "synchronous=NORMAL", "secure_delete=ON", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {setting}")


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("imagine_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _first_line(error: BaseException) -> str:
    return str(getattr(error, "orig", None) or error).strip().split("\n")[0].rstrip(".")


def _without_password(url: str) -> str:
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return url.split("@")[-1]
