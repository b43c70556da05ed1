"""A real server for tests: uvicorn on a free port of this machine, and a worker with a tiny pipeline in a thread."""

import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
from PIL import Image

from imagine.serving.api.app import create_app
from imagine.serving.server import Server, uvicorn_config
from imagine.serving.settings import ServeSettings
from imagine.serving.store.store import Store
from imagine.serving.worker.process import Worker
from tests import tiny


@dataclass
class Running:
    """A running server: its address, its store, and its worker, if it has one."""

    url: str
    store: Store
    settings: ServeSettings
    worker: Worker | None
    app: Any

    def client(self, key: str | None = None, **more: Any) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **more)


@contextlib.contextmanager
def running(folder: Path, pipe: Any = None, keys: int = 0, **more: Any) -> Iterator[Running]:
    """Run a server on a folder, with a worker if there is a pipeline, and with API keys if there should be."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ServeSettings(folder=folder, port=port, **{"drain": 5.0, **more})
    store = Store.open(settings)
    for number in range(keys):
        store.access.create_key(f"key {number}")
    app = create_app(store, settings)
    server = Server(uvicorn_config(app, settings))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    worker = None if pipe is None else Worker(pipe, store, settings)
    working = None if worker is None else threading.Thread(target=worker.run, daemon=True)
    if working is not None:
        working.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{port}", store, settings, worker, app)
    finally:
        if worker is not None and working is not None:
            worker.stop()
            working.join(30)
        server.handle_exit(2, None)
        thread.join(30)
        store.close()


def photo(seed: int, form: str = "PNG", **options: Any) -> bytes:
    """Return the file of a photo of a stranger."""
    encoded = io.BytesIO()
    tiny.photo(seed).save(encoded, form, **options)
    return encoded.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def ended(client: httpx.Client, job: str, within: float = 60.0) -> Any:
    """Return a job once it has ended."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        found = client.get(f"/v1/jobs/{job}").json()
        if found["state"] not in ("queued", "running"):
            return found
        time.sleep(0.02)
    raise AssertionError(f"{job} has not ended: {found}")
