"""Errors of the API: one table from code to status, and one form of body for all of them.

The body is that of OpenAI's API, {"error": {"message", "type", "param", "code"}}. Clients that follow it retry 408,
409, 429 and 5xx by themselves unless `x-should-retry` says otherwise, so every error says so.
"""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from imagine.errors import FaceError, ImagineError, PictureError, PromptError

LOG = logging.getLogger("imagine.serving")

# code: status, and whether the same request may succeed later
CODES: Mapping[str, tuple[int, bool]] = {
    "invalid_request": (422, False),
    "prompt_not_usable": (422, False),
    "photo_not_usable": (422, False),
    "face_not_usable": (422, False),
    "gone": (422, False),
    "idempotency_mismatch": (422, False),
    "out_of_memory": (422, False),
    "canceled": (422, False),
    "invalid_key": (401, False),
    "origin_refused": (403, False),
    "host_refused": (403, False),
    "not_found": (404, False),
    "model_not_found": (404, False),
    "method_not_allowed": (405, False),
    "upload_too_slow": (408, False),
    "too_large": (413, False),
    "unsupported_media_type": (415, False),
    "rate_limited": (429, True),
    "queue_full": (429, True),
    "internal": (500, True),
    "model_error": (500, False),
    "worker_lost": (500, False),
    "not_ready": (503, True),
    "deadline": (503, True),
    "timeout": (408, False),
}
_BY_STATUS = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
OPENAI_ROUTES = "/v1/images/"


class ApiError(HTTPException):
    """An error with a code of the table. `retry_after` is in seconds."""

    def __init__(self, code: str, message: str, param: str | None = None, retry_after: float | None = None) -> None:
        status, self.retry = CODES[code]
        super().__init__(status, message)
        self.code, self.message, self.param, self.retry_after = code, message, param, retry_after


def error_of(error: ImagineError) -> ApiError:
    """Return the API's error for one of the library's."""
    kinds = ((FaceError, "face_not_usable"), (PictureError, "photo_not_usable"), (PromptError, "prompt_not_usable"))
    code = next((code for kind, code in kinds if isinstance(error, kind)), "invalid_request")
    return ApiError(code, " ".join(str(error).split()), "prompt" if code == "prompt_not_usable" else None)


def not_found(what: str) -> ApiError:
    """Return the error for something that does not exist, or belongs to somebody else."""
    return ApiError("not_found", f"There is no such {what}.")


def error_body(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """Return the body of an error."""
    status = CODES[code][0]
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: ApiError, path: str) -> JSONResponse:
    """Return the response for an error. OpenAI's routes know 400 for what is 422 elsewhere."""
    status = 400 if error.status_code == 422 and path.startswith(OPENAI_ROUTES) else error.status_code
    headers = {"x-should-retry": "true" if error.retry else "false"}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, min(120, round(error.retry_after))))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error.headers, Mapping):
        headers |= dict(error.headers)
    return JSONResponse(error_body(error.code, error.message, error.param), status, headers)


def describe_validation(errors: Any) -> tuple[str, str | None]:
    """Return one sentence for the first of pydantic's errors, and the field that it is about."""
    first = next(iter(errors))
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    field = ".".join(place) or None
    message = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
    return (f"{field}: {message}." if field else f"{message}."), field


def install(app: FastAPI) -> None:
    """Give every error of an application this form."""

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        if not isinstance(error, ApiError):
            code = _BY_STATUS.get(error.status_code, "invalid_request")
            known = ApiError(code, str(error.detail).rstrip(".") + ".")
            known.headers, error = error.headers, known
        return error_response(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(ApiError("invalid_request", *describe_validation(error.errors())), request.url.path)

    @app.exception_handler(ImagineError)
    async def _imagine(request: Request, error: ImagineError) -> JSONResponse:
        return error_response(error_of(error), request.url.path)

    @app.exception_handler(Exception)
    async def _fault(request: Request, error: Exception) -> JSONResponse:
        LOG.error("request failed", exc_info=error)
        sentence = "The server failed; its log holds the reason under the id in x-request-id."
        return error_response(ApiError("internal", sentence), request.url.path)
