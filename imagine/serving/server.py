"""Start the server: the web process, and the workers beside it, which are started again if they end.

With the SQLite database of a folder, only one server may use that folder. Jobs that ran when an earlier one was killed
are then given back at once, and not after their lease.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any

import uvicorn
from filelock import FileLock, Timeout

from imagine.errors import ConfigError
from imagine.serving.api.app import create_app
from imagine.serving.logs import log_as_json
from imagine.serving.settings import ServeSettings
from imagine.serving.store.store import Store
from imagine.serving.worker_contract import WORKER_NUMBER, WRONG_INPUT

LOG = logging.getLogger("imagine.serving")
LONGEST_PAUSE = 30.0  # seconds before a worker that keeps ending is started again


class Supervisor:
    """Keeps a number of worker processes running until it is stopped."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.refused = False  # whether a worker said that the settings are wrong
        self._stopping = threading.Event()
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._threads = [threading.Thread(target=self._keep, args=(number,)) for number in range(settings.workers)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask all workers to end what they have begun, wait for them, and kill those that take too long."""
        self._stopping.set()
        for process in list(self._processes.values()):
            process.terminate()
        for thread in self._threads:
            thread.join()

    def _keep(self, number: int) -> None:
        """Run one worker after the other; pause longer after each that ended soon."""
        pause = 0.5
        while not self._stopping.is_set():
            started = time.monotonic()
            process = self._start(number)
            code = self._wait(process)
            if self._stopping.is_set():
                return
            LOG.warning("worker ended", extra={"number": number, "code": code})
            if code == WRONG_INPUT:
                self.refused = True
                os.kill(os.getpid(), signal.SIGTERM)
                return
            pause = 0.5 if time.monotonic() - started > 60 else min(2 * pause, LONGEST_PAUSE)
            self._stopping.wait(pause)

    def _start(self, number: int) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "imagine.serving.worker.process"], stdin=subprocess.PIPE, text=True,
            env={
                **os.environ, WORKER_NUMBER: str(number),
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            },
        )  # fmt: skip
        self._processes[number] = process
        assert process.stdin is not None
        process.stdin.write(self.settings.model_dump_json() + "\n")
        process.stdin.flush()  # and stays open: a worker ends when its server has ended
        return process

    def _wait(self, process: "subprocess.Popen[str]") -> int:
        while True:
            try:
                return process.wait(0.2)
            except subprocess.TimeoutExpired:
                pass
            if self._stopping.is_set():
                process.terminate()
                try:
                    return process.wait(self.settings.drain + 10)
                except subprocess.TimeoutExpired:
                    process.kill()


class Server(uvicorn.Server):
    """uvicorn's server, which ends the streams of events when it is asked to stop."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop accepting requests, end all streams, then finish the requests that run."""
        feed = getattr(getattr(self.config.app, "state", None), "feed", None)
        if feed is not None:
            feed.close()
        super().handle_exit(sig, frame)


def uvicorn_config(app: Any, settings: ServeSettings) -> uvicorn.Config:
    """Return uvicorn's settings: no version in answers, limits on connections, and our own log of requests."""
    return uvicorn.Config(
        app, host=settings.host, port=settings.port, log_config=None, access_log=False, server_header=False,
        limit_concurrency=settings.connections, timeout_keep_alive=5, timeout_graceful_shutdown=30, ws="none",
        http="h11", h11_max_incomplete_event_size=32 << 10, proxy_headers=False,
    )  # fmt: skip


def serve(settings: ServeSettings) -> None:
    """Run a server until it is asked to stop. Raises ConfigError if it cannot start."""
    settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(settings.folder / "server.lock")
    try:
        if settings.database is None:
            lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"Another server uses the folder {settings.folder}: stop it, or give another --folder."
        ) from error
    store = Store.open(settings)
    try:
        if not settings.on_loopback and not store.access.has_keys():
            raise ConfigError(
                f"--host {settings.host} can be reached from other machines, and there is no API key yet: make one "
                "with imagine serve --create-key NAME."
            )
        _check_port(settings)
        log_as_json(level=settings.log_level)
        if settings.database is None:
            store.jobs.release(None, settings.max_attempts)
        store.remove_left_over_files(older=0 if settings.database is None else 600)
        supervisor = Supervisor(settings)
        supervisor.start()
        # uvicorn sends itself the signal that ended it once more, which must not end this process before its workers.
        signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            Server(uvicorn_config(create_app(store, settings), settings)).run()
        finally:
            supervisor.stop()
        if supervisor.refused:
            raise ConfigError("No worker can start with these settings; the line above says why.")
    finally:
        store.close()
        lock.release()


def _check_port(settings: ServeSettings) -> None:
    """Raise ConfigError if the address cannot be used."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"The address {settings.host}:{settings.port} cannot be used ({error.strerror or error}): choose another "
            "--port or --host."
        ) from error
