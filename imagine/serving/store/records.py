"""What the store hands out: frozen records of jobs, personas, pictures and events; and how ids are drawn."""

import json
import secrets
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

State = Literal["queued", "running", "succeeded", "failed", "canceled", "expired"]
ENDED = ("succeeded", "failed", "canceled", "expired")
Kind = Literal["pictures", "persona", "photo"]


def draw_id(prefix: str) -> str:
    """Return a new id, such as "job_" and 128 random bits, which cannot be guessed."""
    return f"{prefix}_{secrets.token_hex(16)}"


@dataclass(frozen=True)
class Job:
    """One accepted request. `position` is its place in the queue from 1, where that was asked for."""

    id: str
    owner: str
    kind: Kind
    request: dict[str, Any]
    seeds: list[int]
    count: int
    state: State
    attempt: int
    worker: str | None
    cancel_requested: bool
    stage: str | None
    step: int
    steps: int
    result: dict[str, Any] | None
    error_code: str | None
    error: str | None
    created: float
    started: float | None
    finished: float | None
    expires: float
    position: int | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @classmethod
    def of(cls, row: sa.Row[Any], position: int | None = None) -> "Job":
        """Return the job of a row of the table `jobs`."""
        plain = row._mapping
        return cls(
            **{
                name: plain[name]
                for name in (
                    "id", "owner", "kind", "count", "state", "attempt", "worker", "cancel_requested", "stage", "step",
                    "steps", "error_code", "error", "created", "started", "finished", "expires",
                )
            },
            request=json.loads(plain["request"]),
            seeds=json.loads(plain["seeds"]),
            result=None if plain["result"] is None else json.loads(plain["result"]),
            position=position,
        )  # fmt: skip


@dataclass(frozen=True)
class NewPicture:
    """A picture that a worker has written under its final name."""

    id: str
    number: int
    media: str
    sha256: str
    width: int
    height: int
    seed: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Event:
    """One thing that happened to a job."""

    id: int
    job: str
    kind: str
    body: dict[str, Any]
    at: float
