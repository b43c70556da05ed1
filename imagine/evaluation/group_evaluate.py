"""Evaluate a pipeline on pictures of two and three held-out people, next to real pictures of the same people.

Each group of people gets the same sentences, with a reference per person. For pairs, the picture of the first sentence
is drawn once more with the two references exchanged and the same noise: the people should change places. Pictures are
drawn, resumed and judged as `imagine.evaluation.evaluate` does with portraits.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imagine.errors import ConfigError
from imagine.evaluation import group_report, report
from imagine.evaluation.group_cases import GroupCases, make_group_cases
from imagine.evaluation.group_judging import (
    Pictures,
    embed_portraits,
    judge_groups,
    require_finder,
    same_person_threshold,
)
from imagine.evaluation.group_scores import JudgedRow, is_assigned, summarise
from imagine.evaluation.group_suites import GROUP_SUITES
from imagine.evaluation.judge import Judge
from imagine.evaluation.run_folder import (
    check_settings_file,
    commit,
    config_error_on_failure,
    fingerprint,
    generator_for,
    read_picture,
    save_atomically,
)
from imagine.pipeline.notes import world_notes
from imagine.records import Progress, no_progress
from imagine.world import VERSION, People, canvas_shape, render

FORMAT_VERSION = 1
MOST_GROUPS = 1000
_NOISE_STEP = 500_000  # between the noise of pictures of two and of three people


@dataclass(frozen=True)
class Drawing:
    """One picture to draw; `exchanged`: with the references in reverse order."""

    cases: GroupCases
    case: int
    exchanged: bool = False

    @property
    def noise(self) -> int:
        """The number of the picture's noise, which does not depend on the number of groups."""
        return self.case + (self.cases.count - 2) * _NOISE_STEP

    def path(self, output: Path) -> Path:
        group, prompt = divmod(self.case, len(self.cases.prompts))
        row = "exchanged" if self.exchanged else "full"
        return output / "pictures" / row / f"{self.cases.count}_{group:03}_{prompt:02}.png"


def run(
    pipeline: Any,
    output: str | Path,
    suite: str = "people",
    identities: int = 100,
    prompts: int = 5,
    seed: int = 0,
    judge: Judge | None = None,
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    threshold_people: int = 300,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Evaluate `pipeline` and write report.json, report.html, samples.png and pictures/ into `output`.

    `identities` is the number of pairs, and half of it (rounded up) the number of triples; `prompts` is the number of
    sentences for each of both. The threshold is measured on `threshold_people`. Other arguments, the result and the
    errors are those of `evaluate.run`.
    """
    output, chosen = Path(output), GROUP_SUITES[suite]
    _check(chosen, identities, prompts)
    judge = judge or Judge.from_pretrained()
    require_finder(judge)  # before anything is drawn
    numbers = {2: identities, 3: -(-identities // 2)}
    sets = [make_group_cases(own[:prompts], count, numbers[count], seed) for count, own in chosen.items()]
    settings = {"suite": suite, "identities": identities, "prompts": prompts, "seed": seed, "world": VERSION}
    check_settings_file(output, {**settings, "options": dict(options or {}), "weights": fingerprint(pipeline)})
    started = time.monotonic()
    _draw(pipeline, sets, output, seed, batch, dict(options or {}), progress)
    drawing = time.monotonic() - started
    progress("measuring the threshold", 0, 0)
    threshold = same_person_threshold(judge, threshold_people)
    rows = _judge_rows(judge, sets, output, threshold, progress)
    summary = {
        "format_version": FORMAT_VERSION, **settings, "commit": commit(),
        "groups": {str(cases.count): cases.groups for cases in sets}, "threshold": threshold,
        "options": dict(options or {}), "seconds": round(drawing, 1),
        "notes": world_notes(getattr(pipeline, "adapter", None)), **summarise(sets, rows, seed),
    }  # fmt: skip
    _write(output, summary, sets, rows["full"])
    return summary


def _check(chosen: Mapping[int, Sequence[Any]], identities: int, prompts: int) -> None:
    most = min(map(len, chosen.values()))
    if not 2 <= identities <= MOST_GROUPS:
        raise ConfigError(f"{identities} pairs of people cannot be evaluated: choose a number from 2 to {MOST_GROUPS}.")
    if not 1 <= prompts <= most:
        raise ConfigError(f"{prompts} prompts cannot be evaluated: choose 1 to {most}, all that this suite has.")


# ---- drawn pictures ----


def drawings(sets: Sequence[GroupCases]) -> list[Drawing]:
    """Return all pictures of an evaluation."""
    plain = [Drawing(cases, case) for cases in sets for case in range(len(cases))]
    pairs = [cases for cases in sets if cases.count == 2]
    return plain + [Drawing(cases, case, True) for cases in pairs for case in cases.first_cases.tolist()]


def _draw(
    pipeline: Any, sets: Sequence[GroupCases], output: Path, seed: int, batch: int, options: dict[str, Any],
    progress: Progress,
) -> None:  # fmt: skip
    """Draw the missing pictures in batches; the noise of a picture does not depend on its batch."""
    progress("rendering the references", 0, 0)
    references = {cases.count: _render_references(cases, output) for cases in sets}
    everything = drawings(sets)
    todo = [drawing for drawing in everything if not drawing.path(output).exists()]
    done = len(everything) - len(todo)
    progress("drawing", done, len(everything))
    if not todo:
        return
    personas: dict[tuple[int, int], Any] = {}
    pipeline.set_progress_bar_config(disable=True)  # `progress` counts the pictures of the whole run
    for some in _batches(todo, batch):
        for cases, row in [(each.cases, row) for each in some for row in _members(each)]:
            if (cases.count, row) not in personas:
                personas[cases.count, row] = pipeline.enroll([references[cases.count][row]], on_no_face="whole")
        _draw_batch(pipeline, some, personas, output, seed, options)
        done += len(some)
        progress("drawing", done, len(everything))


def _draw_batch(
    pipeline: Any, some: Sequence[Drawing], personas: Mapping[tuple[int, int], Any], output: Path, seed: int,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Draw pictures of one number of people, on a canvas on which heads are as large as in portraits."""
    cases = some[0].cases
    side = int(pipeline.unet.config.sample_size) * int(pipeline.vae_scale_factor)
    height, width = canvas_shape(cases.count, side)
    drawn = pipeline(
        [each.cases.prompt(each.case).text for each in some],
        reference=[
            {name: personas[cases.count, row] for name, row in zip(cases.names, _members(each), strict=True)}
            for each in some
        ],
        generator=[generator_for(seed, each.noise) for each in some],
        output_type="pil",
        **{"height": height, "width": width, **options},
    )
    for each, image in zip(some, drawn.images, strict=True):
        save_atomically(image, each.path(output))


def _members(drawing: Drawing) -> list[int]:
    """Return the rows of the people whose references a drawing takes, in the order of the names."""
    rows: list[int] = drawing.cases.members(torch.tensor([drawing.case]), drawing.exchanged)[0].tolist()
    return rows


def _batches(todo: Sequence[Drawing], batch: int) -> Iterator[list[Drawing]]:
    """Yield batches of pictures of one size."""
    for count in dict.fromkeys(each.cases.count for each in todo):
        own = [each for each in todo if each.cases.count == count]
        for start in range(0, len(own), batch):
            yield own[start : start + batch]


def _reference_path(output: Path, cases: GroupCases, row: int) -> Path:
    group, number = divmod(row, cases.count)
    return output / "pictures" / "reference" / f"{cases.count}_{group:03}_{cases.names[number]}.png"


def _render_references(cases: GroupCases, output: Path) -> list[Image.Image]:
    images = [report.to_pil(picture) for picture in render(cases.people, cases.references).images]
    for row, image in enumerate(images):
        save_atomically(image, _reference_path(output, cases, row))
    return images


# ---- judging ----


def _judge_rows(
    judge: Judge, sets: Sequence[GroupCases], output: Path, threshold: float, progress: Progress
) -> dict[str, list[JudgedRow]]:
    """Judge every row: the drawn pictures, and the real ones of the group ("ceiling") and of strangers ("other")."""
    rows: dict[str, list[JudgedRow]] = {"full": [], "ceiling": [], "other": []}
    for cases in sets:
        truths = embed_portraits(judge, cases.people, cases.truths)
        for row in rows:
            parts = [
                judge_groups(
                    judge, numbers, _pictures(row, cases, output, exchanged), truths[cases.members(numbers)],
                    threshold, progress=progress, stage=f"judging row {row}",
                )
                for exchanged, numbers in ((False, torch.arange(len(cases))), (True, cases.first_cases))
                if cases.count == 2 or not exchanged
            ]  # fmt: skip
            rows[row].append(JudgedRow(parts[0], parts[1] if len(parts) > 1 else []))
    return rows


def _pictures(row: str, cases: GroupCases, output: Path, exchanged: bool) -> Pictures:
    """Return the function that loads a row's pictures: from the folder, or rendered."""
    people: People = cases.strangers if row == "other" else cases.people

    def drawn(numbers: Tensor) -> Tensor:
        return torch.stack([read_picture(Drawing(cases, case, exchanged).path(output)) for case in numbers.tolist()])

    def real(numbers: Tensor) -> Tensor:
        return cases.render(numbers, people, exchanged).images

    return drawn if row == "full" else real


# ---- the run folder ----


def _write(output: Path, summary: Mapping[str, Any], sets: Sequence[GroupCases], rows: Sequence[JudgedRow]) -> None:
    def reference(cases: GroupCases, row: int) -> Image.Image:
        return report.to_pil(read_picture(_reference_path(output, cases, row)))

    def drawn(cases: GroupCases, case: int) -> Image.Image:
        return report.to_pil(read_picture(Drawing(cases, case).path(output)))

    samples = group_report.samples(sets, rows, reference, drawn)
    with config_error_on_failure(output / "report.html"):
        with (output / "pictures.jsonl").open("w", encoding="utf-8") as lines:
            for cases, row in zip(sets, rows, strict=True):
                for case in range(len(cases)):
                    lines.write(json.dumps(_line(output, cases, case, row)) + "\n")
        samples.save(output / "samples.png")
        (output / "report.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (output / "report.html").write_text(group_report.html(summary), encoding="utf-8")


def _line(output: Path, cases: GroupCases, case: int, row: JudgedRow) -> dict[str, Any]:
    """Return one line of pictures.jsonl: a picture, and what was asked and found of each of its people."""
    prompt, judged = cases.prompt(case), row.pictures[case]
    people = [
        {
            "name": name, "present": person.present, "asked": dict(wanted.asked), "read": person.read,
            "similarity": None if person.similarity is None else round(person.similarity, 4),
        }
        for name, wanted, person in zip(cases.names, prompt.people, judged.people, strict=True)
    ]  # fmt: skip
    return {
        "row": "full", "file": Drawing(cases, case).path(output).relative_to(output).as_posix(),
        "text": prompt.text, "faces": judged.faces, "doubled": judged.doubled,
        "assigned": is_assigned(prompt, judged), "people": people,
    }  # fmt: skip
