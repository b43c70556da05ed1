"""Who asks: the owner of a request, from its API key."""

from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from imagine.serving.api.errors import ApiError
from imagine.serving.settings import ServeSettings
from imagine.serving.store.store import Store

LOCAL = "local"  # the owner of everything on a server without keys

bearer = HTTPBearer(auto_error=False, description="An API key of `imagine serve --create-key NAME`")


async def owner_of(request: Request, _: Annotated[Any, Depends(bearer)] = None) -> str:
    """Return the owner of a request. Raises ApiError without a valid key, unless the server needs none."""
    if not request.app.state.keys_required:
        owner: str | None = LOCAL
    else:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        owner = await run_sync(request.app.state.store.access.owner_of, given) if given else None
    if owner is None:
        raise ApiError("invalid_key", "Send a valid API key, as in `Authorization: Bearer KEY`.")
    request.scope.setdefault("state", {})["owner"] = owner
    return owner


def store_of(request: Request) -> Store:
    """Return the application's store."""
    store: Store = request.app.state.store
    return store


def settings_of(request: Request) -> ServeSettings:
    """Return the application's settings."""
    settings: ServeSettings = request.app.state.settings
    return settings


Owner = Annotated[str, Depends(owner_of)]
TheStore = Annotated[Store, Depends(store_of)]
TheSettings = Annotated[ServeSettings, Depends(settings_of)]
