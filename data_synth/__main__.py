"""The builder's command line: `python -m data_synth build`, `review` or `world`.

Exit codes: 0 success, 1 an internal error, 2 wrong input (one sentence on stderr), 130 interrupted with Ctrl+C.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_synth.config import load_config
from data_synth.review.server import add_review
from imagine.errors import ImagineError


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one sentence, without the usage text."""

    def error(self, message: str) -> NoReturn:
        sentence = message[:1].upper() + message[1:]
        self.exit(2, f"{sentence}; `{self.prog} --help` lists the options.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one builder command and return the exit code."""
    options = _parse_options(arguments)
    try:
        options.run(options)
    except ImagineError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; run the same command again to resume.", file=sys.stderr)
        return 130
    return 0


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options. Overrides may come before and after them, which argparse does not support by itself."""
    parser = _parser()
    options, unparsed = parser.parse_known_args(arguments)
    if unparsed and (options.command != "build" or any(text.startswith("-") for text in unparsed)):
        parser.error(f"unrecognized arguments: {' '.join(unparsed)}")
    if unparsed:
        options.overrides = [*options.overrides, *unparsed]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m data_synth",
        description="Build pairs of pictures, review them, or draw pictures of the portrait world.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_build(commands)
    add_review(commands)
    _add_world(commands)
    return parser


def _add_build(commands: Any) -> None:
    build = commands.add_parser(
        "build", help="build pairs from photos or from the portrait world, as shards with a data card"
    )
    build.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the build file")
    build.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the build file")
    build.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write, or to resume a build in; also s3://..."
    )
    build.add_argument(
        "--backend", choices=("local", "ray"), default="local", help="run on this machine (default) or on Ray"
    )
    build.set_defaults(run=_build)


def _add_world(commands: Any) -> None:
    world = commands.add_parser("world", help="draw pictures of the portrait world, with captions and attributes")
    world.add_argument("--identities", type=int, required=True, metavar="N", help="number of people")
    world.add_argument("--images", type=int, required=True, metavar="M", help="number of pictures per person")
    world.add_argument(
        "--size", type=int, default=128, metavar="PX", help="side of the square pictures in pixels (default 128)"
    )
    world.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed gives the same pictures (default 0)"
    )
    world.add_argument(
        "--people",
        default="train",
        metavar="RANGE",
        help="range of people to draw from: train (default), judge, held_out or demo; the ranges never overlap",
    )
    world.add_argument(
        "--groups", type=int, default=0, metavar="N", help="number of further pictures of several of these people"
    )
    world.add_argument(
        "--group-size", type=int, default=2, metavar="P", help="people in each of them: 2 (default), 3 or 4"
    )
    world.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="write webdataset shards of N records with a data sheet, for training, not PNG files (docs/data.md)",
    )
    world.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder to write, or to resume in; for shards also s3://... and the like",
    )
    world.set_defaults(run=_world)


def _build(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    # imported late, so that a mistake in the file is reported before torch is loaded
    from data_synth.build import build
    from data_synth.card.funnel import print_funnel

    with _progress() as progress:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total or None)
            progress.update(tasks[what], completed=done)

        built = build(config, options.output, options.backend, report)
    print_funnel(built.funnel, Console())
    print(f"{built.manifest['counts']['pairs']:,} pairs in {len(built.manifest['shards'])} shards: {options.output}")


def _world(options: argparse.Namespace) -> None:
    # Imported late, because it imports torch.
    from data_synth.world_command import WorldSettings, build, build_shards

    settings = WorldSettings(
        options.identities, options.images, options.size, options.seed, options.people, options.shards,
        options.groups, options.group_size,
    )  # fmt: skip
    with _progress() as progress:
        task = progress.add_task("pictures", total=settings.pictures)

        def report(done: int) -> None:
            progress.update(task, completed=done)

        if settings.shards is None:
            written = str(build(settings, Path(options.output), report))
        else:
            written = build_shards(settings, options.output, report)
    groups = f", {settings.groups} of them of {settings.group_size} people" if settings.groups else ""
    print(f"{settings.pictures} pictures of {settings.identities} people{groups}: {written}")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


if __name__ == "__main__":
    sys.exit(main())
