"""Shared set-up of all tests: one thread, a fixed seed, and no network access."""

import atexit
import gc
import os
import shutil
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
# Sums depend on the number of threads in their last bits. Tests compare bits, so all threads and all processes that a
# test starts compute with one thread too: `torch.set_num_threads` below acts in this thread only.
os.environ["OMP_NUM_THREADS"] = "1"

if sys.dont_write_bytecode:
    # CI sets this to keep the checkout clean. Every process that a test starts would then compile torch and other
    # libraries again, which takes longer than most of these tests, so all processes share bytecode in another folder.
    compiled = tempfile.mkdtemp(prefix="imagine-bytecode-")
    atexit.register(lambda: shutil.rmtree(compiled, ignore_errors=True))
    sys.pycache_prefix, sys.dont_write_bytecode = compiled, False
    os.environ["PYTHONPYCACHEPREFIX"] = compiled
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.browser import OpenPage

torch.set_num_threads(1)

# Pictures are signed with a key that is made in this folder.
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="imagine-data-")
atexit.register(shutil.rmtree, os.environ["XDG_DATA_HOME"], ignore_errors=True)

_connect = socket.socket.connect


def _only_this_machine(self: socket.socket, address: object) -> None:
    """Allow connections to this machine (servers under test) only."""
    host = address[0] if isinstance(address, tuple) else ""
    if self.family != socket.AF_UNIX and host not in ("127.0.0.1", "::1", "localhost"):
        raise AssertionError(f"a test tried to connect to {host!r}; tests run offline")
    _connect(self, address)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _offline_and_repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(socket.socket, "connect", _only_this_machine)
    torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True, scope="module")
def _freeze_garbage_collection() -> None:
    """Exclude existing objects from garbage collection: the libraries have a million, and each scan takes a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """The installed chromium; tests that need it are skipped where there is none."""
    from tests.browser import chromium, launched

    program = chromium()
    if program is None:
        pytest.skip("chromium is not installed")
    with launched(program) as found:
        yield found


@pytest.fixture
def open_page(browser: "Browser") -> Iterator["OpenPage"]:
    """Open an address in a new context; errors of the page, and requests to other places, fail the test."""
    from tests.browser import opening

    with opening(browser) as opened:
        yield opened


def pytest_unconfigure() -> None:
    gc.unfreeze()  # otherwise some libraries report leaks at exit
