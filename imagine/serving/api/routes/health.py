"""`/v1/server`, for clients; `/healthz`, `/readyz` and `/metrics`, for whoever runs the server."""

from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from sqlalchemy.exc import SQLAlchemyError

from imagine import __version__
from imagine.serving.api.access import Owner, TheSettings, TheStore, owner_of
from imagine.serving.api.schemas import ErrorAnswer, ServerAnswer

router = APIRouter(tags=["operation"])
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}


@router.get("/healthz", response_model=dict[str, str])
async def healthz() -> dict[str, str]:
    """Say that the process answers."""
    return {"status": "ok", "version": __version__}


@router.get("/readyz", response_model=dict[str, Any], responses={503: {"model": dict[str, Any]}})
async def readyz(store: TheStore, settings: TheSettings) -> JSONResponse:
    """Say whether the database answers and a worker with loaded weights is alive."""
    try:
        workers = await run_sync(store.access.living_workers, settings.lease)
        waiting = await run_sync(store.jobs.oldest_queued)
    except SQLAlchemyError:
        return JSONResponse({"status": "the database does not answer"}, 503)
    facts = [{name: value for name, value in each["facts"].items() if name != "encoder"} for each in workers]
    status = "ok" if workers else "no worker is alive"
    body = {"status": status, "workers": facts, "oldest_queued_seconds": round(waiting, 3)}
    return JSONResponse(body, 200 if workers else 503)


@router.get("/v1/server", response_model=ServerAnswer, responses={"4XX": {"model": ErrorAnswer}})
async def describe_server(request: Request, _: Owner, store: TheStore, settings: TheSettings) -> ServerAnswer:
    """Say what the server draws with, what it allows, and how long it keeps things."""
    workers = await run_sync(store.access.living_workers, settings.lease)
    facts = None if not workers else {name: value for name, value in workers[0]["facts"].items() if name != "encoder"}
    limits = ("max_pictures", "max_steps", "max_side", "max_photos", "max_body")
    keep = {name: getattr(settings, f"keep_{name}") for name in ("pictures", "photos", "personas")}
    folder = str(settings.weights) if settings.weights is not None and settings.on_loopback else None
    return ServerAnswer(
        version=__version__, key_needed=request.app.state.keys_required, model=facts, weights=folder,
        limits={name: getattr(settings, name) for name in limits}, keep_seconds=keep,
        examples=request.app.state.examples,
    )  # fmt: skip


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={401: {"content": _ERROR, "description": "A key is needed, and none or a wrong one came"}},
)
async def metrics(request: Request, _: Annotated[str, Depends(owner_of)]) -> Response:
    """Return numbers for Prometheus."""
    text = await run_sync(request.app.state.metrics.text)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
