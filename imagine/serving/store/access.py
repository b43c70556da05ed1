"""API keys, the limit of requests per minute, and the workers that have shown a sign of life.

A key is `imagine_ID_SECRET`. Only the SHA-256 of the secret is stored; the secret is random, so a slow hash would add
nothing. The id of the key is the owner of all that is made with it.
"""

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa

from imagine.serving.store.database import Database
from imagine.serving.store.records import draw_id
from imagine.serving.store.tables import buckets, keys, workers

PREFIX = "imagine"


class Access:
    """The tables `keys`, `buckets` and `workers`."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self.database, self.clock = database, clock

    def create_key(self, name: str) -> str:
        """Make a key and return it; it cannot be shown again."""
        key, secret = draw_id("key"), secrets.token_hex(32)
        row = {"id": key, "hash": _hash(secret), "name": name, "created": self.clock()}
        with self.database.writing() as connection:
            connection.execute(keys.insert(), row)
        return f"{PREFIX}_{key.removeprefix('key_')}_{secret}"

    def owner_of(self, key: str) -> str | None:
        """Return the owner that a key stands for; None if the key is unknown or revoked."""
        parts = key.split("_")
        if len(parts) != 3 or parts[0] != PREFIX or not key.isascii():
            return None
        with self.database.reading() as connection:
            row = connection.execute(sa.select(keys).where(keys.c.id == f"key_{parts[1]}")).one_or_none()
        expected = row.hash if row is not None else _hash("")
        matches = hmac.compare_digest(_hash(parts[2]), expected)
        return str(row.id) if row is not None and matches and row.revoked is None else None

    def revoke_key(self, key: str) -> bool:
        """Revoke the key with this id; return whether it was valid."""
        with self.database.writing() as connection:
            query = keys.update().where(keys.c.id == key, keys.c.revoked.is_(None)).values(revoked=self.clock())
            return bool(connection.execute(query).rowcount)

    def list_keys(self) -> list[Any]:
        """Return rows with id, name, creation and revocation of all keys, the oldest first."""
        query = sa.select(keys.c.id, keys.c.name, keys.c.created, keys.c.revoked).order_by(keys.c.created)
        with self.database.reading() as connection:
            return list(connection.execute(query).all())

    def has_keys(self) -> bool:
        """Return whether there is a valid key."""
        with self.database.reading() as connection:
            return connection.scalar(sa.select(keys.c.id).where(keys.c.revoked.is_(None)).limit(1)) is not None

    def take_token(self, owner: str, per_minute: float) -> float:
        """Count one request of an owner. Return 0, or after how many seconds the next one is accepted.

        A token bucket: it holds as many requests as a minute allows, and fills evenly.
        """
        now = self.clock()
        with self.database.writing() as connection:
            row = connection.execute(sa.select(buckets).where(buckets.c.owner == owner)).one_or_none()
            tokens = per_minute if row is None else row.tokens + max(0.0, now - row.at) * per_minute / 60
            tokens = min(per_minute, tokens)
            left = tokens - 1 if tokens >= 1 else tokens
            if row is None:
                connection.execute(buckets.insert(), {"owner": owner, "tokens": left, "at": now})
            else:
                connection.execute(buckets.update().where(buckets.c.owner == owner).values(tokens=left, at=now))
        return 0.0 if tokens >= 1 else (1 - tokens) * 60 / per_minute

    # --- workers ----------------------------------------------------------------------------------------------------

    def beat(self, worker: str, facts: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
        """Record that a worker is alive, what it has loaded, and its counts."""
        now, values = self.clock(), {"facts": json.dumps(facts), "counts": json.dumps(counts)}
        with self.database.writing() as connection:
            query = workers.update().where(workers.c.id == worker).values(beat=now, **values)
            if not connection.execute(query).rowcount:
                connection.execute(workers.insert(), {"id": worker, "started": now, "beat": now, **values})

    def living_workers(self, within: float) -> list[dict[str, Any]]:
        """Return id, facts and counts of the workers whose last sign of life is not older than `within` seconds."""
        query = sa.select(workers).where(workers.c.beat >= self.clock() - within).order_by(workers.c.started)
        with self.database.reading() as connection:
            rows = connection.execute(query).all()
        return [{"id": row.id, "facts": json.loads(row.facts), "counts": json.loads(row.counts)} for row in rows]

    def forget_worker(self, worker: str) -> None:
        """Delete the row of a worker that has ended."""
        with self.database.writing() as connection:
            connection.execute(workers.delete().where(workers.c.id == worker))

    def forget_silent(self, within: float) -> None:
        """Delete the rows of workers without a sign of life for so long."""
        with self.database.writing() as connection:
            connection.execute(workers.delete().where(workers.c.beat < self.clock() - within))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
