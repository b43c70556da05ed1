"""Show the progress of long work that is not training, such as rendering: a bar or, without a terminal, log lines."""

import logging
import sys
import time
from collections.abc import Iterator

from rich.progress import track

log = logging.getLogger("train")


def blocks(first: int, count: int, block: int, description: str, every: float = 10.0) -> Iterator[range]:
    """Yield the numbers from `first` to `count` in ranges of at most `block`, and show how much is done and the ETA.

    Without a terminal, a log line appears after the first `every` seconds, then every `every` seconds, and at the end
    if there was one before.
    """
    ranges = [range(start, min(start + block, count)) for start in range(first, count, block)]
    if sys.stderr.isatty():
        yield from track(ranges, description, disable=not ranges)
        return
    began = shown = time.monotonic()
    for each in ranges:
        yield each
        now = time.monotonic()
        if now - shown >= every or (each.stop == count and shown != began):
            left = (now - began) * (count - each.stop) / (each.stop - first)
            log.info("%s  %s of %s  %s left", description, f"{each.stop:,}", f"{count:,}", duration(left))
            shown = now


def duration(seconds: float) -> str:
    """Return the time for a reader: minutes as `3 h 20 min` from one minute on, else seconds."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
