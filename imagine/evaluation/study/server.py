"""Serve the page of a human study and its HTTP interface on the local machine: `imagine study DIR`.

    GET  /                        the page (page.html)
    GET  /pictures/HASH           a picture file
    GET  /api/state?rater=NAME    the rater's progress and their next trials
    GET  /api/trials/N?rater=NAME the content of one trial, without the names of systems
    POST /api/answers             {"rater", "trial", "answer", "seconds"} -> the state
    POST /api/undo                {"rater"} -> the state, and the "trial" whose answer was taken back, or null

`imagine.local_server` says what it accepts and how it answers errors.
"""

import re
from importlib.resources import files

from imagine.evaluation.study.store import GoneError, Study
from imagine.local_server import HTTPError, LocalHandler, LocalServer, number, text

PORT = 8430


class StudyServer(LocalServer):
    """A server of one study at `address`. `serve_forever()` runs it; `shutdown()` and `server_close()` end it."""

    def __init__(self, study: Study, port: int = PORT) -> None:
        """Bind to the port (0: any free one). Raises ConfigError if it is in use."""
        self.study = study
        page = files("imagine.evaluation.study").joinpath("page.html").read_text(encoding="utf-8")
        super().__init__(page, _Handler, port)


class _Handler(LocalHandler):
    server: StudyServer
    gone = GoneError

    def get(self, path: str) -> None:
        study = self.server.study
        if path == "/api/state":
            self.send_json(200, study.state(self.query("rater")))
        elif match := re.fullmatch(r"/api/trials/(\d{1,15})", path):
            self.send_json(200, study.trial(int(match[1]), self.query("rater")))
        elif match := re.fullmatch(r"/pictures/([0-9a-f]{64})", path):
            self.send_picture(study.picture(match[1]))
        elif path in ("/api/answers", "/api/undo"):
            raise HTTPError(405, f"{path} needs a POST request.")
        else:
            raise HTTPError(404, f"There is nothing at {path}.")

    def post(self, path: str) -> None:
        study = self.server.study
        if path not in ("/api/answers", "/api/undo"):
            raise HTTPError(404, f"Nothing can be posted to {path}.")
        body = self.body()
        rater = text(body, "rater")
        if path == "/api/undo":
            self.send_json(200, {"trial": study.undo(rater), **study.state(rater)})
            return
        seconds = body.get("seconds", 0.0)
        if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 <= seconds < 1e6:
            raise HTTPError(400, "'seconds' must be a number of 0 or more.")
        study.answer(number(body, "trial"), rater, text(body, "answer"), float(seconds))
        self.send_json(200, study.state(rater))
