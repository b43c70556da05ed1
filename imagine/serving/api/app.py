"""Build the application: routes, guards and errors around one store."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from imagine import __version__
from imagine.errors import WeightsError
from imagine.networks.weights import default_folder
from imagine.serving.api import errors
from imagine.serving.api.feed import Feed
from imagine.serving.api.guards import BodyLimit, RequestGuard
from imagine.serving.api.metrics import HttpMetrics
from imagine.serving.api.openai_requests import ImagesRequest
from imagine.serving.api.routes import health, jobs, openai, people, pictures
from imagine.serving.api.schemas import EnrollRequest, ErrorAnswer, PictureRequest
from imagine.serving.settings import ServeSettings
from imagine.serving.store.store import Store

LOG = logging.getLogger("imagine.serving")
SWEEP = 2.0  # seconds between looks for lost jobs and for what is over
LEFT_OVER = 1800  # sweeps between looks for files without a row
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request cannot be served"},
    "5XX": {"model": ErrorAnswer, "description": "The server cannot serve the request now"},
}


def create_app(store: Store, settings: ServeSettings) -> FastAPI:
    """Return the application for a store."""
    app = FastAPI(
        title="Imagine",
        version=__version__,
        description="Pictures of a person from one photo and a sentence.",
        lifespan=_lifespan,
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
    )
    app.state.store, app.state.settings = store, settings
    app.state.keys_required = not settings.on_loopback or store.access.has_keys()
    app.state.metrics = HttpMetrics(store, settings)
    app.state.feed = Feed(store)
    errors.install(app)
    for module in (pictures, jobs, people, openai):
        app.include_router(module.router, responses=_ERRORS)
    app.include_router(jobs.events_router, responses=_ERRORS)
    app.include_router(health.router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.state.examples = []
    if settings.app is not None:
        _mount_pages(app, settings)
    else:
        app.add_api_route("/", _welcome, response_class=PlainTextResponse, include_in_schema=False)
    app.add_middleware(BodyLimit, settings=settings)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(
        RequestGuard, settings=settings, keys_required=app.state.keys_required, metrics=app.state.metrics
    )
    return app


def _mount_pages(app: FastAPI, settings: ServeSettings) -> None:
    """Serve the web app, and the example photos that lie beside the weights."""
    try:
        photos = (settings.weights or default_folder()) / "examples"
        names = sorted(path.name for path in photos.glob("*.png"))
    except WeightsError:  # the workers run elsewhere
        names = []
    if names:
        app.mount("/examples", StaticFiles(directory=photos), name="examples")
        app.state.examples = [f"/examples/{quote(name)}" for name in names]
    app.mount("/", StaticFiles(directory=settings.app, html=True), name="app")


async def _welcome() -> str:
    return "Imagine serves its API under /v1; /openapi.json describes it.\n"


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the description of the API, with the bodies that the routes read themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        known = schema.setdefault("components", {}).setdefault("schemas", {})
        for model in (PictureRequest, EnrollRequest, ImagesRequest):
            made = model.model_json_schema(ref_template="#/components/schemas/{model}")
            known.update(made.pop("$defs", {}))
            known[model.__name__] = made
        app.openapi_schema = schema
    return app.openapi_schema


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Run the feed and the sweeper while the application runs."""
    tasks = [asyncio.create_task(app.state.feed.run()), asyncio.create_task(_sweep(app))]
    yield
    app.state.feed.close()
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _sweep(app: FastAPI) -> None:
    """Give back lost jobs, expire late ones, and delete what is over, again and again."""
    store, settings, number = app.state.store, app.state.settings, 0
    while True:
        try:
            done = await run_in_threadpool(store.sweep, settings)
            if number % LEFT_OVER == 0:
                done["left_over"] = await run_in_threadpool(store.remove_left_over_files)
            if any(done.values()):
                LOG.info("swept", extra=done)
        except Exception as error:  # a database that is away for a moment
            LOG.warning("no sweep", extra={"reason": type(error).__name__})
        number += 1
        await asyncio.sleep(SWEEP)
