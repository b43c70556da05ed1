"""Evaluate a pipeline on pictures of two and three held-out people, next to real pictures of the same people.

Each group of people gets the same sentences, with a reference per person. For pairs, the picture of the first sentence
is drawn once more with the two references exchanged and the same noise: the people should change places. Pictures are
drawn, resumed and judged as `imagine.evaluation.evaluate` does with portraits.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imagine.errors import ConfigError
from imagine.evaluation import report
from imagine.evaluation.judge import Judge
from imagine.evaluation.metrics.several import tolerance
from imagine.evaluation.people import page
from imagine.evaluation.people.cases import GroupCases, make_group_cases
from imagine.evaluation.people.judging import (
    Pictures,
    embed_portraits,
    find_faces,
    judge_groups,
    portrait_squares,
    require_finder,
    same_person_threshold,
    with_patterns,
)
from imagine.evaluation.people.scores import JudgedRow, is_assigned, summarise
from imagine.evaluation.people.suites import GROUP_SUITES
from imagine.evaluation.runs.folder import (
    check_settings_file,
    commit,
    config_error_on_failure,
    noise_seed,
    read_picture,
    save_atomically,
)
from imagine.evaluation.runs.judged import JudgedStore
from imagine.evaluation.runs.pictures import RunPictures, Task, draw_missing, read_costs, remove_partial_files
from imagine.evaluation.runs.shards import WHOLE, Shard
from imagine.evaluation.systems.finished import FinishedPictures
from imagine.evaluation.systems.photographs import refuse_photographs
from imagine.evaluation.systems.pipelines import as_judgeable
from imagine.pipeline.notes import world_notes
from imagine.records import Progress, no_progress
from imagine.world import VERSION, People, canvas_shape, render

FORMAT_VERSION = 2
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

    @property
    def row(self) -> str:
        return "exchanged" if self.exchanged else "full"

    @property
    def id(self) -> str:
        """The name of the picture within its row."""
        group, prompt = divmod(self.case, len(self.cases.prompts))
        return f"{self.cases.count}_{group:03}_{prompt:02}"

    @property
    def members(self) -> list[int]:
        """The rows of the people whose references it takes, in the order of the names."""
        rows: list[int] = self.cases.members(torch.tensor([self.case]), self.exchanged)[0].tolist()
        return rows


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
    shard: Shard = WHOLE,
) -> dict[str, Any]:
    """Evaluate a system and write report.json, report.html, samples.png and pictures/ into `output`.

    `identities` is the number of pairs, and half of it (rounded up) the number of triples; `prompts` is the number of
    sentences for each of both. The threshold is measured on `threshold_people`. Other arguments, the result and the
    errors are those of `evaluate.run`.
    """
    output, chosen = Path(output), GROUP_SUITES[suite]
    _check(chosen, identities, prompts)
    judge = judge or Judge.from_pretrained()
    finder = require_finder(judge)  # before anything is drawn
    system = as_judgeable(pipeline, options)
    numbers = {2: identities, 3: -(-identities // 2)}
    sets = [make_group_cases(own[:prompts], count, numbers[count], seed) for count, own in chosen.items()]
    settings = {"suite": suite, "identities": identities, "prompts": prompts, "seed": seed, "world": VERSION}
    check_settings_file(output, {**settings, "options": dict(options or {}), "weights": system.fingerprint()})
    if shard.is_whole:
        remove_partial_files(output)
    pictures = RunPictures(output, system, side=None)
    failed = _draw(pictures, sets, seed, batch, settings, shard, progress)
    refuse_photographs(finder, _squares(judge, pictures, drawings(sets)[:8]), fewest=4)
    progress("measuring the threshold", 0, 0)
    threshold = same_person_threshold(judge, threshold_people)
    store = JudgedStore(output, judge.fingerprint(), shard)
    rows, limit = _judge_rows(judge, sets, pictures, threshold, store, progress)
    if not shard.is_whole:
        return {}
    unreadable = {**pictures.unreadable, **failed}
    summary = {
        "format_version": FORMAT_VERSION, **settings, "commit": commit(),
        "groups": {str(cases.count): cases.groups for cases in sets}, "threshold": threshold, "tolerance": limit,
        "system": system.name, "options": dict(options or {}), "costs": read_costs(output), "unreadable": unreadable,
        "notes": [
            *world_notes(getattr(getattr(system, "pipeline", None), "adapter", None)),
            *([f"{len(unreadable)} pictures could not be read and show nobody."] if unreadable else []),
        ],
        **summarise(sets, rows, seed),
    }  # fmt: skip
    _write(pictures, summary, sets, rows["full"])
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
    pictures: RunPictures, sets: Sequence[GroupCases], seed: int, batch: int, settings: Mapping[str, Any],
    shard: Shard, progress: Progress,
) -> dict[str, str]:  # fmt: skip
    """Draw the missing pictures, on canvases on which heads are as large as in portraits."""
    progress("rendering the references", 0, 0)
    references = {cases.count: _render_references(cases, pictures.output) for cases in sets}
    side = 0 if isinstance(pictures.system, FinishedPictures) else pictures.system.side
    tasks = [
        Task(
            each.row, each.id, each.cases.prompt(each.case).text,
            {name: (each.cases.count, row) for name, row in zip(each.cases.names, each.members, strict=True)},
            noise_seed(seed, each.noise), canvas_shape(each.cases.count, side),
        )
        for each in drawings(sets)
    ]  # fmt: skip
    facts = {"suite": settings["suite"], "system": pictures.system.name, "weights": pictures.system.fingerprint()}
    return draw_missing(
        pictures, tasks, lambda key: ([references[key[0]][key[1]]], "person"), batch, facts, shard, progress
    )


def _reference_path(output: Path, cases: GroupCases, row: int) -> Path:
    group, number = divmod(row, cases.count)
    return output / "pictures" / "reference" / f"{cases.count}_{group:03}_{cases.names[number]}.png"


def _render_references(cases: GroupCases, output: Path) -> list[Image.Image]:
    images = [report.to_pil(picture) for picture in render(cases.people, cases.references).images]
    for row, image in enumerate(images):
        if not _reference_path(output, cases, row).exists():
            save_atomically(image, _reference_path(output, cases, row))
    return images


# ---- judging ----


def _squares(judge: Judge, pictures: RunPictures, some: Sequence[Drawing]) -> list[Image.Image]:
    """Return a square like a portrait around each face of some pictures.

    The finders tell drawings from photographs by portraits, and less surely by wide pictures.
    """
    squares: list[Image.Image] = []
    for each in some:
        image = pictures.image(each.row, each.id)
        if image is not None:
            whole = report.to_tensor(image).unsqueeze(0)
            boxes = find_faces(judge, whole)[0]
            cut = portrait_squares(whole.expand(len(boxes), -1, -1, -1), boxes, judge.reader.size)
            squares += [report.to_pil(square) for square in cut]
    return squares


def _judge_rows(
    judge: Judge, sets: Sequence[GroupCases], pictures: RunPictures, threshold: float, store: JudgedStore,
    progress: Progress,
) -> tuple[dict[str, list[JudgedRow]], float]:  # fmt: skip
    """Judge every row: the drawn pictures, and the real ones of the group ("ceiling") and of strangers ("other").

    Also return the change of similarity from which a person counts as lost or gained.
    """
    rows: dict[str, list[JudgedRow]] = {"full": [], "ceiling": [], "other": []}
    truths = [embed_portraits(judge, cases.people, cases.truths) for cases in sets]
    real = [_real_similarities(judge, cases, own) for cases, own in zip(sets, truths, strict=True)]
    limit = tolerance(real[0])
    for cases, own, between in zip(sets, truths, real, strict=True):
        for row in rows:
            parts = []
            for exchanged, numbers in ((False, torch.arange(len(cases))), (True, cases.first_cases)):
                if exchanged and cases.count != 2:
                    continue
                judged = judge_groups(
                    judge, numbers, _pictures(row, cases, pictures, exchanged), own[cases.members(numbers)],
                    threshold, progress=progress, stage=f"judging row {row}", store=store,
                    places=[_places(cases, number, exchanged) for number in numbers.tolist()],
                    name=f"{row} {cases.count}{' exchanged' if exchanged else ''}",
                    source="" if row == "full" else f"{VERSION} {row} {exchanged}",
                )  # fmt: skip
                if store.shard.is_whole:
                    judged = with_patterns(judged, between[numbers // len(cases.prompts)], limit)
                parts.append(judged)
            rows[row].append(JudgedRow(parts[0], parts[1] if len(parts) > 1 else []))
    return rows, limit


def _real_similarities(judge: Judge, cases: GroupCases, truths: Tensor) -> Tensor:
    """Return S_gt of each group, (groups, P, P): the references, which are real pictures, against the truths."""
    shape = (cases.groups, cases.count, -1)
    references = embed_portraits(judge, cases.people, cases.references).view(shape)
    return references @ truths.view(shape).transpose(1, 2)


def _places(cases: GroupCases, case: int, exchanged: bool) -> list[int] | None:
    """Return where each person stands, from the left, or None if the sentence leaves it open."""
    prompt = cases.prompt(case)
    if not prompt.has_places:
        return None
    places = [person.place or 0 for person in prompt.people]
    return places[::-1] if exchanged else places


def _pictures(row: str, cases: GroupCases, pictures: RunPictures, exchanged: bool) -> Pictures:
    """Return the function that loads a row's pictures: from the folder, or rendered."""
    people: People = cases.strangers if row == "other" else cases.people

    def drawn(numbers: Tensor) -> Tensor:
        each = [Drawing(cases, case, exchanged) for case in numbers.tolist()]
        return pictures.load(each[0].row, [one.id for one in each])

    def real(numbers: Tensor) -> Tensor:
        return cases.render(numbers, people, exchanged).images

    return drawn if row == "full" else real


# ---- the run folder ----


def _write(
    pictures: RunPictures, summary: Mapping[str, Any], sets: Sequence[GroupCases], rows: Sequence[JudgedRow]
) -> None:
    output = pictures.output

    def reference(cases: GroupCases, row: int) -> Image.Image:
        return report.to_pil(read_picture(_reference_path(output, cases, row)))

    def drawn(cases: GroupCases, case: int) -> Image.Image | None:
        return pictures.image("full", Drawing(cases, case).id)

    samples = page.samples(sets, rows, reference, drawn)
    with config_error_on_failure(output / "report.html"):
        with (output / "pictures.jsonl").open("w", encoding="utf-8") as lines:
            for cases, row in zip(sets, rows, strict=True):
                for case in range(len(cases)):
                    lines.write(json.dumps(_line(pictures, cases, case, row)) + "\n")
        samples.save(output / "samples.png")
        (output / "report.html").write_text(page.html(summary, samples), encoding="utf-8")
        (output / "report.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _line(pictures: RunPictures, cases: GroupCases, case: int, row: JudgedRow) -> dict[str, Any]:
    """Return one line of pictures.jsonl: a picture, and what was asked and found of each of its people."""
    prompt, judged, drawing = cases.prompt(case), row.pictures[case], Drawing(cases, case)
    people = [
        {
            "name": name, "present": person.present, "asked": dict(wanted.asked), "read": person.read,
            "similarity": None if person.similarity is None else round(person.similarity, 4), "pattern": pattern,
        }
        for name, wanted, person, pattern in zip(
            cases.names, prompt.people, judged.people, judged.patterns, strict=True
        )
    ]  # fmt: skip
    return {
        "row": "full", "id": drawing.id, "file": pictures.name(pictures.path("full", drawing.id)),
        "text": prompt.text, "faces": judged.faces, "doubled": judged.doubled,
        "assigned": is_assigned(prompt, judged), "people": people,
    }  # fmt: skip
