"""A web page with an HTTP interface on the local machine, for pages on which people judge pictures.

An invalid request is answered with {"error": one sentence} and a status of 400 or above. The server listens on
127.0.0.1; from another computer, reach it with `ssh -L PORT:127.0.0.1:PORT HOST`. People are not authenticated. Three
checks keep other web pages from reading or sending anything through a person's browser: the Host header must name the
local machine, a POST must have the JSON content type, and an Origin header, if present, must match the host. The page
may run only its own script and style, and ask only this server.
"""

import base64
import hashlib
import json
import re
import socketserver
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from imagine.errors import ConfigError, ImagineError

LARGEST_BODY = 64 * 1024
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_CONTENT_TYPES = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp"))


class HTTPError(Exception):
    """Raised to answer a request with a status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class LocalServer(ThreadingHTTPServer):
    """A server of one page at `address`. `serve_forever()` runs it; `shutdown()` and `server_close()` end it."""

    def __init__(self, page: str, handler: "type[LocalHandler]", port: int) -> None:
        """Bind to the port (0: any free one). Raises ConfigError if it is in use."""
        self.page = page
        self.policy = _policy(page)
        try:
            super().__init__(("127.0.0.1", port), handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"Port {port} cannot be used ({error}): choose another one, or 0 for any free port."
            ) from error

    def server_bind(self) -> None:
        """Bind without the lookup of the host name that http.server does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])

    @property
    def address(self) -> str:
        """The address of the page."""
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the error, unless the browser only closed the connection."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class LocalHandler(BaseHTTPRequestHandler, ABC):
    """Answers requests: a subclass defines `get` and `post`, and raises HTTPError to refuse one.

    An error of the class in `gone` is answered with status 404.
    """

    server: LocalServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds until an idle connection is closed
    gone: type[ImagineError] | None = None

    @abstractmethod
    def get(self, path: str) -> None:
        """Answer a GET request for a path other than "/"."""

    @abstractmethod
    def post(self, path: str) -> None:
        """Answer a POST request."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(lambda: self.post(urlsplit(self.path).path))

    def log_message(self, *args: Any) -> None:
        """Log nothing, because every picture would add a line."""

    def _get(self) -> None:
        path = urlsplit(self.path).path
        if path == "/":
            self.send(200, "text/html; charset=utf-8", self.server.page.encode(), {"Cache-Control": "no-store"})
        else:
            self.get(path)

    def _answer(self, handler: Callable[[], None]) -> None:
        """Run the handler and answer errors; after an error the connection closes, as its body may be unread."""
        try:
            self._check_host()
            handler()
        except HTTPError as refused:
            self._send_error(refused.status, str(refused))
        except ImagineError as error:
            self._send_error(404 if self.gone is not None and isinstance(error, self.gone) else 400, str(error))
        except (ConnectionError, TimeoutError):
            raise  # the client is gone
        except Exception:
            self._send_error(500, "The server failed: see the error message in its terminal.")
            raise

    def _check_host(self) -> None:
        host = self.headers.get("Host", "")
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name not in _LOCAL_HOSTS or self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            raise HTTPError(403, "This server accepts only requests of its own page on this machine.")

    def query(self, name: str) -> str:
        """Return a value of the address. Raises HTTPError without it."""
        given = parse_qs(urlsplit(self.path).query).get(name)
        if not given:
            raise HTTPError(400, f"The {name} is missing: add ?{name}=NAME.")
        return given[0]

    def body(self) -> dict[str, Any]:
        """Return the JSON object of a POST request."""
        if self.headers.get_content_type() != "application/json":
            raise HTTPError(415, "The request is not JSON: set the content type application/json.")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,15}", length):
            raise HTTPError(411, "The length of the body is missing: set Content-Length.")
        if int(length) > LARGEST_BODY:
            raise HTTPError(413, f"The body is too long: send at most {LARGEST_BODY} bytes.")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise HTTPError(400, f"The body is not valid JSON ({error}).") from error
        if not isinstance(body, dict):
            raise HTTPError(400, "The body must be a JSON object.")
        return body

    def _send_error(self, status: int, sentence: str) -> None:
        self.close_connection = True
        self.send_json(status, {"error": sentence})

    def send_json(self, status: int, answer: Any) -> None:
        """Answer with JSON."""
        self.send(status, "application/json", json.dumps(answer).encode(), {"Cache-Control": "no-store"})

    def send_picture(self, picture: bytes) -> None:
        """Answer with a picture file, which the browser may keep: its address holds its hash."""
        kind = next((kind for start, kind in _CONTENT_TYPES if picture.startswith(start)), "application/octet-stream")
        self.send(200, kind, picture, {"Cache-Control": "private, max-age=31536000, immutable"})

    def send(self, status: int, kind: str, body: bytes, headers: dict[str, str]) -> None:
        """Answer with these bytes."""
        self.send_response(status)
        base_headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "X-Content-Type-Options": "nosniff",
            **headers,
        }
        for name, value in {**base_headers, "Content-Security-Policy": self.server.policy}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def text(body: dict[str, Any], name: str, default: str | None = None) -> str:
    """Return a string of a request's body."""
    value = body.get(name, default)
    if not isinstance(value, str):
        raise HTTPError(400, f"{name!r} must be a string.")
    return value


def number(body: dict[str, Any], name: str) -> int:
    """Return a whole number of a request's body."""
    value = body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise HTTPError(400, f"{name!r} must be an integer of 0 or more.")
    return value


def _policy(page: str) -> str:
    """Return a content security policy that allows only the page's own script and style, and local requests."""
    allowed = {"script": "", "style": ""}
    for tag in allowed:
        found = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert found, f"the page has no <{tag}>"
        allowed[tag] = "'sha256-" + base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode() + "'"
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
