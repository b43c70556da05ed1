"""The durable queue: accept, claim, finish, cancel and expire jobs.

    queued  -> running | canceled | expired
    running -> succeeded | failed | canceled, or queued again if its worker is lost

A state on the right of the second line never changes. A worker claims a job with a lease and a new attempt number; each
of its later changes names both the worker's attempt and the state "running", so that a worker that lost its lease
changes nothing. Work is thus done at least once, and its result is recorded once.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from imagine.serving.store.database import Database
from imagine.serving.store.records import ENDED, Event, Job, Kind, NewPicture, draw_id
from imagine.serving.store.tables import events, jobs, pictures

WORKER_LOST = "Its worker stopped {attempts} times while it ran this job; ask again, with fewer or smaller pictures."


class QueueFullError(Exception):
    """Raised when no more jobs are accepted; `own` says whether this owner alone has too many."""

    def __init__(self, own: bool) -> None:
        super().__init__("queue full")
        self.own = own


class IdempotencyError(Exception):
    """Raised when an idempotency key comes with another request than before."""


@dataclass(frozen=True)
class Admission:
    """What is to be accepted: a request as JSON data, and how long its job may wait and is kept, in seconds.

    fingerprint: what makes two requests the same, if not `request`, whose photos get new ids each time.
    """

    owner: str
    kind: Kind
    request: Mapping[str, Any]
    seeds: Sequence[int]
    deadline: float
    keep: float
    idempotency_key: str | None = None
    fingerprint: Any = None

    @property
    def hash(self) -> str:
        """Return a hash of the request, by which a repeated one is known."""
        same = self.request if self.fingerprint is None else self.fingerprint
        return hashlib.sha256(json.dumps([self.kind, same], sort_keys=True).encode()).hexdigest()


class Jobs:
    """The tables `jobs`, `pictures` and `events`. `clock` returns seconds since 1970."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self.database, self.clock = database, clock

    # --- by the routes ----------------------------------------------------------------------------------------------

    def admit(self, wanted: Admission, most: int, most_of_owner: int) -> tuple[Job, bool]:
        """Accept a job. Return it, and whether it is new: a known idempotency key returns the job that it made.

        Raises QueueFullError if `most` jobs of all, or `most_of_owner` jobs of the owner, have not ended, and
        IdempotencyError if the key came with another request.
        """
        now = self.clock()
        with self.database.writing() as connection:
            if (known := self._known(connection, wanted)) is not None:
                return known, False
            open_jobs = sa.select(sa.func.count()).where(jobs.c.state.in_(("queued", "running")))
            if (connection.scalar(open_jobs.where(jobs.c.owner == wanted.owner)) or 0) >= most_of_owner:
                raise QueueFullError(own=True)
            if (connection.scalar(open_jobs) or 0) >= most:
                raise QueueFullError(own=False)
            row = connection.execute(
                jobs.insert().returning(jobs),
                {
                    "id": draw_id("job"), "owner": wanted.owner, "kind": wanted.kind,
                    "request": json.dumps(wanted.request), "request_hash": wanted.hash,
                    "idempotency_key": wanted.idempotency_key, "seeds": json.dumps(list(wanted.seeds)),
                    "count": max(1, len(wanted.seeds)), "state": "queued", "attempt": 0, "losses": 0,
                    "cancel_requested": False, "step": 0, "steps": 0, "created": now,
                    "deadline": now + wanted.deadline, "expires": now + wanted.keep,
                },
            ).one()  # fmt: skip
            job = Job.of(row, self._position(connection, row))
            self._add_event(connection, job.id, "queued", {"position": job.position})
        return job, True

    def _known(self, connection: sa.Connection, wanted: Admission) -> Job | None:
        if wanted.idempotency_key is None:
            return None
        query = sa.select(jobs).where(jobs.c.owner == wanted.owner, jobs.c.idempotency_key == wanted.idempotency_key)
        row = connection.execute(query).one_or_none()
        if row is None:
            return None
        if row.request_hash != wanted.hash:
            raise IdempotencyError("another request")
        return Job.of(row)

    def find(self, job: str, owner: str | None = None) -> Job | None:
        """Return a job, of this owner if one is given."""
        with self.database.reading() as connection:
            row = connection.execute(sa.select(jobs).where(jobs.c.id == job)).one_or_none()
            if row is None or (owner is not None and row.owner != owner):
                return None
            return Job.of(row, self._position(connection, row))

    def retry_of(self, owner: str, wanted: Admission, since: float) -> Job | None:
        """Return the owner's newest job with the same request that is not failed and not older than `since`."""
        query = (
            sa.select(jobs)
            .where(jobs.c.owner == owner, jobs.c.request_hash == wanted.hash, jobs.c.created >= since)
            .where(jobs.c.state.in_(("queued", "running", "succeeded")))
            .order_by(jobs.c.created.desc())
            .limit(1)
        )
        with self.database.reading() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else Job.of(row)

    def page(
        self, owner: str, state: str | None, before: tuple[float, str] | None, limit: int, kind: str | None = None
    ) -> list[Job]:
        """Return an owner's jobs, the newest first; `before` is the creation time and id of the last one seen."""
        query = sa.select(jobs).where(jobs.c.owner == owner)
        if kind is not None:
            query = query.where(jobs.c.kind == kind)
        if state is not None:
            query = query.where(jobs.c.state == state)
        if before is not None:
            query = query.where(sa.tuple_(jobs.c.created, jobs.c.id) < sa.tuple_(*before))
        with self.database.reading() as connection:
            rows = connection.execute(query.order_by(jobs.c.created.desc(), jobs.c.id.desc()).limit(limit)).all()
        return [Job.of(row) for row in rows]

    def pictures_of(self, job: str) -> "list[sa.Row[Any]]":
        """Return the rows of a job's pictures, in their order."""
        query = sa.select(pictures).where(pictures.c.job == job).order_by(pictures.c.number)
        with self.database.reading() as connection:
            return list(connection.execute(query).all())

    def picture(self, picture: str, owner: str) -> "sa.Row[Any] | None":
        """Return the row of an owner's picture."""
        query = sa.select(pictures).where(pictures.c.id == picture, pictures.c.owner == owner)
        with self.database.reading() as connection:
            return connection.execute(query).one_or_none()

    def cancel(self, job: str, owner: str) -> Job | None:
        """Cancel a job: at once if it is queued, at the next step if it runs. An ended job does not change."""
        with self.database.writing() as connection:
            mine = (jobs.c.id == job, jobs.c.owner == owner)
            done = connection.execute(
                jobs.update()
                .where(*mine, jobs.c.state == "queued")
                .values(state="canceled", finished=self.clock(), cancel_requested=True)
            )
            if done.rowcount:
                self._add_event(connection, job, "canceled", {})
            else:
                connection.execute(jobs.update().where(*mine, jobs.c.state == "running").values(cancel_requested=True))
        return self.find(job, owner)

    def delete(self, job: str) -> list[str]:
        """Delete a job with its pictures and events; return the ids of the pictures, whose files are to be removed."""
        with self.database.writing() as connection:
            found = list(connection.scalars(sa.select(pictures.c.id).where(pictures.c.job == job)))
            connection.execute(pictures.delete().where(pictures.c.job == job))
            connection.execute(events.delete().where(events.c.job == job))
            connection.execute(jobs.delete().where(jobs.c.id == job))
        return found

    def delete_picture(self, picture: str, owner: str) -> bool:
        """Delete the row of an owner's picture; return whether there was one."""
        with self.database.writing() as connection:
            query = pictures.delete().where(pictures.c.id == picture, pictures.c.owner == owner)
            return bool(connection.execute(query).rowcount)

    # --- by a worker ------------------------------------------------------------------------------------------------

    def claim(self, worker: str, room: int, lease: float, empty: bool = False) -> list[Job]:
        """Claim the next jobs for up to `room` pictures, in turn over the owners; short jobs come first.

        An owner's jobs queue behind those of owners who have fewer in work. The queue stops at a job that does not fit,
        so that a large one is not overtaken for ever; if the worker is `empty`, the first one always fits.
        """
        now, claimed = self.clock(), list[Job]()
        with self.database.reading() as connection:
            candidates = connection.execute(_in_turn(), {"most": max(room, 1)}).all()
        if not candidates:
            return []
        with self.database.writing() as connection:
            for job, count, is_short in candidates:
                if not is_short and count > room and not (empty and not claimed):
                    break
                row = connection.execute(
                    jobs.update()
                    .where(jobs.c.id == job, jobs.c.state == "queued")
                    .values(
                        state="running", attempt=jobs.c.attempt + 1, worker=worker, lease_until=now + lease,
                        started=now, step=0, steps=0, stage=None,
                    )
                    .returning(jobs)
                ).one_or_none()  # fmt: skip
                if row is not None:
                    claimed.append(Job.of(row))
                    room -= 0 if is_short else count
                    self._add_event(connection, job, "started", {"attempt": row.attempt})
        return claimed

    def renew(self, worker: str, lease: float) -> None:
        """Extend the leases of all jobs that a worker runs."""
        with self.database.writing() as connection:
            connection.execute(
                jobs.update()
                .where(jobs.c.worker == worker, jobs.c.state == "running")
                .values(lease_until=self.clock() + lease)
            )

    def canceled_of(self, worker: str) -> set[tuple[str, int]]:
        """Return id and attempt of the running jobs of a worker that are to be canceled."""
        query = sa.select(jobs.c.id, jobs.c.attempt).where(
            jobs.c.worker == worker, jobs.c.state == "running", jobs.c.cancel_requested.is_(True)
        )
        with self.database.reading() as connection:
            return {(job, attempt) for job, attempt in connection.execute(query)}

    def report(
        self, progress: Iterable[tuple[Job, str, int, int]], previews: Iterable[tuple[Job, dict[str, Any]]]
    ) -> None:
        """Store stage, step and number of steps of running jobs, and previews, as events, in one transaction."""
        with self.database.writing() as connection:
            for job, stage, step, steps in progress:
                done = connection.execute(_mine(job).values(stage=stage, step=step, steps=steps))
                if done.rowcount:
                    self._add_event(connection, job.id, "progress", {"stage": stage, "step": step, "steps": steps})
            for job, preview in previews:
                self._add_event(connection, job.id, "preview", preview)

    def succeed(
        self,
        job: Job,
        made: Sequence[NewPicture] = (),
        result: Mapping[str, Any] | None = None,
        also: Callable[[sa.Connection], None] | None = None,
    ) -> bool:
        """Record a job's result. Return False, and change nothing, if this attempt no longer holds the job.

        also: further changes of the same transaction.
        """
        now = self.clock()
        with self.database.writing() as connection:
            done = connection.execute(
                _mine(job).values(
                    state="succeeded", finished=now, lease_until=None, stage=None,
                    result=None if result is None else json.dumps(result),
                )
            )  # fmt: skip
            if not done.rowcount:
                return False
            for each in made:
                row = {**vars(each), "settings": json.dumps(each.settings)}
                row |= {"job": job.id, "owner": job.owner, "created": now, "expires": job.expires}
                connection.execute(pictures.insert(), row)
            if also is not None:
                also(connection)
            self._end(connection, job.id, "succeeded", {"pictures": [each.id for each in made]})
        return True

    def fail(self, job: Job, code: str, reason: str) -> bool:
        """Record that a job failed, and why. Return False if this attempt no longer holds the job."""
        return self._finish(job, "failed", error_code=code, error=reason)

    def end_canceled(self, job: Job) -> bool:
        """Record that a running job was canceled. Return False if this attempt no longer holds the job."""
        return self._finish(job, "canceled")

    def _finish(self, job: Job, state: str, **values: Any) -> bool:
        with self.database.writing() as connection:
            done = connection.execute(
                _mine(job).values(state=state, finished=self.clock(), lease_until=None, stage=None, **values)
            )
            if done.rowcount:
                body = {"code": values["error_code"], "message": values["error"]} if values else {}
                self._end(connection, job.id, state, body)
            return bool(done.rowcount)

    def release(self, worker: str | None, most_attempts: int, counted: bool = True) -> int:
        """Give back the running jobs of a worker, or of all workers; return how many.

        Those that lost their worker `most_attempts` times fail. If not `counted`, this time does not count, as when a
        worker stops in order. The attempt number rises with the next claim in either case.
        """
        where = jobs.c.state == "running"
        return self._give_back(where if worker is None else where & (jobs.c.worker == worker), most_attempts, counted)

    # --- by the sweeper ---------------------------------------------------------------------------------------------

    def release_lost(self, most_attempts: int) -> int:
        """Give back the running jobs whose lease has ended; return how many."""
        return self._give_back(
            (jobs.c.state == "running") & (jobs.c.lease_until < self.clock()), most_attempts, counted=True
        )

    def _give_back(self, where: "sa.ColumnElement[bool]", most_attempts: int, counted: bool) -> int:
        now = self.clock()
        with self.database.writing() as connection:
            rows = connection.execute(sa.select(jobs).where(where).with_for_update(skip_locked=True)).all()
            for row in rows:
                mine = jobs.update().where(jobs.c.id == row.id, jobs.c.attempt == row.attempt, where)
                if row.cancel_requested:
                    values: dict[str, Any] = {"state": "canceled", "finished": now}
                elif row.losses + counted >= most_attempts:
                    reason = WORKER_LOST.format(attempts=most_attempts)
                    values = {"state": "failed", "finished": now, "error_code": "worker_lost", "error": reason}
                else:
                    values = {"state": "queued"}
                losses = row.losses + counted
                connection.execute(mine.values(worker=None, lease_until=None, stage=None, losses=losses, **values))
                if values["state"] == "queued":
                    self._add_event(connection, row.id, "requeued", {"attempt": row.attempt})
                else:
                    body = {"code": "worker_lost", "message": values["error"]} if "error" in values else {}
                    self._end(connection, row.id, values["state"], body)
        return len(rows)

    def expire(self) -> int:
        """Expire queued jobs whose deadline has passed; return how many."""
        now = self.clock()
        late = (jobs.c.state == "queued") & (jobs.c.deadline < now)
        with self.database.writing() as connection:
            found = list(
                connection.scalars(
                    jobs.update()
                    .where(late)
                    .values(
                        state="expired", finished=now, error_code="deadline",
                        error="The job had not started before its deadline; ask again when the queue is shorter.",
                    )
                    .returning(jobs.c.id)
                )
            )  # fmt: skip
            for job in found:
                self._end(connection, job, "expired", {"code": "deadline"})
        return len(found)

    def outdated(self, limit: int = 200) -> list[str]:
        """Return ended jobs whose time to be kept is over."""
        query = sa.select(jobs.c.id).where(jobs.c.expires < self.clock(), jobs.c.state.in_(ENDED)).limit(limit)
        with self.database.reading() as connection:
            return list(connection.scalars(query))

    # --- events and numbers -----------------------------------------------------------------------------------------

    def events_after(self, event: int, job: str | None = None, limit: int = 500) -> list[Event]:
        """Return the events after the one with this id, of one job or of all, in their order."""
        query = sa.select(events).where(events.c.id > event)
        if job is not None:
            query = query.where(events.c.job == job)
        with self.database.reading() as connection:
            rows = connection.execute(query.order_by(events.c.id).limit(limit)).all()
        return [Event(row.id, row.job, row.kind, json.loads(row.body), row.at) for row in rows]

    def newest_event(self) -> int:
        """Return the id of the newest event; 0 if there is none."""
        with self.database.reading() as connection:
            return connection.scalar(sa.select(sa.func.max(events.c.id))) or 0

    def count_by_state(self) -> dict[tuple[str, str], int]:
        """Return the number of jobs of each kind in each state."""
        query = sa.select(jobs.c.kind, jobs.c.state, sa.func.count()).group_by(jobs.c.kind, jobs.c.state)
        with self.database.reading() as connection:
            return {(kind, state): count for kind, state, count in connection.execute(query)}

    def oldest_queued(self) -> float:
        """Return for how many seconds the oldest queued job has waited; 0 if there is none."""
        query = sa.select(sa.func.min(jobs.c.created)).where(jobs.c.state == "queued")
        with self.database.reading() as connection:
            created = connection.scalar(query)
        return 0.0 if created is None else max(0.0, self.clock() - created)

    def _position(self, connection: sa.Connection, row: "sa.Row[Any]") -> int | None:
        """Return how many jobs are claimed before this one, plus 1; None unless it is queued."""
        if row.state != "queued":
            return None
        order = _in_turn(limited=False).subquery()
        places = list(connection.scalars(sa.select(order.c.id)))
        return places.index(row.id) + 1 if row.id in places else None

    def _add_event(self, connection: sa.Connection, job: str, kind: str, body: Mapping[str, Any]) -> None:
        connection.execute(events.insert(), {"job": job, "kind": kind, "body": json.dumps(body), "at": self.clock()})

    def _end(self, connection: sa.Connection, job: str, state: str, body: Mapping[str, Any]) -> None:
        """Add the last event of a job, and delete its previews, which nobody needs any more."""
        connection.execute(events.delete().where(events.c.job == job, events.c.kind == "preview"))
        self._add_event(connection, job, state, body)


def _mine(job: Job) -> sa.Update:
    """Return an update of a job that acts only while this attempt holds it."""
    return jobs.update().where(jobs.c.id == job.id, jobs.c.attempt == job.attempt, jobs.c.state == "running")


def _in_turn(limited: bool = True) -> "sa.Select[Any]":
    """Return the query of the queued jobs in the order in which they are claimed: id, pictures, and whether short.

    A short job is no picture, takes a fraction of a second, and somebody waits for it.
    """
    running = (
        sa.select(jobs.c.owner, sa.func.sum(jobs.c.count).label("pictures"))
        .where(jobs.c.state == "running")
        .group_by(jobs.c.owner)
        .subquery()
    )
    is_short = (jobs.c.kind != "pictures").label("is_short")
    before = sa.func.sum(jobs.c.count).over(partition_by=jobs.c.owner, order_by=(jobs.c.created, jobs.c.id))
    place = before - jobs.c.count + sa.func.coalesce(running.c.pictures, 0)
    query = (
        sa.select(jobs.c.id, jobs.c.count, is_short)
        .select_from(jobs.outerjoin(running, running.c.owner == jobs.c.owner))
        .where(jobs.c.state == "queued")
        .order_by(is_short.desc(), place, jobs.c.created, jobs.c.id)
    )
    return query.limit(sa.bindparam("most")) if limited else query
