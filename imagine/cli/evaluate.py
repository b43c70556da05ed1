"""`imagine evaluate`: measure a pipeline on held-out people of the portrait world, and write a report."""

import argparse
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from imagine.cli import arguments
from imagine.cli.loading import load_pipeline, silence_libraries, weights_folder
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
    command.add_argument("--suite", default="portraits", metavar="NAME", help="portraits (one person in each picture), "
                         "people (two and three), or with --photos: dreambench, or photos (your own); default: "
                         "portraits")  # fmt: skip
    command.add_argument("--identities", type=arguments.positive, metavar="N", help="number of people, at least 2 "
                         "(default: 51); in the suite people, of pairs (default: 100), and half as many groups of "
                         "three; with --photos, of subjects (default: all)")  # fmt: skip
    command.add_argument("--prompts", type=arguments.positive, metavar="N", help="number of prompts for each person "
                         "(default: 13) or group (default: 5); with --photos: all")  # fmt: skip
    command.add_argument("--seed", type=arguments.seed, default=0, metavar="N", help="seed of the people and the "
                         "noise (default: 0)")  # fmt: skip
    command.add_argument("--pictures", type=Path, metavar="DIR", help="judge the finished pictures in this folder and "
                         "draw nothing; docs/evaluation.md says how to name them")  # fmt: skip
    command.add_argument("--images-per-prompt", type=arguments.positive, metavar="N", help="pictures of each prompt, "
                         "for diversity (default: 1; in dreambench 4)")  # fmt: skip
    _add_photos(command)
    command.add_argument("--processes", type=arguments.positive, default=1, metavar="N", help="divide the work among N "
                         "processes, with the same numbers (default: 1)")  # fmt: skip
    command.add_argument("--ray", action="store_true", help="run the processes as tasks of a Ray cluster that shares "
                         "this file system (extra `ray`)")  # fmt: skip


def _add_photos(command: Any) -> None:
    command.add_argument("--photos", type=Path, metavar="DIR", help="folder of photos, for the suites dreambench and "
                         "photos")  # fmt: skip
    command.add_argument("--prompt-file", type=Path, metavar="FILE", help="prompts for the suite photos, one in each "
                         "line (default: prompts.txt in the folder of photos)")  # fmt: skip
    command.add_argument("--references", type=arguments.positive, default=1, metavar="N", help="photos of each person "
                         "that are given to the system; the others are compared with (default: 1)")  # fmt: skip
    command.add_argument("--clip", metavar="DIR|MODEL=FILE", help="a CLIP model of open_clip on this disk (default: "
                         "ViT-B/32 of OpenAI, if it is in the cache)")  # fmt: skip
    command.add_argument("--dino", metavar="DIR", help="a DINO model of transformers on this disk")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Draw and judge the pictures, write the report, and return what it holds."""
    output = folder_to_fill(options.output)
    with Display(options) as display:
        display.report("importing the libraries")
        from imagine.evaluation.evaluate import run, run_sharded
        from imagine.evaluation.judge import Judge

        folder = weights_folder(options.weights)
        settings: dict[str, Any] = {
            "suite": options.suite, "identities": options.identities, "prompts": options.prompts, "seed": options.seed,
            "judge": Judge.from_pretrained(folder / "judge" if (folder / "judge").is_dir() else None),
            "variants": options.images_per_prompt or 1, "photos": _photo_settings(options),
        }  # fmt: skip
        progress = display.report if options.json else Announcement(display.report, display.print)
        if options.processes > 1 or options.ray:
            make = functools.partial(_load_system, options.weights, options.device, options.pictures)
            report = run_sharded(
                make, output, options.processes, "ray" if options.ray else "processes", progress, **settings
            )
        else:
            system = _finished(options.pictures) if options.pictures else load_pipeline(options, display)
            report = run(system, output, progress=progress, **settings)
    lines = [*_metric_table(report["metrics"]), "", *report["notes"], f"Report: {output / 'report.html'}"]
    return {"lines": lines, **report}


def _load_system(weights: Path | None, device: str, pictures: Path | None) -> Any:
    """Return what is judged, in a process of its own."""
    if pictures is not None:
        return _finished(pictures)
    silence_libraries()
    options = argparse.Namespace(weights=weights, device=device, json=True)
    with Display(options) as display:
        return load_pipeline(options, display)


def _finished(folder: Path) -> Any:
    from imagine.evaluation.systems.finished import FinishedPictures

    return FinishedPictures(folder)


def _photo_settings(options: argparse.Namespace) -> Any:
    if options.photos is None:
        return None
    from imagine.evaluation.photos.evaluate import PhotoSettings

    return PhotoSettings(
        options.photos, options.prompt_file, options.references, options.images_per_prompt, options.clip, options.dino
    )


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


def _metric_table(metrics: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    from imagine.evaluation.report import TITLES

    rows = [
        [
            TITLES.get(name, name),
            _number(each["value"]),
            interval(each["low"] or 0.0, each["high"] or 0.0),
            _number(each["ceiling"]),
            _number(each["floor"]),
        ]
        for name, each in metrics.items()
    ]
    return table_lines(["metric", "value", "95 % interval", "ceiling", "floor"], rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
