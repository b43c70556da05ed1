"""The contact sheet of `imagine demo`: four held-out people, six prompts, and the judge's scores under each picture.

The references are pictures shipped in weights/examples, of people on whom nothing was trained. Under each picture stand
its similarity to *another* picture of the person (beside the similarity that a real render reaches) and, for each
attribute that the prompt asks for, whether the judge's reader finds it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from imagine.errors import ConfigError, WeightsError
from imagine.evaluation import metrics, report
from imagine.evaluation.judge import Judge
from imagine.evaluation.suites import Prompt, contexts_for
from imagine.networks.weights import default_folder
from imagine.people.photos import open_photo
from imagine.records import Progress, no_progress
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


@dataclass(frozen=True)
class Sheet:
    """The contact sheet that was drawn, and the scores that it shows."""

    path: Path
    similarity: float  # mean over the pictures, to another picture of the person
    ceiling: float  # the same for real renders
    found: float  # fraction of the requested attributes that the reader finds


def draw_sheet(
    pipeline: Any, judge: Judge, references: Sequence[Path], output: Path, seed: int = 7,
    people: Sequence[int] = PEOPLE, progress: Progress = no_progress,
) -> Sheet:  # fmt: skip
    """Draw every person with every prompt and write demo.png into `output`.

    `people` are the world's seeds of the people in `references`; real pictures to compare with are rendered from them.
    Raises ConfigError if the file cannot be written.
    """
    photos = [open_photo(path) for path in references]
    pictures = list[Image.Image]()
    for photo in photos:
        progress("drawing", len(pictures), len(photos) * len(SENTENCES))
        pictures += _draw_person(pipeline, photo, seed)
    progress("judging the pictures", 0, 0)
    cells, sheet = _score(judge, pictures, people, output / "demo.png")
    rows = [
        [report.Cell(photo), *cells[number * len(SENTENCES) : (number + 1) * len(SENTENCES)]]
        for number, photo in enumerate(photos)
    ]
    headers = ["reference", *(sentence.text for sentence in SENTENCES)]
    title = "One photo and a prompt; under each picture the judge's scores"
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


def references_and_judge(weights: Path) -> tuple[list[Path], Judge]:
    """Return the example pictures and the judge in this weights folder, or the shipped ones if it has none."""
    folder = weights if (weights / EXAMPLES).is_dir() else default_folder()
    references = sorted((folder / EXAMPLES).glob("*.png"))
    if len(references) != len(PEOPLE):
        raise WeightsError(
            f"{folder / EXAMPLES} must hold {len(PEOPLE)} example pictures, but holds {len(references)}; copy or "
            "download the weights again."
        )
    folder = weights if (weights / "judge").is_dir() else default_folder()
    return references, Judge.from_pretrained(folder / "judge")


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
    """Return a cell for each picture, and the means; the pictures are ordered by person."""
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
    """Return the lines under a picture: its likeness, then each requested attribute and whether it was found."""
    likeness: tuple[str, bool | None] = (f"likeness {similarity:.2f} (real {ceiling:.2f})", None)
    return [likeness, *((f"{asked[name]}: {'yes' if right else 'no'}", right) for name, right in found.items())]
