"""Stores for tests, with a clock that tests move, on SQLite and, where it is installed, on PostgreSQL."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imagine.serving.settings import ServeSettings
from imagine.serving.store.jobs import Admission
from imagine.serving.store.records import Job
from imagine.serving.store.store import Store


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def settings_of(folder: Path, **more: Any) -> ServeSettings:
    return ServeSettings(folder=folder, **more)


def admit(store: Store, owner: str = "ann", count: int = 1, most: int = 100, **more: Any) -> Job:
    """Accept a job for so many pictures."""
    wanted = {"kind": "pictures", "request": {"prompt": "a person"}, "deadline": 60.0, "keep": 600.0}
    wanted |= {"seeds": list(range(count)), **more}
    return store.jobs.admit(Admission(owner=owner, **wanted), most, most)[0]  # type: ignore[arg-type]


@contextlib.contextmanager
def postgresql() -> Iterator[str | None]:
    """Start a PostgreSQL server with an empty database and give its URL; None where none is installed."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb") or "")]
    initdb = programs[-1]
    if not initdb.is_file():
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="imagine-pg-"))
    as_user: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        shutil.chown(folder, "nobody")
        as_user = ["setpriv", "--reuid=nobody", "--clear-groups"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    made = subprocess.run(
        [*as_user, str(initdb), "-D", str(folder / "data"), "-U", "tester", "--auth=trust", "-N"], **quiet
    )
    if made.returncode:
        yield None
        return
    options = ["-D", str(folder / "data"), "-p", str(port), "-h", "127.0.0.1", "-k", str(folder), "-F"]
    server = subprocess.Popen([*as_user, str(initdb.with_name("postgres")), *options], **quiet)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        time.sleep(0.3)
        yield f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait(20)
        shutil.rmtree(folder, ignore_errors=True)
