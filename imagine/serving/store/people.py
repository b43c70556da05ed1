"""Uploaded photos and personas: rows with an owner and an end, and files that are really deleted.

A photo is stored upright as bare pixels, without the metadata of the original file, and only until it is encoded or its
hour is over. A persona is kept until its owner deletes it or its consent expires.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from imagine.serving.store.database import Database
from imagine.serving.store.files import Files
from imagine.serving.store.tables import personas, pictures, uploads


@dataclass(frozen=True)
class Upload:
    """One uploaded file: a photo, or a persona's file. `sha256` is that of what the client sent."""

    id: str
    owner: str
    kind: str
    sha256: str
    width: int
    height: int
    created: float
    expires: float


@dataclass(frozen=True)
class StoredPersona:
    """One persona. `consent` says on what basis the person is shown; `faces` what was understood from each photo."""

    id: str
    owner: str
    name: str
    encoder: str
    photos: int
    consent: str | None
    faces: list[dict[str, Any]]
    created: float
    expires: float


class People:
    """The tables `uploads` and `personas`, and their files."""

    def __init__(self, database: Database, files: Files, clock: Callable[[], float] = time.time) -> None:
        self.database, self.files, self.clock = database, files, clock

    def add_upload(self, upload: Upload) -> None:
        """Add the row of a file that is already written."""
        with self.database.writing() as connection:
            connection.execute(uploads.insert(), vars(upload))

    def upload(self, upload: str, owner: str) -> Upload | None:
        """Return an owner's upload, unless its time is over."""
        query = sa.select(uploads).where(
            uploads.c.id == upload, uploads.c.owner == owner, uploads.c.expires > self.clock()
        )
        with self.database.reading() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else Upload(**row._mapping)

    def delete_uploads(self, chosen: Sequence[str], owner: str) -> int:
        """Delete uploads of an owner with their files; return how many there were."""
        if not chosen:
            return 0
        query = uploads.delete().where(uploads.c.id.in_(chosen), uploads.c.owner == owner).returning(uploads.c.id)
        with self.database.writing() as connection:
            found = list(connection.scalars(query))
        for each in found:
            self.files.remove_upload(each)
        return len(found)

    def add_persona(self, connection: sa.Connection, persona: StoredPersona) -> None:
        """Add the row of a persona, whose file is already written, within a transaction."""
        connection.execute(personas.insert(), {**vars(persona), "faces": json.dumps(persona.faces)})

    def persona(self, persona: str, owner: str) -> StoredPersona | None:
        """Return an owner's persona, unless its time is over."""
        query = sa.select(personas).where(
            personas.c.id == persona, personas.c.owner == owner, personas.c.expires > self.clock()
        )
        with self.database.reading() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _persona(row)

    def list_personas(self, owner: str) -> list[StoredPersona]:
        """Return an owner's personas, the newest first."""
        query = sa.select(personas).where(personas.c.owner == owner, personas.c.expires > self.clock())
        with self.database.reading() as connection:
            return [_persona(row) for row in connection.execute(query.order_by(personas.c.created.desc()))]

    def change_persona(self, persona: str, owner: str, changes: Mapping[str, Any]) -> StoredPersona | None:
        """Change the name or the end of an owner's persona."""
        if changes:
            with self.database.writing() as connection:
                connection.execute(
                    personas.update().where(personas.c.id == persona, personas.c.owner == owner).values(**changes)
                )
        return self.persona(persona, owner)

    def delete_persona(self, persona: str, owner: str) -> bool:
        """Delete an owner's persona with its file; return whether there was one."""
        query = personas.delete().where(personas.c.id == persona, personas.c.owner == owner)
        with self.database.writing() as connection:
            found = bool(connection.execute(query).rowcount)
        if found:
            self.files.remove_persona(persona)
        return found

    def delete_outdated(self) -> int:
        """Delete uploads, personas and pictures whose time is over, with their files; return how many."""
        now, found = self.clock(), {}
        with self.database.writing() as connection:
            for table in (uploads, personas, pictures):
                query = table.delete().where(table.c.expires < now).returning(table.c.id)
                found[table.name] = list(connection.scalars(query))
        for upload in found["uploads"]:
            self.files.remove_upload(upload)
        for persona in found["personas"]:
            self.files.remove_persona(persona)
        self.files.remove_pictures(found["pictures"])
        return sum(map(len, found.values()))

    def is_known(self, name: str) -> bool:
        """Return whether a file of this id has a row."""
        with self.database.reading() as connection:
            return any(
                connection.scalar(sa.select(table.c.id).where(table.c.id == name)) is not None
                for table in (uploads, personas, pictures)
            )


def _persona(row: "sa.Row[Any]") -> StoredPersona:
    return StoredPersona(**{**row._mapping, "faces": json.loads(row.faces)})
