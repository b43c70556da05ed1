"""Serve the review page and its HTTP interface on the local machine: `python -m data_synth review DIR`.

    GET  /                           the page (page.html)
    GET  /pictures/HASH              a picture file
    GET  /api/state?reviewer=NAME    the progress of the review, and the reasons for a rejection
    GET  /api/pairs/N?reviewer=NAME  the content of one pair
    POST /api/decisions              {"reviewer", "pair", "verdict", "reason" (reject), "caption" (fix)} -> the state
    POST /api/undo                   {"reviewer"} -> the state, and the "pair" whose decision was undone, or null

`imagine.local_server` says what it accepts and how it answers errors.
"""

import argparse
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console

from data_synth.review.decisions import FILE, REASONS, GoneError, Opinion, Review, reviewer_name
from imagine.errors import ConfigError
from imagine.local_server import HTTPError, LocalHandler, LocalServer, number, text

PORT = 8420


class ReviewServer(LocalServer):
    """A server of one review at `address`. `serve_forever()` runs it; `shutdown()` and `server_close()` end it."""

    def __init__(self, review: Review, port: int = PORT) -> None:
        """Bind to the port (0: any free one). Raises ConfigError if it is in use."""
        self.review = review
        super().__init__(files("data_synth.review").joinpath("page.html").read_text(encoding="utf-8"), _Handler, port)


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


class _Handler(LocalHandler):
    server: ReviewServer
    gone = GoneError

    def get(self, path: str) -> None:
        review = self.server.review
        if path == "/api/state":
            self.send_json(200, self._state(self.query("reviewer")))
        elif match := re.fullmatch(r"/api/pairs/(\d{1,15})", path):
            self.send_json(200, review.pair(int(match[1]), self.query("reviewer")))
        elif match := re.fullmatch(r"/pictures/([0-9a-f]{64})", path):
            self.send_picture(review.picture(match[1]))
        elif path in ("/api/decisions", "/api/undo"):
            raise HTTPError(405, f"{path} needs a POST request.")
        else:
            raise HTTPError(404, f"There is nothing at {path}.")

    def post(self, path: str) -> None:
        review = self.server.review
        if path not in ("/api/decisions", "/api/undo"):
            raise HTTPError(404, f"Nothing can be posted to {path}.")
        body = self.body()
        reviewer = text(body, "reviewer")
        if path == "/api/undo":
            self.send_json(200, {"pair": review.undo(reviewer), **self._state(reviewer)})
            return
        opinion = Opinion(reviewer, text(body, "verdict"), text(body, "reason", ""), text(body, "caption", ""))
        review.decide(number(body, "pair"), opinion)
        self.send_json(200, self._state(reviewer))

    def _state(self, reviewer: str) -> dict[str, Any]:
        return {**self.server.review.state(reviewer), "reasons": REASONS}
