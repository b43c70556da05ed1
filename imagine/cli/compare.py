"""`imagine compare`: compare systems by their evaluations."""

import argparse
from pathlib import Path
from typing import Any

from imagine.cli import arguments
from imagine.cli.printing import table_lines
from imagine.paths import folder_to_fill


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    command = arguments.add_command(
        commands, "compare", "compare evaluations of the same people and prompts, with paired tests", run
    )
    command.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders of `imagine evaluate`; the "
                         "first is compared with each of the others")  # fmt: skip
    command.add_argument("--output", type=Path, metavar="DIR", help="folder for compare.html and compare.json")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Compare, write the page if asked for, and return the differences."""
    output = None if options.output is None else folder_to_fill(options.output)
    from imagine.evaluation.compare import compare

    compared = compare(options.folders, output)
    rows = [
        [metric, name, f"{d['value']:+.3f}", f"{d['low']:+.3f} to {d['high']:+.3f}", f"{d['p_adjusted']:.4f}"]
        for metric, own in compared["differences"].items()
        for name, d in own.items()
    ]
    lines = table_lines(["metric", f"{compared['first']} minus", "difference", "95 % interval", "adjusted p"], rows)
    page = [] if output is None else [f"Page: {output / 'compare.html'}"]
    return {"lines": [*lines, *page], **compared}
