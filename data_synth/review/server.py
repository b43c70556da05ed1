"""Serve the review page and its HTTP interface on the local machine: `python -m data_synth review DIR`.

    GET  /                           the page (page.html)
    GET  /pictures/HASH              a picture file
    GET  /api/state?reviewer=NAME    the progress of the review, and the reasons for a rejection
    GET  /api/pairs/N?reviewer=NAME  the content of one pair
    POST /api/decisions              {"reviewer", "pair", "verdict", "reason" (reject), "caption" (fix)} -> the state
    POST /api/undo                   {"reviewer"} -> the state, and the "pair" whose decision was undone, or null

An invalid request is answered with {"error": one sentence} and a status of 400 or above. The server listens on
127.0.0.1; from another computer, reach it with `ssh -L 8420:127.0.0.1:8420 HOST`. Reviewers are not authenticated.
Three checks keep other web pages from reading or deciding anything through a reviewer's browser: the Host header must
name the local machine, a POST must have the JSON content type, and an Origin header, if present, must match the host.
"""

import argparse
import base64
import hashlib
import json
import re
import socketserver
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from rich.console import Console

from data_synth.review.decisions import FILE, REASONS, GoneError, Opinion, Review, reviewer_name
from imagine.errors import ConfigError, ImagineError

PORT = 8420
LARGEST_BODY = 64 * 1024
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_CONTENT_TYPES = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp"))


class ReviewServer(ThreadingHTTPServer):
    """A server of one review at `address`. `serve_forever()` runs it; `shutdown()` and `server_close()` end it."""

    def __init__(self, review: Review, port: int = PORT) -> None:
        """Bind to the port (0: any free one). Raises ConfigError if it is in use."""
        self.review = review
        self.page = files("data_synth.review").joinpath("page.html").read_text(encoding="utf-8")
        self.policy = _policy(self.page)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
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


def add_review(commands: Any) -> None:
    """Add the `review` subcommand to an argparse parser's subparsers; its `run` default takes the parsed options."""
    parser = commands.add_parser("review", help="review a build's pairs in the browser: keep, reject, fix captions")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a build's folder, which contains review.sqlite")
    parser.add_argument("--reviewer", metavar="NAME", help="name of the reviewer; without it the page asks")
    parser.add_argument(
        "--port", type=int, default=PORT, metavar="N", help=f"port on this machine (default {PORT}; 0: any free port)"
    )
    parser.add_argument(
        "--overlap",
        type=float,
        default=Review.overlap,
        metavar="SHARE",
        help=f"share of the pairs that several people review, to measure their agreement (default {Review.overlap})",
    )
    parser.add_argument(
        "--opinions",
        type=int,
        default=Review.opinions,
        metavar="N",
        help=f"number of opinions on each of those pairs (default {Review.opinions})",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, announce: Callable[[str], None] | None = None) -> None:
    """Serve the review of a build's folder until interrupted. Raises ConfigError if it cannot be served."""
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"There is no port {options.port}: give 0 to 65535.")
    if not 0 <= options.overlap <= 1:
        raise ConfigError(f"An overlap of {options.overlap} is not a share: give 0 to 1.")
    if options.opinions < 1:
        raise ConfigError(f"A pair cannot have {options.opinions} opinions: give 1 or more.")
    review = Review(options.folder / FILE, options.opinions, options.overlap)
    name = reviewer_name(options.reviewer) if options.reviewer is not None else ""
    pairs = review.state(name or "nobody")["progress"]["pairs"]
    with ReviewServer(review, options.port) as server:
        address = server.address + (f"?reviewer={quote(name)}" if name else "")
        (announce or _print_to_stderr)(
            f"{pairs} pairs to review: open {address} (stop with Ctrl+C; every decision is saved immediately)"
        )
        server.serve_forever()


def _print_to_stderr(text: str) -> None:
    Console(stderr=True).print(text, soft_wrap=True, highlight=False, markup=False)


class _HTTPError(Exception):
    """Raised to answer a request with a status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds until an idle connection is closed

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, *args: Any) -> None:
        """Log nothing, because every picture would add a line."""

    def _answer(self, handler: Callable[[], None]) -> None:
        """Run the handler and answer errors; after an error the connection closes, as its body may be unread."""
        try:
            self._check_host()
            handler()
        except _HTTPError as refused:
            self._send_error(refused.status, str(refused))
        except GoneError as error:
            self._send_error(404, str(error))
        except ImagineError as error:
            self._send_error(400, str(error))
        except (ConnectionError, TimeoutError):
            raise  # the client is gone
        except Exception:
            self._send_error(500, "The server failed: see the error message in its terminal.")
            raise

    def _get(self) -> None:
        path, review = urlsplit(self.path).path, self.server.review
        if path == "/":
            self._send(200, "text/html; charset=utf-8", self.server.page.encode(), {"Cache-Control": "no-store"})
        elif path == "/api/state":
            self._send_json(200, self._state(self._reviewer()))
        elif match := re.fullmatch(r"/api/pairs/(\d{1,15})", path):
            self._send_json(200, review.pair(int(match[1]), self._reviewer()))
        elif match := re.fullmatch(r"/pictures/([0-9a-f]{64})", path):
            picture = review.picture(match[1])
            self._send(200, _content_type(picture), picture, {"Cache-Control": "private, max-age=31536000, immutable"})
        elif path in ("/api/decisions", "/api/undo"):
            raise _HTTPError(405, f"{path} needs a POST request.")
        else:
            raise _HTTPError(404, f"There is nothing at {path}.")

    def _post(self) -> None:
        path, review = urlsplit(self.path).path, self.server.review
        if path not in ("/api/decisions", "/api/undo"):
            raise _HTTPError(404, f"Nothing can be posted to {path}.")
        body = self._body()
        reviewer = _text(body, "reviewer")
        if path == "/api/undo":
            self._send_json(200, {"pair": review.undo(reviewer), **self._state(reviewer)})
            return
        opinion = Opinion(reviewer, _text(body, "verdict"), _text(body, "reason", ""), _text(body, "caption", ""))
        review.decide(_number(body, "pair"), opinion)
        self._send_json(200, self._state(reviewer))

    def _state(self, reviewer: str) -> dict[str, Any]:
        return {**self.server.review.state(reviewer), "reasons": REASONS}

    def _reviewer(self) -> str:
        given = parse_qs(urlsplit(self.path).query).get("reviewer")
        if not given:
            raise _HTTPError(400, "The reviewer is missing: add ?reviewer=NAME.")
        return given[0]

    def _check_host(self) -> None:
        host = self.headers.get("Host", "")
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name not in _LOCAL_HOSTS or self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            raise _HTTPError(403, "This server accepts only requests of its own page on this machine.")

    def _body(self) -> dict[str, Any]:
        if self.headers.get_content_type() != "application/json":
            raise _HTTPError(415, "The request is not JSON: set the content type application/json.")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,15}", length):
            raise _HTTPError(411, "The length of the body is missing: set Content-Length.")
        if int(length) > LARGEST_BODY:
            raise _HTTPError(413, f"The body is too long: send at most {LARGEST_BODY} bytes.")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise _HTTPError(400, f"The body is not valid JSON ({error}).") from error
        if not isinstance(body, dict):
            raise _HTTPError(400, "The body must be a JSON object.")
        return body

    def _send_error(self, status: int, sentence: str) -> None:
        self.close_connection = True
        self._send_json(status, {"error": sentence})

    def _send_json(self, status: int, answer: Any) -> None:
        self._send(status, "application/json", json.dumps(answer).encode(), {"Cache-Control": "no-store"})

    def _send(self, status: int, kind: str, body: bytes, headers: dict[str, str]) -> None:
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


def _content_type(picture: bytes) -> str:
    return next((kind for start, kind in _CONTENT_TYPES if picture.startswith(start)), "application/octet-stream")


def _text(body: dict[str, Any], name: str, default: str | None = None) -> str:
    value = body.get(name, default)
    if not isinstance(value, str):
        raise _HTTPError(400, f"{name!r} must be a string.")
    return value


def _number(body: dict[str, Any], name: str) -> int:
    value = body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise _HTTPError(400, f"{name!r} must be an integer of 0 or more.")
    return value
