"""Hand events of jobs to the requests that follow them, however many: one look at the store serves all of them."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

from starlette.concurrency import run_in_threadpool

from imagine.serving.store.records import Event
from imagine.serving.store.store import Store

LOG = logging.getLogger("imagine.serving")
LOOK = 0.05  # seconds between looks while somebody follows
ENDS = ("succeeded", "failed", "canceled", "expired")  # kinds of the last event of a job
OVERLAP = 200  # on PostgreSQL a transaction may commit an event after one with a higher id


class Feed:
    """Looks for new events while somebody follows. `closing` is set when the server shuts down."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.closing = asyncio.Event()
        self._followers: dict[str, set[asyncio.Queue[Event | None]]] = {}
        self._someone = asyncio.Event()
        self._overlap = 0 if store.database.is_sqlite else OVERLAP

    @asynccontextmanager
    async def follow(self, jobs: Iterable[str]) -> AsyncIterator["asyncio.Queue[Event | None]"]:
        """Give a queue of the events of these jobs from now on; None in it means that the server shuts down."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        followed = set(jobs)
        for job in followed:
            self._followers.setdefault(job, set()).add(queue)
        self._someone.set()
        try:
            yield queue
        finally:
            for job in followed:
                self._followers[job].discard(queue)
                if not self._followers[job]:
                    del self._followers[job]

    def close(self) -> None:
        """End all streams, so that the server can shut down."""
        self.closing.set()
        for queues in self._followers.values():
            for queue in queues:
                queue.put_nowait(None)

    async def run(self) -> None:
        """Look for events and hand them out until the task is canceled."""
        newest: int | None = None
        while True:
            if not self._followers:
                newest = None
                self._someone.clear()
                await self._someone.wait()
            try:
                if newest is None:
                    newest = await run_in_threadpool(self.store.jobs.newest_event)
                    self._wake_all()  # what happened before this look is read by the followers themselves
                found = await run_in_threadpool(self.store.jobs.events_after, newest - self._overlap)
            except Exception as error:  # a database that is away for a moment
                LOG.warning("no look at events", extra={"reason": type(error).__name__})
                await asyncio.sleep(1)
                continue
            for event in found:
                newest = max(newest, event.id)
                for queue in self._followers.get(event.job, ()):
                    queue.put_nowait(event)
            await asyncio.sleep(LOOK)

    def _wake_all(self) -> None:
        """Make every follower read the events of its job that came before."""
        for job, queues in self._followers.items():
            for queue in queues:
                queue.put_nowait(Event(0, job, "look", {}, time.time()))


def events_of(feed: Feed, job: str, after: int, patience: float) -> AsyncIterator[Event | None]:
    """Return the events of one job, as `events_of_jobs` does."""
    return events_of_jobs(feed, {job: after}, patience)


async def events_of_jobs(feed: Feed, after: Mapping[str, int], patience: float) -> AsyncIterator[Event | None]:
    """Yield the events of jobs until all have ended, or the server has; None after each silence.

    after: for each job the id of the last event that is known, 0 for none. patience: seconds of silence. Every event
    comes once, and those of one job in order, whatever was missed in between.
    """
    seen, live = dict(after), set(after)
    async with feed.follow(after) as queue:
        pending: list[Event] = []
        for job in after:
            pending += await run_in_threadpool(feed.store.jobs.events_after, seen[job], job)
        pending.sort(key=lambda event: event.id)
        while True:
            for event in pending:
                if event.id > seen[event.job]:
                    seen[event.job] = event.id
                    if event.kind in ENDS:
                        live.discard(event.job)
                    yield event
            if not live:
                return
            try:
                event_or_end = await asyncio.wait_for(queue.get(), patience)
            except asyncio.TimeoutError:
                yield None
                pending = []
                continue
            if event_or_end is None:
                return
            if event_or_end.kind == "look":
                job = event_or_end.job
                pending = await run_in_threadpool(feed.store.jobs.events_after, seen[job], job)
            else:
                pending = [event_or_end]
