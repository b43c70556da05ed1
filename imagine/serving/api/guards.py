"""What every request passes before a route sees it: host and origin, the size and speed of its body, and the log.

Plain ASGI, because a body must be stopped while it arrives, and not when it has been read.
"""

import asyncio
import logging
import re
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from imagine.serving.api.errors import ApiError, error_response
from imagine.serving.api.metrics import HttpMetrics
from imagine.serving.settings import ServeSettings
from imagine.serving.store.records import draw_id

LOG = logging.getLogger("imagine.serving")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
SECURITY = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}


class RequestGuard:
    """Refuses foreign hosts and origins, gives each request an id, and logs and counts it.

    Without keys anybody who can connect may use the server, so that a web page in the user's browser must not: its
    requests carry its origin, or, if it moved its name to this machine (DNS rebinding), a foreign host.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, keys_required: bool, metrics: HttpMetrics) -> None:
        self.app, self.settings, self.keys_required, self.metrics = app, settings, keys_required, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else draw_id("req")
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = request_id
                for name, value in SECURITY.items():
                    out[name] = value
                # Pages are asked for again each time, so that an update of the app is not mixed with its old files.
                out.setdefault("cache-control", "no-store" if scope["path"].startswith("/v1/") else "no-cache")
            await send(message)

        try:
            if (refusal := self._refusal(headers)) is not None:
                await error_response(refusal, scope["path"])(scope, receive, answer)
            else:
                await self.app(scope, receive, answer)
        finally:
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.request(scope["method"], route, status, seconds)
            LOG.info(
                "request",
                extra={
                    "request": request_id, "method": scope["method"], "route": route, "status": status,
                    "ms": round(seconds * 1000, 1), "owner": scope["state"].get("owner"),
                },
            )  # fmt: skip

    def _refusal(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname if _is_host(host) else None
        known = {*_LOOPBACK, *self.settings.hosts, self.settings.host}
        if not self.keys_required and name not in known:
            return ApiError("host_refused", "This server is not reached under that host name; --allow-host adds one.")
        origin = headers.get("origin")
        if origin is None or origin in self.settings.origins:
            return None
        if _is_host(origin.partition("://")[2]) and urlsplit(origin).netloc == host:
            return None
        return ApiError("origin_refused", "Pages of that origin may not call this server; --allow-origin adds one.")


def _is_host(text: str) -> bool:
    """Return whether a text can be a host with or without a port, which `urlsplit` then accepts."""
    return bool(re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?", text))


class BodyLimit:
    """Stops a body that is too large, or that arrives too slowly, while it arrives."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = self.settings.max_body
        too_large = ApiError("too_large", f"The body is larger than {most} bytes; send fewer or smaller photos.")
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            await error_response(too_large, scope["path"])(scope, receive, send)
            return
        end, received, complete = time.monotonic() + self.settings.upload_time, 0, False

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # the routes wait here for the client to leave
                return await receive()
            patience = min(self.settings.upload_idle, max(0.0, end - time.monotonic()))
            try:
                message = await asyncio.wait_for(receive(), patience)
            except asyncio.TimeoutError as error:
                raise ApiError("upload_too_slow", "The body arrived too slowly; send it again.") from error
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                complete = not message.get("more_body", False)
            if received > most:
                raise too_large
            return message

        await self.app(scope, limited, send)
