"""Whether a run is to stop cleanly, and who may ask: the loop between steps, and long preparations between blocks."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType


class Stopped(Exception):
    """Work that carries on where it was left ends here, because the run is to stop; its text says why."""


class Stopping:
    """Whether to stop cleanly: after a number of minutes, or when the process is asked to end (SIGTERM, SIGINT)."""

    def __init__(self, max_minutes: float | None = None) -> None:
        self.deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.signal: str | None = None

    @property
    def reason(self) -> str | None:
        """Why to stop, in words, or None."""
        if self.signal:
            return f"asked to by {self.signal}"
        return "the minutes given are over" if time.monotonic() >= self.deadline else None

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Take note of the two signals; a second one ends the process as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle_signal(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """For the block `raise_if_stopping` ends what is under way once there is a reason."""
        token = _interruptible_by.set(self)
        try:
            yield
        finally:
            _interruptible_by.reset(token)


_interruptible_by: ContextVar[Stopping | None] = ContextVar("asked", default=None)


def raise_if_stopping() -> None:
    """Raise Stopped if the run is to stop and may do so anywhere; called where nothing done so far would be lost."""
    stopping = _interruptible_by.get()
    if stopping is not None and stopping.reason is not None:
        raise Stopped(stopping.reason)
