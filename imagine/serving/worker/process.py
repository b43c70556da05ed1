"""The process of one worker: load the pipeline, show signs of life, and run the loop until it is asked to stop.

It is started by `imagine.serving.server` with its settings as JSON on standard input, and ends when that input is
closed, so that no worker outlives a server that was killed. `python -m imagine.serving.worker.process FILE` starts one
by hand, for example on another machine with the same PostgreSQL database and folder.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagine.errors import ImagineError
from imagine.serving.logs import log_as_json
from imagine.serving.settings import ServeSettings
from imagine.serving.store.records import draw_id
from imagine.serving.store.store import Store
from imagine.serving.worker.loading import facts_of, load_pipeline
from imagine.serving.worker_contract import DEVICE_LOST, WRONG_INPUT

LOG = logging.getLogger("imagine.serving")


class Worker:
    """Runs a loop beside a thread that renews its leases."""

    def __init__(self, pipe: Any, store: Store, settings: ServeSettings, name: str | None = None) -> None:
        from imagine.serving.worker.loop import Loop
        from imagine.serving.worker_counts import Counts

        self.store, self.settings, self.name = store, settings, name or draw_id("wrk")
        self.counts = Counts()
        self.facts = facts_of(pipe, settings.base)
        self.loop = Loop(pipe, store, settings, self.name, self.counts)
        self._stop, self._ended = threading.Event(), threading.Event()

    def stop(self) -> None:
        """Ask the loop to end what it has begun, and to claim nothing more."""
        self._stop.set()

    def run(self) -> None:
        """Run until `stop`. Raises DeviceLostError."""
        self.beat()
        beats = threading.Thread(target=self._beat_until_end, daemon=True)
        beats.start()
        try:
            self.loop.run(self._stop.is_set, self.settings.drain, self._stop)
            self.store.access.forget_worker(self.name)
        finally:
            self._ended.set()
            beats.join()

    def beat(self) -> None:
        """Show a sign of life, and renew the leases."""
        self.store.access.beat(self.name, self.facts, self.counts.as_dict())
        self.store.jobs.renew(self.name, self.settings.lease)

    def _beat_until_end(self) -> None:
        """Beat three times per lease, but not while the loop makes no step: its jobs then go to another worker."""
        while not self._ended.wait(min(self.settings.lease / 3, 2.0)):
            if time.monotonic() - self.loop.last_tick < self.settings.stall:
                try:
                    self.beat()
                except Exception as error:  # a database that is away for a moment
                    LOG.warning("no sign of life", extra={"reason": type(error).__name__})


def main() -> int:
    """Run a worker with the settings on standard input, or in the file that is named; return its exit code."""
    text, from_file = (Path(sys.argv[1]).read_text(), True) if len(sys.argv) > 1 else (sys.stdin.readline(), False)
    settings = ServeSettings.model_validate_json(text)
    log_as_json(level=settings.log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the server too, which stops this process
    try:
        store = Store.open(settings)
        worker = Worker(load_pipeline(settings), store, settings)
    except ImagineError as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return WRONG_INPUT
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    if not from_file:
        threading.Thread(target=_stop_at_end_of_input, args=(worker.stop,), daemon=True).start()
    LOG.info("worker ready", extra={"worker": worker.name, "device": worker.facts["device"]})
    from imagine.serving.worker.failures import DeviceLostError

    try:
        worker.run()
    except DeviceLostError:
        LOG.exception("device lost", extra={"worker": worker.name})
        store.jobs.release(worker.name, settings.max_attempts)
        return DEVICE_LOST
    return 0


def _stop_at_end_of_input(stop: Callable[[], None]) -> None:
    """Stop when the server closes its end; end at once if it was killed and the loop does not end in time."""
    sys.stdin.read()
    stop()
    time.sleep(60)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
