"""The builder's command line: `python -m data_synth build`, `review` or `world`. It parses, calls and reports.

Exit codes: 0 done, 2 the input is wrong (one sentence on stderr), 1 our fault, 130 stopped by hand.
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
    """Says what is wrong in one sentence, without the page of usage before it."""

    def error(self, message: str) -> NoReturn:
        sentence = message[:1].upper() + message[1:]
        self.exit(2, f"{sentence}; `{self.prog} --help` lists what can be given.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one builder command; returns the exit code."""
    options = _parse_options(arguments)
    try:
        options.run(options)
    except ImagineError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; the same command carries on from here.", file=sys.stderr)
        return 130
    return 0


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; overrides may stand before and after them, which argparse does not allow by itself."""
    parser = _parser()
    options, unparsed = parser.parse_known_args(arguments)
    if unparsed and (options.command != "build" or any(text.startswith("-") for text in unparsed)):
        parser.error(f"unrecognized arguments: {' '.join(unparsed)}")
    if unparsed:
        options.overrides = [*options.overrides, *unparsed]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m data_synth", description="Build pairs of pictures, review them, draw the world.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_build(commands)
    add_review(commands)
    _add_world(commands)
    return parser


def _add_build(commands: Any) -> None:
    build = commands.add_parser("build", help="pairs from photos or from the world, as shards with a data card")
    build.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the build file")
    build.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the build file")
    build.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write or to carry on in; also s3://..."
    )
    build.add_argument("--backend", choices=("local", "ray"), default="local", help="where the work is done")
    build.set_defaults(run=_build)


def _add_world(commands: Any) -> None:
    world = commands.add_parser("world", help="pictures of the portrait world, with captions and attributes")
    world.add_argument("--identities", type=int, required=True, metavar="N", help="how many people")
    world.add_argument("--images", type=int, required=True, metavar="M", help="how many pictures of each of them")
    world.add_argument("--size", type=int, default=128, metavar="PX", help="side of the square pictures (default 128)")
    world.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same pictures (default 0)")
    world.add_argument(
        "--people",
        default="train",
        metavar="RANGE",
        help="whose seeds to draw people from: train (default), judge, held_out or demo; these never overlap",
    )
    world.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="write webdataset shards of N records instead, for training, with a data sheet (docs/data.md)",
    )
    world.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder to write or to carry on in; for shards also s3://... etc.",
    )
    world.set_defaults(run=_world)


def _build(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    from data_synth.build import build  # after the file is read: a typo is told before torch is loaded
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
    # torch loads only once there is work for it
    from data_synth.world_command import WorldSettings, build, build_shards

    settings = WorldSettings(
        options.identities, options.images, options.size, options.seed, options.people, options.shards
    )
    with _progress() as progress:
        task = progress.add_task("pictures", total=settings.identities * settings.images)

        def report(done: int) -> None:
            progress.update(task, completed=done)

        if settings.shards is None:
            written = str(build(settings, Path(options.output), report))
        else:
            written = build_shards(settings, options.output, report)
    print(f"{settings.identities * settings.images} pictures of {settings.identities} people: {written}")


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
