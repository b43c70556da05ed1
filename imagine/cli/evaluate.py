"""`imagine evaluate`: measure a pipeline on held-out people of the portrait world, and write a report."""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from imagine.cli import arguments
from imagine.cli.loading import load_pipeline, weights_folder
from imagine.cli.printing import interval, table_lines
from imagine.cli.progress import Display
from imagine.paths import folder_to_fill

_DRAWING = "drawing"  # the stage in which the pipeline draws, as imagine.evaluation.evaluate reports it


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    command = arguments.add_command(
        commands, "evaluate", "measure identity, prompt following and copying on held-out people", run
    )
    arguments.add_weights(command)
    arguments.add_device(command)
    command.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for report.html, "
                         "report.json and the pictures; an interrupted evaluation resumes there")  # fmt: skip
    command.add_argument("--suite", default="portraits", metavar="NAME", help="portraits (one person in each picture) "
                         "or people (two and three); default: portraits")  # fmt: skip
    command.add_argument("--identities", type=arguments.positive, metavar="N", help="number of people, at least 2 "
                         "(default: 51); in the suite people, of pairs (default: 100), and half as many groups of "
                         "three")  # fmt: skip
    command.add_argument("--prompts", type=arguments.positive, metavar="N", help="number of prompts for each person "
                         "(default: 13) or group (default: 5)")  # fmt: skip
    command.add_argument("--seed", type=arguments.seed, default=0, metavar="N", help="of people and noise (default: 0)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Draw and judge the pictures, write the report, and return what it holds."""
    output = folder_to_fill(options.output)
    with Display(options) as display:
        display.report("importing the libraries")
        from imagine.evaluation.evaluate import run
        from imagine.evaluation.judge import Judge

        folder = weights_folder(options.weights)
        pipe = load_pipeline(options, display)
        judge = Judge.from_pretrained(folder / "judge" if (folder / "judge").is_dir() else None)
        progress = display.report if options.json else Announcement(display.report, display.print)
        report = run(
            pipe, output, options.suite, options.identities, options.prompts, options.seed, judge, progress=progress
        )
    lines = [*_metric_table(report["metrics"]), "", *report["notes"], f"Report: {output / 'report.html'}"]
    return {"lines": lines, **report}


class Announcement:
    """Passes progress on, and prints how many pictures will be drawn and, after the first batch, how long it takes."""

    def __init__(self, report: Callable[[str, int, int], None], show: Callable[[str], None]) -> None:
        self._report, self._show = report, show
        self._first: int | None = None  # pictures that were there at the start; None: drawing has not begun
        self._started = 0.0
        self._estimated = False

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report a stage; see imagine.records.Progress."""
        if stage == _DRAWING and self._first is None:
            self._first, self._started = done, time.monotonic()
            self._show(_announce(done, total))
        elif stage == _DRAWING and not self._estimated and self._first is not None and done < total:
            self._estimated = True
            rate = (time.monotonic() - self._started) / (done - self._first)
            self._show(f"Drawing takes {rate:.2g} s a picture: about {duration(rate * (total - done))} left.")
        self._report(stage, done, total)


def _announce(done: int, total: int) -> str:
    if done == total:
        return f"An earlier run drew all {total:,} pictures."
    earlier = f"; an earlier run drew the other {done:,}" if done else ""
    pictures = "1 picture" if total - done == 1 else f"{total - done:,} pictures"
    return f"Drawing {pictures}{earlier}. The first batch will show how long that takes."


def duration(seconds: float) -> str:
    """Return a time as people say it: in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 100 * 60 else f"{seconds / 3600:.1f} hours"


def _metric_table(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    from imagine.evaluation.report import TITLES

    rows = [
        [
            TITLES[name],
            f"{each['value']:.3f}",
            interval(each["low"], each["high"]),
            f"{each['ceiling']:.3f}",
            f"{each['floor']:.3f}",
        ]
        for name, each in metrics.items()
    ]
    return table_lines(["metric", "value", "95 % interval", "ceiling", "floor"], rows)
