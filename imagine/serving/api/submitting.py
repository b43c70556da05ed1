"""Accept a job for a request, and wait for it where the client wants that."""

import logging
import secrets
from collections.abc import Mapping
from typing import Any

from anyio.to_thread import run_sync
from fastapi import Request

from imagine.serving.api.errors import CODES, ApiError
from imagine.serving.api.feed import Feed, events_of
from imagine.serving.settings import ServeSettings
from imagine.serving.store.jobs import Admission, IdempotencyError, QueueFullError
from imagine.serving.store.records import Job, Kind
from imagine.serving.store.store import Store

LOG = logging.getLogger("imagine.serving")
JOINED = 600.0  # seconds for which a repeated request of OpenAI's client joins the job of the first one
WAITS = 15.0  # seconds after which a waiting request looks whether its client is still there


async def limit_rate(store: Store, settings: ServeSettings, owner: str) -> None:
    """Raise ApiError if an owner asks too often."""
    wait = await run_sync(store.access.take_token, owner, settings.requests_per_minute)
    if wait:
        raise ApiError(
            "rate_limited", f"More than {settings.requests_per_minute:g} requests a minute; wait a little.",
            retry_after=wait,
        )  # fmt: skip


async def submit(
    request: Request, owner: str, kind: Kind, job: Mapping[str, Any], count: int = 0, seed: int | None = None,
    fingerprint: Any = None,
) -> tuple[Job, bool]:  # fmt: skip
    """Accept a job for `count` pictures. Return it, and whether it is new. Raises ApiError if it is not accepted.

    The seeds are drawn now: a job that a worker begins again gives the same pictures. A request with an
    Idempotency-Key, and one that OpenAI's client repeats by itself, returns the job of the first; `fingerprint` is what
    makes two requests the same.
    """
    store, settings = _state(request)
    first = secrets.randbelow(2**31) if seed is None else seed
    key = _idempotency_key(request)
    wanted = Admission(
        owner, kind, job, [first + number for number in range(count)], settings.deadline, settings.keep_pictures, key,
        fingerprint,
    )  # fmt: skip
    if key is None and request.headers.get("x-stainless-retry-count", "0") not in ("", "0"):
        known = await run_sync(store.jobs.retry_of, owner, wanted, store.jobs.clock() - JOINED)
        if known is not None:
            return known, False
    try:
        accepted, is_new = await run_sync(store.jobs.admit, wanted, settings.max_queue, settings.max_queue_per_owner)
    except IdempotencyError as error:
        raise ApiError(
            "idempotency_mismatch", "This Idempotency-Key came with another request before; use a new one."
        ) from error
    except QueueFullError as error:
        whose = "You have too many jobs in the queue" if error.own else "The queue is full"
        raise ApiError("queue_full", f"{whose}; ask again later.", retry_after=5) from error
    prompt = {"prompt": job["prompt"]} if settings.log_prompts and "prompt" in job else {}
    LOG.info("job accepted", extra={"job": accepted.id, "kind": kind, "count": count, "new": is_new, **prompt})
    return accepted, is_new


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and (not 1 <= len(key) <= 200 or not key.isascii() or not key.isprintable()):
        raise ApiError("invalid_request", "The Idempotency-Key must have 1 to 200 printable ASCII characters.")
    return key


async def wait_for(request: Request, job: Job, seconds: float, cancel_if_left: bool) -> Job:
    """Wait until a job has ended, or so many seconds, and return it.

    cancel_if_left: cancel the job if its client leaves, because nobody else will fetch its result.
    """
    store, settings = _state(request)
    feed: Feed = request.app.state.feed
    end = store.jobs.clock() + min(seconds, settings.longest_wait)
    patience = min(WAITS, max(0.1, seconds), 1.0)
    async for _ in events_of(feed, job.id, 0, patience):
        if await request.is_disconnected():
            if cancel_if_left:
                await run_sync(store.jobs.cancel, job.id, job.owner)
            break
        if store.jobs.clock() >= end:
            break
    found = await run_sync(store.jobs.find, job.id)
    return found if found is not None else job


def raise_failure(job: Job) -> None:
    """Raise ApiError if a job has not succeeded."""
    if job.state == "succeeded":
        return
    if job.state == "canceled":
        raise ApiError("canceled", "The job was canceled.")
    if not job.ended:
        raise ApiError("timeout", "The job is not done yet; look for it under /v1/jobs.")
    code = job.error_code if job.error_code in CODES else "internal"
    raise ApiError(str(code), job.error or "The job failed.")


def _state(request: Request) -> tuple[Store, ServeSettings]:
    return request.app.state.store, request.app.state.settings
