"""A local server with OpenAI's chat interface that can answer anything, and hang. The fixture `stub` runs it."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]


def completion(text: Any, finish: str = "stop", **message: Any) -> Reply:
    """Return a chat completion in the format of OpenAI's interface."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return 200, {}, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()


def trouble(status: int, sentence: str = "no", **headers: str) -> Reply:
    """Return an error in the format of OpenAI's interface."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, json.dumps({"error": {"message": sentence}}).encode()


class Stub:
    """An endpoint that checks the format of each request and answers with `reply(number, body)`; None: it hangs."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.malformed: list[str] = []
        self.reply: Callable[[int, dict[str, Any]], Reply | None] = lambda number, body: completion("A person.")
        self.lock, self.closing = threading.Lock(), threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                reply = stub.take(self.path, dict(self.headers), content)
                if reply is None:  # hang until the test ends
                    stub.closing.wait(20)
                    return
                status, headers, answer = reply
                self.send_response(status)
                for name, value in {"Content-Length": str(len(answer)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def take(self, path: str, headers: dict[str, str], content: bytes) -> Reply | None:
        body = json.loads(content)
        with self.lock:
            number = len(self.requests)
            self.requests.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            if path != "/v1/chat/completions" or headers.get("Content-Type") != "application/json":
                self.malformed.append(f"{path} {headers.get('Content-Type')}")
            self.malformed += [f"no {name}" for name in ("model", "messages") if not body.get(name)]
        return self.reply(number, body)

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def text_of(body: dict[str, Any]) -> str:
    """Return the text of a question, with or without a picture."""
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else content[0]["text"]
