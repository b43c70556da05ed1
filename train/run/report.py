"""Report the progress of a run: rows in metrics.jsonl, and a progress bar or, without a terminal, log lines.

Trackers such as TensorBoard receive the same numbers under STAGE/NAME, with the images seen as their step.

Averages stay on the device until a row is due, so that reporting does not slow down a GPU.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from train.run.checkpoint import replacing
from train.run.progress import duration

log = logging.getLogger("train")
_TIMING_SECONDS = 0.2  # time of the measurement for each precision
Track = Callable[[dict[str, float], int], None]  # takes numbers by name, and the images seen


class Report:
    """Reports one stage. A context manager, which removes the progress bar at its end. It is silent if not `active`."""

    def __init__(
        self,
        folder: Path,
        stage: str,
        images: int,
        images_seen: int,
        every: float,
        active: bool = True,
        track: Track | None = None,
    ) -> None:
        self.path, self.track = folder / "metrics.jsonl", track
        self.stage, self.images, self.every, self.active = stage, images, every, active
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, int] = {}
        self.row_first_image, self.row_started = images_seen, time.monotonic()
        self.bar = _bar() if active and sys.stderr.isatty() else None
        if active:
            cut_rows(self.path, images_seen)

    def __enter__(self) -> "Report":
        if self.bar:
            self.bar.start()
            self.line = self.bar.add_task(self.stage, total=self.images, completed=self.row_first_image, numbers="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def count(self, numbers: Mapping[str, float | Tensor], size: int) -> None:
        """Add the numbers of `size` images to the averages."""
        for name, value in numbers.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self.sums[name] = self.sums.get(name, 0.0) + value * size
            self.counts[name] = self.counts.get(name, 0) + size

    def row_if_due(self, images_seen: int, fixed: Mapping[str, Any]) -> None:
        """Write a row and show the progress if `every` seconds have passed since the last row."""
        if time.monotonic() - self.row_started >= self.every:
            self.row(images_seen, fixed)

    def row(self, images_seen: int, fixed: Mapping[str, Any]) -> None:
        """Write the averages since the last row, and the `fixed` numbers unchanged."""
        if images_seen == self.row_first_image:
            return
        now = time.monotonic()
        speed = (images_seen - self.row_first_image) / max(now - self.row_started, 1e-9)
        averages = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self._write({"images_seen": images_seen, **averages, **fixed, "images_per_second": round(speed, 2)})
        self._show_progress(images_seen, averages.get("loss", float("nan")), speed)
        self.sums, self.counts, self.row_first_image, self.row_started = {}, {}, images_seen, now

    def validation(self, images_seen: int, numbers: Mapping[str, float]) -> None:
        """Write a row of validation numbers, each under "validate/"."""
        self._write({"images_seen": images_seen, **{f"validate/{name}": value for name, value in numbers.items()}})
        if self.active and numbers:
            formatted = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            log.info("%s  %s images  validation: %s", self.stage, f"{images_seen:,}", formatted)

    def pause(self, seconds: float) -> None:
        """Exclude `seconds` that were not spent on training from the speed of the current row."""
        self.row_started += seconds

    def _write(self, row: Mapping[str, Any]) -> None:
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.track:
            tracked = {f"{self.stage}/{name}": value for name, value in row.items() if name != "images_seen"}
            self.track(tracked, row["images_seen"])

    def _show_progress(self, images_seen: int, loss: float, speed: float) -> None:
        if self.bar:
            self.bar.update(self.line, completed=images_seen, numbers=f"loss {loss:.4f}  {speed:.1f} images/s")
        elif self.active:
            left = duration((self.images - images_seen) / speed)
            done = f"{images_seen:,} of {self.images:,} images"
            log.info("%s  %s  loss %.4f  %.1f images/s  %s left", self.stage, done, loss, speed, left)


def cut_rows(path: Path, images_seen: int) -> None:
    """Delete rows later than `images_seen`, and a truncated last row: a resumed run writes them again."""
    if not path.exists():
        return
    remaining = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["images_seen"] <= images_seen:
                remaining.append(line + "\n")
        except json.JSONDecodeError:
            break
    with replacing(path) as draft:
        draft.write_text("".join(remaining), encoding="utf-8")


def faster_precision(device: torch.device) -> tuple[str, str]:
    """Time a matrix product in both precisions on this device; return "fp32" or "bf16", and the measurement as text."""
    size = 256 if device.type == "cpu" else 4096  # large enough that the product takes longer than its launch
    fp32, bf16 = (_product_seconds(size, device, dtype) for dtype in (torch.float32, torch.bfloat16))
    words = f"product of {size} x {size} matrices on {device}: fp32 {fp32 * 1e3:.2f} ms, bf16 {bf16 * 1e3:.2f} ms"
    return "bf16" if bf16 < fp32 else "fp32", words


def _product_seconds(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds of the fastest product within 0.2 s: on a busy machine most of them wait for other work."""
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best, attempts, end = float("inf"), 0, time.perf_counter() + _TIMING_SECONDS
    while attempts < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # reading a number waits for the device
        best, attempts = min(best, time.perf_counter() - start), attempts + 1
    return best


def _bar() -> Progress:
    numbers = TextColumn("{task.fields[numbers]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), numbers, TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), refresh_per_second=2)
