"""`imagine demo`: draw four people with six prompts, and pairs of them, and print a command to try next.

Pairs are drawn only by weights that were trained with several people in a picture.
"""

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from imagine.cli.arguments import add_command, add_device, add_weights, small_seed
from imagine.cli.loading import load_pipeline, weights_folder
from imagine.cli.progress import Display
from imagine.paths import folder_to_fill

ALONE = "No picture shows two people, because these weights were trained with one person in a picture."
EXAMPLE_PROMPT = "a person, smiling, wearing a sun hat, on a beach"


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(commands, "demo", "draw four people, alone and in pairs, as scored contact sheets", run)
    command.add_argument("--output", type=Path, default=Path("out/demo"), metavar="DIR", help="folder for demo.png "
                         "and people.png (default: out/demo)")  # fmt: skip
    add_weights(command)
    add_device(command)
    command.add_argument("--seed", type=small_seed, default=7, metavar="N", help="seed of the noise (default: 7)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Draw the contact sheets; return where they are, their scores, and a command that draws another picture."""
    output = folder_to_fill(options.output)
    with Display(options) as display:
        display.report("importing the libraries")
        from imagine.evaluation.demo import draw_sheet, references_and_judge
        from imagine.evaluation.demo_people import draw_people_sheet, draws_two_people
        from imagine.pipeline.notes import world_notes

        references, judge = references_and_judge(weights_folder(options.weights))
        pipe = load_pipeline(options, display)
        sheet = draw_sheet(pipe, judge, references, output, options.seed, progress=display.report)
        people = None
        if draws_two_people(pipe):
            people = draw_people_sheet(pipe, references, output, options.seed, progress=display.report)
    command = generate_command(references[0], output, options.weights)
    return {
        "lines": [
            f"Similarity to another picture of the person: {sheet.similarity:.2f} (real pictures: {sheet.ceiling:.2f})",
            f"Requested attributes found: {sheet.found:.0%}",
            *([f"Two people in a picture: {people.matched} of {people.shown} recognised"] if people else [ALONE]),
            *world_notes(pipe.adapter),
            "",
            *(f"Open {each.path.resolve()}" for each in (sheet, people) if each),
            "",
            "Draw a picture of your own:",
            f"  {command}",
        ],
        "sheet": str(sheet.path),
        "people_sheet": str(people.path) if people else None,
        "similarity": sheet.similarity,
        "ceiling": sheet.ceiling,
        "found": sheet.found,
        "command": command,
    }


def generate_command(reference: Path, output: Path, weights: Path | None) -> str:
    """Return an `imagine generate` command that can be pasted into a shell in the current folder."""
    words = [*_imagine(), "generate", "--reference", _short(reference), "--prompt", EXAMPLE_PROMPT]
    words += ["--output", _short(output / "mine.png")] + (["--weights", _short(weights)] if weights else [])
    return shlex.join(words)


def _imagine() -> list[str]:
    """Return the command `imagine` of this Python; the shell may find one of another environment first."""
    installed, found = Path(sys.executable).parent / "imagine", shutil.which("imagine")
    if not installed.exists():
        return [_short(Path(sys.executable)), "-m", "imagine"]
    return ["imagine"] if found is not None and os.path.samefile(found, installed) else [_short(installed)]


def _short(path: Path) -> str:
    """Return a path relative to the current folder if it is within it, else the absolute path."""
    relative = os.path.relpath(path)
    return str(path.absolute()) if relative.startswith("..") else relative
