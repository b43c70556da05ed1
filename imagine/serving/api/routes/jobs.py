"""`/v1/jobs` and `/v1/events`: look at jobs, follow them, cancel and delete them."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Literal

from anyio.to_thread import run_sync
from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import StringConstraints

from imagine.serving.api.access import Owner, TheStore
from imagine.serving.api.errors import ApiError, not_found
from imagine.serving.api.feed import ENDS, events_of_jobs
from imagine.serving.api.schemas import JobAnswer, JobList
from imagine.serving.api.views import job_answer
from imagine.serving.store.records import Event, Job, Kind
from imagine.serving.store.store import Store

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
events_router = APIRouter(prefix="/v1/events", tags=["jobs"])
JobId = Annotated[str, Path(pattern=r"^job_[0-9a-f]{32}$")]
States = Literal["queued", "running", "succeeded", "failed", "canceled", "expired"]
JobToFollow = Annotated[str, StringConstraints(pattern=r"^job_[0-9a-f]{32}(\.[0-9]{1,18})?$")]
MOST_FOLLOWED = 32  # jobs in one stream
STREAMED = {"cache-control": "no-store", "x-accel-buffering": "no"}
PING = 15.0  # seconds of silence after which proxies may close a stream
QUEUE_PING = 1.0  # seconds after which a client in the queue learns its position again


@router.get("", response_model=JobList)
async def list_jobs(
    owner: Owner,
    store: TheStore,
    state: States | None = None,
    kind: Kind | None = None,
    cursor: Annotated[str | None, Query(pattern=r"^\d{1,12}(\.\d{1,9})?-job_[0-9a-f]{32}$")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> JobList:
    """Return the owner's jobs, the newest first."""
    before = None
    if cursor is not None:
        moment, _, job = cursor.partition("-")
        before = (float(moment), job)
    found = await run_sync(store.jobs.page, owner, state, before, limit, kind)
    answers = [job_answer(job, await run_sync(store.jobs.pictures_of, job.id)) for job in found]
    more = f"{found[-1].created!r}-{found[-1].id}" if len(found) == limit else None
    return JobList(jobs=answers, next=more)


async def find_job(store: Store, job: str, owner: str) -> Job:
    """Return an owner's job. Raises ApiError if there is none."""
    found = await run_sync(store.jobs.find, job, owner)
    if found is None:
        raise not_found("job")
    return found


@router.get("/{job}", response_model=JobAnswer)
async def get_job(job: JobId, owner: Owner, store: TheStore) -> JobAnswer:
    """Return a job, with its pictures if it has succeeded."""
    found = await find_job(store, job, owner)
    return job_answer(found, await run_sync(store.jobs.pictures_of, job))


@router.post("/{job}/cancel", response_model=JobAnswer)
async def cancel_job(job: JobId, owner: Owner, store: TheStore) -> JobAnswer:
    """Cancel a job; one that has ended does not change."""
    found = await run_sync(store.jobs.cancel, job, owner)
    if found is None:
        raise not_found("job")
    return job_answer(found, await run_sync(store.jobs.pictures_of, job))


@router.delete("/{job}", status_code=204)
async def delete_job(job: JobId, owner: Owner, store: TheStore) -> Response:
    """Delete a job with its pictures; one that is queued or runs is canceled first."""
    await find_job(store, job, owner)
    found = await run_sync(store.jobs.cancel, job, owner)
    await run_sync(store.delete_job, job)
    if found is not None:
        await run_sync(store.people.delete_uploads, found.request.get("temporary") or [], owner)
    return Response(status_code=204)


@router.get(
    "/{job}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def follow_job(
    job: JobId,
    request: Request,
    owner: Owner,
    store: TheStore,
    last_event_id: Annotated[str | None, Header()] = None,
    after: Annotated[int, Query(ge=0, le=2**53)] = 0,
) -> StreamingResponse:
    """Follow a job as server-sent events until it ends; `Last-Event-ID`, or `after`, continues an earlier stream."""
    if last_event_id:
        if not last_event_id.isdecimal() or not last_event_id.isascii() or len(last_event_id) > 18:
            raise ApiError("invalid_request", "Last-Event-ID must be the id of an event.", "Last-Event-ID")
        after = int(last_event_id)
    await find_job(store, job, owner)
    return StreamingResponse(
        _stream(request, store, {job: after}, owner), media_type="text/event-stream", headers=STREAMED
    )


@events_router.get(
    "",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def follow_jobs(
    request: Request,
    owner: Owner,
    store: TheStore,
    job: Annotated[list[JobToFollow], Query(min_length=1, max_length=MOST_FOLLOWED)],
) -> StreamingResponse:
    """Follow several jobs in one stream until all have ended; `job=ID.EVENT` continues after an event of that job."""
    after = dict[str, int]()
    for each in job:
        name, _, event = each.partition(".")
        await find_job(store, name, owner)
        after[name] = int(event or 0)
    return StreamingResponse(_stream(request, store, after, owner), media_type="text/event-stream", headers=STREAMED)


async def _stream(request: Request, store: Store, after: Mapping[str, int], owner: str) -> AsyncIterator[str]:
    """Yield events of jobs; for those in the queue also their position, without an id because it is not kept."""
    live, positions = set(after), dict[str, int]()
    spoke = looked = time.monotonic()
    yield "retry: 1000\n\n"
    with request.app.state.metrics.streams.track_inprogress():
        async for event in events_of_jobs(request.app.state.feed, after, QUEUE_PING):
            now = time.monotonic()
            if event is not None:
                spoke = now
                if event.kind in ENDS:
                    live.discard(event.job)
                yield as_text(event)
            if now - looked < QUEUE_PING:
                continue
            looked = now
            for job in sorted(live):
                found = await run_sync(store.jobs.find, job, owner)
                if found is None:  # deleted meanwhile
                    live.discard(job)
                elif found.position not in (None, positions.get(job)):
                    positions[job], spoke = found.position, now
                    yield f"event: position\ndata: {json.dumps({'position': found.position, 'job': job})}\n\n"
            if not live:
                return
            if now - spoke >= PING:
                spoke = now
                yield ": still here\n\n"


def as_text(event: Event) -> str:
    """Return an event in the form of server-sent events."""
    body = {**event.body, "job": event.job, "at": event.at}
    return f"id: {event.id}\nevent: {event.kind}\ndata: {json.dumps(body)}\n\n"
