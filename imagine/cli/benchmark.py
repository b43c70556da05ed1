"""`imagine benchmark`: write the photos and prompts of a fixed split, for methods that run elsewhere."""

import argparse
from pathlib import Path
from typing import Any

from imagine.cli import arguments
from imagine.cli.progress import Display
from imagine.paths import folder_to_fill


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    command = arguments.add_command(
        commands, "benchmark", "write the photos and prompts of a benchmark, to be drawn by any method", run
    )
    command.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for references/, "
                         "tasks.jsonl and benchmark.json")  # fmt: skip
    command.add_argument("--split", default="test", metavar="NAME", help="test or validation (default: test)")
    command.add_argument("--identities", type=arguments.positive, default=51, metavar="N", help="number of people "
                         "(default: 51)")  # fmt: skip
    command.add_argument("--prompts", type=arguments.positive, default=65, metavar="N", help="number of prompts for "
                         "each person (default: 65)")  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Write the split and return what was written."""
    output = folder_to_fill(options.output)
    with Display(options) as display:
        display.report("importing the libraries")
        from imagine.evaluation.benchmark.splits import load_split
        from imagine.world import VERSION

        display.report("rendering the photos")
        split = load_split(options.split, options.identities, options.prompts)
        split.write(output)
    count = len(split.cases)
    lines = [
        f"{count:,} tasks of {VERSION}, split {split.name}: {output / 'tasks.jsonl'}",
        f"Draw each as ID.png into one folder, then run: imagine evaluate --pictures FOLDER --seed {split.seed} "
        f"--identities {options.identities} --prompts {options.prompts} --output REPORT",
    ]
    return {"lines": lines, "benchmark": VERSION, "split": split.name, "tasks": count, "digest": split.digest}
