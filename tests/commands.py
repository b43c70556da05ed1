"""Run the command line in tests: in this process or in another one, and what a refusal looks like."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.root import ROOT

Run = Callable[..., tuple[int, str, str]]  # arguments -> exit code, stdout, stderr


def generate(weights: Path, photo: Path, output: Path, *more: Any) -> list[Any]:
    """Return the arguments of a short `imagine generate`."""
    usual = ["generate", "--weights", weights, "--prompt", "smiling on a beach", "--seed", "7", "--steps", "2"]
    return [*usual, "--reference", photo, "--output", output, *more]


def assert_refused(code: int, out: str, err: str) -> None:
    """Check for exit code 2 and exactly one line, a sentence, on stderr."""
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.strip().endswith(".") and "Traceback" not in err


def process(*arguments: str, **setting: str) -> "subprocess.CompletedProcess[str]":
    """Run Python in another process, from this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **setting}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Make stderr a pseudo-terminal in this block; afterwards the list holds what was written to it."""
    master, slave = os.openpty()
    written: list[str] = []

    def read() -> None:
        received = b""
        with contextlib.suppress(OSError):  # which ends the reading where the other side is closed
            while block := os.read(master, 4096):
                received += block
        written.append(received.decode())

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patch, open(slave, "w", encoding="utf-8") as stream:
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "100")
        patch.setattr(sys, "stderr", stream)
        yield written
    reader.join()
    os.close(master)
