"""A client of any OpenAI-compatible chat endpoint: vLLM, SGLang, llama.cpp, Ollama, LM Studio, or a service.

An endpoint is somebody else's computer, so everything that can go wrong does. What may pass by itself (too many
requests, an overloaded or restarting server, silence, a cut connection) is asked again after waits that double, with
some chance in them so that many clients do not come back at once. What remains is a `Failed` that is only `for_now`:
the record is parked and a later build asks again. What is wrong with one picture or sentence fails for good.
Only the standard library is used.
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

DOWN, DENIED, REJECTED = "the endpoint does not answer", "the endpoint denies access", "the endpoint refused it"

_MAX_ANSWER_BYTES = 16 << 20  # bytes of an answer; more is not a chat answer
_TRANSIENT_STATUSES = {408, 409, 425, 429}  # and everything from 500 on: the same question may be answered later
_ACCESS_STATUSES = {301, 302, 303, 307, 308, 401, 402, 403, 404, 405}  # nothing is wrong with the question


class EndpointSettings(BaseModel):
    """Where the endpoint is, which model it runs, and how patient we are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1)  # as the endpoint calls it
    # without /chat/completions
    url: str = Field(default="http://127.0.0.1:8000/v1", pattern=r"^https?://", exclude=True)
    key_from: str = Field(default="", exclude=True)  # the environment variable that holds the key; "": none is sent
    licence: str = Field(default="", exclude=True)  # of the model's answers, for the manifest
    max_tokens: int = Field(default=300, ge=1)
    # None: not sent, for models that allow no other than their own
    temperature: float | None = Field(default=0.0, ge=0)
    # what it is called
    tokens_as: Literal["max_tokens", "max_completion_tokens"] = Field(default="max_tokens", exclude=True)
    send_seed: bool = Field(default=True, exclude=True)  # some services refuse the field
    body: dict[str, Any] = Field(default_factory=dict)  # further fields of the request, such as {top_p: 0.9}
    timeout: float = Field(default=120.0, gt=0, exclude=True)  # seconds for one answer
    retries: int = Field(default=5, ge=0, exclude=True)
    first_wait: float = Field(default=1.0, ge=0, exclude=True)  # seconds before the first retry; doubles with each
    longest_wait: float = Field(default=60.0, ge=0, exclude=True)  # also of what the endpoint may ask for
    at_once: int = Field(default=8, ge=1, exclude=True)  # requests under way
    # after so many failures in a row the rest of a call is parked unasked
    patience: int = Field(default=8, ge=1, exclude=True)


class _RequestError(Exception):
    """Why there is no answer yet."""

    def __init__(self, failed: Failed, retry: bool, wait: float = 0.0) -> None:
        super().__init__(failed.sentence)
        self.failed, self.retry, self.wait = failed, retry, wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: a key must not travel to an address that nobody gave."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Endpoint:
    """Asks one endpoint; several questions at a time, each with its own retries."""

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._failures = 0  # in a row

    def load(self) -> None:
        """Take the key from the environment. ConfigError if it is not there; the endpoint itself is not asked."""
        name = self.settings.key_from
        if name and not os.environ.get(name):
            raise ConfigError(
                f"The environment variable {name} holds no key for the endpoint: set it, or drop key_from."
            )
        if name:
            self._headers["Authorization"] = f"Bearer {os.environ[name]}"
        self._opener = urllib.request.build_opener(_NoRedirects)

    def answer(self, questions: Sequence[Question]) -> list[str | Failed]:
        """One tidied answer a question, in order."""
        self._failures = 0
        with ThreadPoolExecutor(self.settings.at_once) as threads:
            return list(threads.map(self._answer, questions))

    def _answer(self, question: Question) -> str | Failed:
        body = json.dumps(self._body(question)).encode()
        failed = Failed(DOWN, "It was not asked: the questions before it got no answer.", for_now=True)
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
        """Seconds before the next attempt: between half and all of the doubled wait, at least what was asked for."""
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
        """The endpoint's answer as JSON; _RequestError for everything else."""
        address = f"{self.settings.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, body, self._headers)
        deadline = time.monotonic() + self.settings.timeout
        try:
            with self._opener.open(request, timeout=self.settings.timeout) as response:
                return json.loads(_read(response, deadline))
        except urllib.error.HTTPError as error:
            with error:
                raise _status_error(error, address) from error
        except (OSError, http.client.HTTPException) as error:  # silence, a cut connection, nobody there
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise _RequestError(Failed(DOWN, f"{address}: {reason}", for_now=True), retry=True) from error
        except ValueError as error:  # a proxy's page, half an answer
            raise _RequestError(Failed(DOWN, f"{address} answered no JSON.", for_now=True), retry=True) from error


def data_url(image: Image.Image) -> str:
    """A picture as the address of itself: a JPEG in base64."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """All of a response that ends in time: the socket's own timeout starts anew with every byte."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
        if size > _MAX_ANSWER_BYTES:
            raise ValueError("too long")
    if response.length:  # it promised more than came
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _status_error(error: urllib.error.HTTPError, address: str) -> _RequestError:
    """What an answer with an error's status means."""
    status = error.code
    sentence = f"{address} answered {status}: {_message(error) or error.reason}"
    if status in _TRANSIENT_STATUSES or status >= 500:
        wait = _seconds(error.headers.get("Retry-After"))
        return _RequestError(Failed(DOWN, sentence, for_now=True), retry=True, wait=wait)
    if status in _ACCESS_STATUSES:
        return _RequestError(Failed(DENIED, sentence, for_now=True), retry=False)
    return _RequestError(Failed(REJECTED, sentence), retry=False)


def _message(error: urllib.error.HTTPError) -> str:
    """The endpoint's own words, in any of the forms that endpoints use."""
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
    """What Retry-After asks for: seconds, or a date (RFC 9110, section 10.2.3); 0 if it says nothing."""
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
    """The text of a chat completion, tidied; _RequestError if it is not one."""
    try:
        choice: Mapping[str, Any] = answer["choices"][0]
        message: Mapping[str, Any] = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        failed = Failed(DOWN, "Its answer is not a chat completion.", for_now=True)
        raise _RequestError(failed, retry=True) from error
    if isinstance(content, list):  # some answer in parts, as they are asked
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    finish = choice.get("finish_reason")
    if refusal or finish == "content_filter":
        return Failed(REFUSED, str(refusal or "Its content filter stopped the answer.")[:200])
    return tidy(str(content or ""), complete=finish != "length")
