"""A client for OpenAI-compatible chat endpoints: vLLM, SGLang, llama.cpp, Ollama, LM Studio or a service.

Transient errors (too many requests, an overloaded or restarting server, a timeout, a lost connection) are retried with
exponential backoff and random jitter, so that many clients do not retry at the same moment. If all retries fail, the
result is a `Failed` with `for_now`: the record is deferred, and a later build tries it again. An error about one
picture or prompt is permanent. Only the standard library is used.
"""

import base64
import email.utils
import http.client
import io
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from data_synth.backends.chat import REFUSED, Question, tidy
from data_synth.backends.contracts import Failed
from imagine.errors import ConfigError

DOWN, DENIED, REJECTED = "the endpoint does not answer", "the endpoint denies access", "the endpoint rejected it"

_MAX_ANSWER_BYTES = 16 << 20  # no chat answer is larger
_TRANSIENT_STATUSES = {408, 409, 425, 429}  # and all from 500 on: a retry may succeed
_ACCESS_STATUSES = {301, 302, 303, 307, 308, 401, 402, 403, 404, 405}  # the question is not the cause


class EndpointSettings(BaseModel):
    """The endpoint's address and model, the fields of a request, timeouts and retries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1)  # the endpoint's name for the model
    # without /chat/completions
    url: str = Field(default="http://127.0.0.1:8000/v1", pattern=r"^https?://", exclude=True)
    key_from: str = Field(default="", exclude=True)  # the environment variable with the API key; "": no key is sent
    licence: str = Field(default="", exclude=True)  # of the model's answers, for the manifest
    max_tokens: int = Field(default=300, ge=1)
    # None: not sent, for models that only accept their default
    temperature: float | None = Field(default=0.0, ge=0)
    # the endpoint's name for the field `max_tokens`
    tokens_as: Literal["max_tokens", "max_completion_tokens"] = Field(default="max_tokens", exclude=True)
    send_seed: bool = Field(default=True, exclude=True)  # some services reject the field
    body: dict[str, Any] = Field(default_factory=dict)  # further fields of the request, such as {top_p: 0.9}
    timeout: float = Field(default=120.0, gt=0, exclude=True)  # seconds for one answer
    retries: int = Field(default=5, ge=0, exclude=True)
    first_wait: float = Field(default=1.0, ge=0, exclude=True)  # seconds before the first retry; doubles each time
    longest_wait: float = Field(default=60.0, ge=0, exclude=True)  # seconds, also for Retry-After
    at_once: int = Field(default=8, ge=1, exclude=True)  # concurrent requests
    # consecutive failures after which the rest of a call is deferred without a request
    patience: int = Field(default=8, ge=1, exclude=True)


class _RequestError(Exception):
    """Raised when a request has no valid answer, with the failure to return and whether to retry."""

    def __init__(self, failed: Failed, retry: bool, wait: float = 0.0) -> None:
        super().__init__(failed.sentence)
        self.failed, self.retry, self.wait = failed, retry, wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A handler that follows no redirection, because the request would send the key to another address."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Endpoint:
    """A language model behind an endpoint; it sends several questions concurrently, each with its own retries."""

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._failures = 0  # consecutive failures

    def load(self) -> None:
        """Read the key from the environment; no request is sent. Raises ConfigError if the key is missing."""
        name = self.settings.key_from
        if name and not os.environ.get(name):
            raise ConfigError(
                f"The environment variable {name} holds no key for the endpoint. Set it, or remove `key_from`."
            )
        if name:
            self._headers["Authorization"] = f"Bearer {os.environ[name]}"
        self._opener = urllib.request.build_opener(_NoRedirects)

    def answer(self, questions: Sequence[Question]) -> list[str | Failed]:
        """Return one tidied answer per question, in order."""
        self._failures = 0
        with ThreadPoolExecutor(self.settings.at_once) as threads:
            return list(threads.map(self._answer, questions))

    def _answer(self, question: Question) -> str | Failed:
        body = json.dumps(self._body(question)).encode()
        failed = Failed(DOWN, "No request was sent, because the previous requests failed.", for_now=True)
        for attempt in range(self.settings.retries + 1):
            if self._failures >= self.settings.patience:
                return failed
            try:
                answer = _text_of(self._post(body))
            except _RequestError as problem:
                failed = problem.failed
                if not problem.retry:
                    break
                if attempt < self.settings.retries:
                    time.sleep(self._wait(attempt, problem.wait))
            else:
                self._failures = 0
                return answer
        self._failures += failed.for_now
        return failed

    def _wait(self, attempt: int, retry_after: float) -> float:
        """Return the seconds to wait before the next attempt.

        The wait is a random value between half and all of the doubled wait. It is at least `retry_after` and at most
        `longest_wait`.
        """
        doubled = self.settings.first_wait * 2**attempt * random.uniform(0.5, 1.0)
        return min(max(doubled, retry_after), self.settings.longest_wait)

    def _body(self, question: Question) -> dict[str, Any]:
        settings = self.settings
        content: Any = question.text
        if question.image is not None:
            address = {"url": data_url(question.image)}
            content = [{"type": "text", "text": question.text}, {"type": "image_url", "image_url": address}]
        body: dict[str, Any] = {"model": settings.model, "messages": [{"role": "user", "content": content}]}
        body[settings.tokens_as] = settings.max_tokens
        if settings.temperature is not None:
            body["temperature"] = settings.temperature
        if settings.send_seed:
            body["seed"] = question.seed
        return {**body, **settings.body}

    def _post(self, body: bytes) -> Any:
        """Send a request and return the endpoint's JSON answer; raise _RequestError for anything else."""
        address = f"{self.settings.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, body, self._headers)
        deadline = time.monotonic() + self.settings.timeout
        try:
            with self._opener.open(request, timeout=self.settings.timeout) as response:
                return json.loads(_read(response, deadline))
        except urllib.error.HTTPError as error:
            with error:
                raise _status_error(error, address) from error
        except (OSError, http.client.HTTPException) as error:  # a timeout, a lost connection, no server
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise _RequestError(Failed(DOWN, f"{address}: {reason}", for_now=True), retry=True) from error
        except ValueError as error:  # for example a proxy's error page, or an incomplete answer
            raise _RequestError(Failed(DOWN, f"{address} sent no valid JSON.", for_now=True), retry=True) from error


def data_url(image: Image.Image) -> str:
    """Return a picture as a data URL: a JPEG in base64."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """Return the whole response, or raise TimeoutError after the deadline.

    The socket's own timeout is not enough, because it restarts with every byte that arrives.
    """
    parts: list[bytes] = []
    size = 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
        if size > _MAX_ANSWER_BYTES:
            raise ValueError("too long")
    if response.length:  # fewer bytes arrived than Content-Length announced
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _status_error(error: urllib.error.HTTPError, address: str) -> _RequestError:
    """Return the error for a response with an error status: transient, denied or rejected."""
    status = error.code
    sentence = f"{address} answered {status}: {_message(error) or error.reason}"
    if status in _TRANSIENT_STATUSES or status >= 500:
        wait = _seconds(error.headers.get("Retry-After"))
        return _RequestError(Failed(DOWN, sentence, for_now=True), retry=True, wait=wait)
    if status in _ACCESS_STATUSES:
        return _RequestError(Failed(DENIED, sentence, for_now=True), retry=False)
    return _RequestError(Failed(REJECTED, sentence), retry=False)


def _message(error: urllib.error.HTTPError) -> str:
    """Return the endpoint's error message, from any of the formats that endpoints use; "" if it has none."""
    try:
        content = error.read(1 << 16)
    except (OSError, http.client.HTTPException):
        return ""
    try:
        message = json.loads(content)
        message = message.get("error", message) if isinstance(message, dict) else message
        message = message.get("message", message) if isinstance(message, dict) else message
    except ValueError:
        message = content.decode("utf-8", "replace")
    return " ".join(str(message).split())[:200]


def _seconds(header: str | None) -> float:
    """Return the seconds that a Retry-After header requests.

    It contains seconds or a date (RFC 9110, section 10.2.3). Return 0 if it is missing or invalid.
    """
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(header)
    except (TypeError, ValueError):
        return 0.0
    date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())


def _text_of(answer: Any) -> str | Failed:
    """Return the tidied text of a chat completion; raise _RequestError if the answer is not one."""
    try:
        choice: Mapping[str, Any] = answer["choices"][0]
        message: Mapping[str, Any] = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        failed = Failed(DOWN, "The endpoint's answer is not a chat completion.", for_now=True)
        raise _RequestError(failed, retry=True) from error
    if isinstance(content, list):  # some endpoints answer in parts, in the format of a question with a picture
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    finish = choice.get("finish_reason")
    if refusal or finish == "content_filter":
        return Failed(REFUSED, str(refusal or "The endpoint's content filter stopped the answer.")[:200])
    return tidy(str(content or ""), complete=finish != "length")
