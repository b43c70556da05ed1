"""Clean stops on a signal or a time limit; the loop checks between steps, and long preparations between blocks."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType


class Stopped(Exception):
    """Raised to end work that a later start resumes, because the run should stop; its text says why."""


class Stopping:
    """Decides whether to stop cleanly: after a number of minutes, or after a SIGTERM or SIGINT.

    `max_training_seconds` stops each stage once it has trained for so long, over all starts of the run
    (`Progress.seconds`); the loop keeps `trained_seconds` up to date.
    """

    def __init__(self, max_minutes: float | None = None, max_training_seconds: float | None = None) -> None:
        self.deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.most_trained = math.inf if max_training_seconds is None else max_training_seconds
        self.trained_seconds = 0.0
        self.signal: str | None = None

    @property
    def reason(self) -> str | None:
        """The reason to stop as text, or None."""
        if self.signal:
            return f"received {self.signal}"
        if time.monotonic() >= self.deadline:
            return "the time of --max-minutes is over"
        return "its training time is over" if self.trained_seconds >= self.most_trained else None

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Record SIGTERM and SIGINT within the block; a second signal ends the process as usual."""
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
        """Within the block, `raise_if_stopping` raises Stopped once there is a reason to stop."""
        token = _interruptible_by.set(self)
        try:
            yield
        finally:
            _interruptible_by.reset(token)


_interruptible_by: ContextVar[Stopping | None] = ContextVar("interruptible_by", default=None)


def raise_if_stopping() -> None:
    """Raise Stopped if the run should stop and is interruptible. Call it where no finished work would be lost."""
    stopping = _interruptible_by.get()
    if stopping is not None and stopping.reason is not None:
        raise Stopped(stopping.reason)
