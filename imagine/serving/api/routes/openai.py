"""OpenAI's images API, so that its clients work unchanged: a thin translation to our own jobs.

The references of a person are the images of an edit, or `persona` in `extra_body`.
"""

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from imagine.serving.api.access import Owner, TheSettings, TheStore
from imagine.serving.api.errors import ApiError, error_body
from imagine.serving.api.feed import events_of
from imagine.serving.api.intake import Body, parse, read_body
from imagine.serving.api.openai_requests import MODEL, ImagesRequest
from imagine.serving.api.routes.pictures import body_schema, picture_job
from imagine.serving.api.schemas import PictureRequest
from imagine.serving.api.submitting import limit_rate, raise_failure, submit, wait_for
from imagine.serving.settings import ServeSettings
from imagine.serving.store.records import Job
from imagine.serving.store.store import Store

router = APIRouter(prefix="/v1", tags=["OpenAI"])
_NO_USAGE = {
    "input_tokens": 0, "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}, "output_tokens": 0,
    "total_tokens": 0,
}  # fmt: skip
_TWO_FORMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


@router.get("/models", response_model=dict[str, Any])
async def list_models(owner: Owner, store: TheStore) -> dict[str, Any]:
    """Return the one model of this server."""
    return {"object": "list", "data": [_model()]}


@router.get("/models/{model}", response_model=dict[str, Any])
async def get_model(model: str, owner: Owner) -> dict[str, Any]:
    """Return the model of this server."""
    if model != MODEL:
        raise ApiError("model_not_found", f"There is no such model; this server has {MODEL!r}.", "model")
    return _model()


def _model() -> dict[str, Any]:
    return {"id": MODEL, "object": "model", "created": 0, "owned_by": "imagine"}


@router.post(
    "/images/generations", response_model=dict[str, Any], responses=_TWO_FORMS,
    openapi_extra=body_schema("ImagesRequest", "image"),
)  # fmt: skip
async def generations(request: Request, owner: Owner, store: TheStore, settings: TheSettings) -> Any:
    """Draw pictures of a persona, or of nobody in particular."""
    body = await read_body(request, settings)
    if body.files or "images" in body.fields:
        raise ApiError("invalid_request", "Send images to /v1/images/edits.", "image")
    return await _draw(request, body, "image_generation", owner, store, settings)


@router.post(
    "/images/edits", response_model=dict[str, Any], responses=_TWO_FORMS,
    openapi_extra=body_schema("ImagesRequest", "image"),
)  # fmt: skip
async def edits(request: Request, owner: Owner, store: TheStore, settings: TheSettings) -> Any:
    """Draw new pictures of the person in the images."""
    body = await read_body(request, settings)
    if not body.files and not body.fields.get("images"):
        raise ApiError("invalid_request", "Send at least one image of the person.", "image")
    return await _draw(request, body, "image_edit", owner, store, settings)


async def _draw(request: Request, body: Body, kind: str, owner: str, store: Store, settings: ServeSettings) -> Any:
    await limit_rate(store, settings, owner)
    wanted: ImagesRequest = parse(ImagesRequest, body.fields)
    workers = await run_sync(store.access.living_workers, settings.lease)
    native = wanted.as_native(workers[0]["facts"] if workers else None)
    data, uploads = wanted.pictures()
    if data and (uploads or body.files):
        raise ApiError("invalid_request", "Send all images in one way.", "images")
    if uploads:
        native["uploads"] = uploads
    files = {**body.files, **({"": data} if data else {})}
    attached = Body(native, files)
    parsed: PictureRequest = parse(PictureRequest, native)
    job = await picture_job(parsed, attached, store, settings, owner)
    same = [attached.fingerprint(parsed), wanted.response_format]
    accepted, is_new = await submit(request, owner, "pictures", job, parsed.n, parsed.seed, same)
    if not is_new:
        await run_sync(store.people.delete_uploads, job["temporary"], owner)
    if wanted.stream:
        stream = _stream(request, accepted, wanted, kind)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
    keyed = request.headers.get("idempotency-key") is not None
    done = await wait_for(request, accepted, settings.longest_wait, cancel_if_left=not keyed)
    raise_failure(done)
    return JSONResponse(await _answer(request, done, wanted))


async def _answer(request: Request, job: Job, wanted: ImagesRequest) -> dict[str, Any]:
    """Return the answer of a request that is not streamed."""
    store: Store = request.app.state.store
    rows = await run_sync(store.jobs.pictures_of, job.id)
    data: list[dict[str, Any]] = []
    for row in rows:
        if wanted.response_format == "url":
            data.append({"url": f"{str(request.base_url).rstrip('/')}/v1/pictures/{row.id}/content"})
        else:
            data.append({"b64_json": await run_sync(_encoded, store, row)})
    return {
        "created": int(job.created), "data": data, "background": "opaque", "output_format": wanted.form,
        "quality": wanted.quality if wanted.quality in ("low", "medium", "high") else "medium",
        "size": f"{rows[0].width}x{rows[0].height}" if rows else None, "usage": _NO_USAGE,
    }  # fmt: skip


def _encoded(store: Store, row: Any) -> str:
    return base64.b64encode(store.files.picture(row.id, row.media).read_bytes()).decode()


async def _stream(request: Request, job: Job, wanted: ImagesRequest, kind: str) -> AsyncIterator[str]:
    """Yield partial images while the job runs, then one completed event per picture, or an error, and the end."""
    store: Store = request.app.state.store
    common = {
        "created_at": int(job.created), "output_format": wanted.form, "background": "opaque",
        "quality": wanted.quality if wanted.quality in ("low", "medium", "high") else "medium",
    }  # fmt: skip
    async for event in events_of(request.app.state.feed, job.id, 0, 15.0):
        if event is None:
            yield ": still here\n\n"
        elif event.kind == "preview":
            body = event.body
            partial = {
                "type": f"{kind}.partial_image", "b64_json": body["jpeg"], "partial_image_index": body["number"],
                **common, "output_format": "jpeg", "size": f"{body['width']}x{body['height']}",
            }  # fmt: skip
            yield _line(partial)
    found = await run_sync(store.jobs.find, job.id)
    if found is None or found.state != "succeeded":
        try:
            raise_failure(found or job)
        except ApiError as error:
            yield _line({**error_body(error.code, error.message), "type": "error"})
    for row in await run_sync(store.jobs.pictures_of, job.id):
        completed = {
            "type": f"{kind}.completed", "b64_json": await run_sync(_encoded, store, row), **common,
            "size": f"{row.width}x{row.height}", "usage": _NO_USAGE,
        }  # fmt: skip
        yield _line(completed)
    yield "data: [DONE]\n\n"


def _line(body: dict[str, Any]) -> str:
    return f"event: {body['type']}\ndata: {json.dumps(body)}\n\n"
