"""`make demo`: four strangers, six sentences, one contact sheet with scores, and then your own turn.

The references are pictures shipped in weights/examples, of people whom nothing was trained on. Under each picture
stand its similarity to *another* picture of the person (beside what a real one reaches) and, for each attribute that
the sentence asks for, whether the judge's reader finds it.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from imagine.errors import ConfigError, ImagineError, WeightsError
from imagine.evaluation import metrics, report
from imagine.evaluation.judge import Judge
from imagine.evaluation.suites import Prompt, contexts_for
from imagine.networks.weights import default_folder
from imagine.paths import as_path, folder_to_fill
from imagine.people.photos import open_photo
from imagine.world import render, sample_people, seeds

PEOPLE = tuple(seeds.DEMO.start + number for number in (1, 6, 14, 11))  # in the order of weights/examples
EXAMPLES = "examples"
SENTENCES = (
    Prompt("a person, laughing", "expression", {"expression": "laughing"}),
    Prompt(
        "a person, head turned to the left, eyes looking right", "gaze and head turn", {"yaw": "left", "gaze": "right"}
    ),
    Prompt("a person, smiling, in the snow", "scene", {"expression": "smiling", "scene": "snow"}),
    Prompt(
        'a person, wearing a red hoodie with the letters "HI"',
        "clothes and letters",
        {"clothes": "hoodie", "clothes_colour": "red", "letters": "HI"},
    ),
    Prompt("a person, wearing a crown, in space", "headwear", {"headwear": "crown", "scene": "space"}),
    Prompt("a pencil sketch of a person, looking surprised", "style", {"style": "pencil", "expression": "surprised"}),
)
EXAMPLE_PROMPT = "a person, smiling, wearing a sun hat, on a beach"


@dataclass(frozen=True)
class Sheet:
    """What the demo made: the contact sheet's file, and the scores it shows."""

    path: Path
    similarity: float  # mean over pictures, to another picture of the person
    ceiling: float  # the same for real renders
    found: float  # share of the asked-for attributes that the reader finds


def draw_sheet(
    pipeline: Any, judge: Judge, references: Sequence[Path], output: Path, seed: int = 7, people: Sequence[int] = PEOPLE
) -> Sheet:
    """Draw every person with every sentence and write demo.png into `output`.

    `people` are the world's seeds of those in `references`, from which real pictures to compare with are rendered.
    """
    photos = [open_photo(path) for path in references]
    pictures = [picture for photo in photos for picture in _draw_person(pipeline, photo, seed)]
    cells, sheet = _score(judge, pictures, people, output / "demo.png")
    rows = [
        [report.Cell(photo), *cells[number * len(SENTENCES) : (number + 1) * len(SENTENCES)]]
        for number, photo in enumerate(photos)
    ]
    headers = ["reference", *(sentence.text for sentence in SENTENCES)]
    title = "One photo and a sentence; under each picture what the judge says"
    try:
        output.mkdir(parents=True, exist_ok=True)
        report.contact_sheet(headers, rows, side=160, title=title).save(sheet.path)
    except OSError as error:
        raise ConfigError(
            f"{sheet.path} cannot be written ({error.strerror or error}): choose another --output."
        ) from error
    return sheet


def write_examples(folder: Path, people: Sequence[int] = PEOPLE) -> list[Path]:
    """Render the shipped references: one plain photo of each of `people`, as PNG files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    contexts = contexts_for([{"expression": "neutral", "yaw": "front", "gaze": "ahead"}] * len(people), people)
    paths = [folder / f"person-{number + 1}.png" for number in range(len(people))]
    for path, picture in zip(paths, render(sample_people(people), contexts).images, strict=True):
        report.to_pil(picture).save(path)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m imagine.cli.demo`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m imagine.cli.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="folder for demo.png (default: out/demo)")
    parser.add_argument("--weights", type=Path, help="weights folder (default: the shipped weights)")
    parser.add_argument("--seed", type=int, default=7)
    chosen = parser.parse_args(arguments)
    try:
        _run(chosen.output, chosen.weights, chosen.seed)
    except ImagineError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _run(output: Path, weights: Path | None, seed: int) -> None:
    output = folder_to_fill(output)
    weights = None if weights is None else as_path(weights)
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed {seed} cannot be used: give a whole number from 0 to {2**32 - 1}.")
    from imagine.pipeline.pipeline import ImaginePipeline

    pipeline = ImaginePipeline.from_pretrained(weights)
    pipeline.set_progress_bar_config(disable=True)
    references, judge = _references_and_judge(weights)
    print(f"Drawing {len(references)} people x {len(SENTENCES)} sentences ...", flush=True)
    sheet = draw_sheet(pipeline, judge, references, output, seed)
    print(f"Similarity to another picture of the person: {sheet.similarity:.2f} (real pictures: {sheet.ceiling:.2f})")
    print(f"Asked-for attributes found: {sheet.found:.0%}")
    print(f"\nOpen {sheet.path.resolve()}\n\nYour turn:\n  {generate_line(references[0], output, weights)}")


def _references_and_judge(weights: Path | None) -> tuple[list[Path], Judge]:
    """The example pictures and the judge that came with these weights, else the shipped ones."""
    folder = weights if weights and (weights / EXAMPLES).is_dir() else default_folder()
    references = sorted((folder / EXAMPLES).glob("*.png"))
    if len(references) != len(PEOPLE):
        raise WeightsError(f"{folder / EXAMPLES} should hold {len(PEOPLE)} example pictures; fetch the weights again.")
    folder = weights if weights and (weights / "judge").is_dir() else default_folder()
    return references, Judge.from_pretrained(folder / "judge")


def generate_line(reference: Path, output: Path, weights: Path | None) -> str:
    """An `imagine generate` command that works when pasted into a shell in the current folder."""
    words = [*_command(), "generate", "--reference", _short(reference), "--prompt", EXAMPLE_PROMPT]
    words += ["--output", _short(output / "mine.png")] + (["--weights", _short(weights)] if weights else [])
    return shlex.join(words)


def _command() -> list[str]:
    """The command `imagine` of this very Python; one of another environment may be the one that the shell finds."""
    installed, found = Path(sys.executable).parent / "imagine", shutil.which("imagine")
    if not installed.exists():
        return [_short(Path(sys.executable)), "-m", "imagine"]
    return ["imagine"] if found is not None and os.path.samefile(found, installed) else [_short(installed)]


def _short(path: Path) -> str:
    """Relative to the current folder where it lies within, else absolute."""
    relative = os.path.relpath(path)
    return str(path.absolute()) if relative.startswith("..") else relative


def _draw_person(pipeline: Any, photo: Image.Image, seed: int) -> list[Image.Image]:
    persona = pipeline.enroll([photo])
    drawn = pipeline(
        [sentence.text for sentence in SENTENCES],
        reference=[persona] * len(SENTENCES),
        generator=[torch.Generator().manual_seed(seed * 100 + number) for number in range(len(SENTENCES))],
        output_type="pil",
    )
    return list(drawn.images)


def _score(
    judge: Judge, pictures: Sequence[Image.Image], people: Sequence[int], path: Path
) -> tuple[list[report.Cell], Sheet]:
    """A cell for each picture, and the means; pictures come person by person."""
    asked = [sentence.asked for _ in people for sentence in SENTENCES]
    each = sample_people(people).repeat(len(SENTENCES))
    start = people[0] + 1_000
    truth, second = (
        render(each, contexts_for(asked, range(first, first + len(asked)))) for first in (start, start + 1_000)
    )
    truths = judge.embed(truth.images, truth.boxes)
    drawn = torch.stack([report.to_tensor(picture) for picture in pictures])
    similarity = metrics.similarity(judge.embed(drawn), truths)
    ceiling = metrics.similarity(judge.embed(second.images), truths)
    found = [metrics.found(wanted, read) for wanted, read in zip(asked, judge.read(drawn), strict=True)]
    cells = [
        report.Cell(picture, notes(float(one), float(most), wanted, right))
        for picture, one, most, wanted, right in zip(pictures, similarity, ceiling, asked, found, strict=True)
    ]
    answers = [right for each_found in found for right in each_found.values()]
    share = sum(answers) / len(answers)
    return cells, Sheet(path, float(similarity.mean()), float(ceiling.mean()), share)


def notes(
    similarity: float, ceiling: float, asked: Mapping[str, str], found: Mapping[str, bool]
) -> list[tuple[str, bool | None]]:
    """What stands under a picture: its likeness, then each asked-for word and whether it was found."""
    likeness: tuple[str, bool | None] = (f"likeness {similarity:.2f} (real {ceiling:.2f})", None)
    return [likeness, *((f"{asked[name]}: {'yes' if right else 'no'}", right) for name, right in found.items())]


if __name__ == "__main__":
    sys.exit(main())
