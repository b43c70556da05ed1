"""Evaluate a pipeline on held-out people, with the same prompts, people and noise in every run, next to real renders.

The same code scores every row of the report:

    full       the pipeline
    detached   the pipeline without a reference: the base alone, which has no information about the person
    ceiling    real renders of the person as the prompt describes
    other      real renders of another person as the prompt describes: identity by chance
    copy       the reference itself, for every prompt

The run writes each picture when it is made, and an interrupted run resumes after the last complete picture. The judge
reads the pictures back from disk, so a resumed run and an uninterrupted one judge the same pixels.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imagine.errors import ConfigError
from imagine.evaluation import group_evaluate, report
from imagine.evaluation.cases import (
    GALLERY,
    Cases,
    Judged,
    PictureLoader,
    judge_pictures,
    judge_real_pictures,
    make_cases,
)
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
from imagine.evaluation.scores import METRICS, score, summarise
from imagine.evaluation.suites import Prompt, load_suite
from imagine.pipeline.notes import world_notes
from imagine.records import Progress, no_progress
from imagine.world import VERSION, render

FORMAT_VERSION = 1
DRAWN_ROWS = ("full", "detached")
IDENTITIES = {"portraits": 51, "people": 100}  # defaults: people, or pairs of people
PROMPTS = {"portraits": 13, "people": 5}


def run(
    pipeline: Any,
    output: str | Path,
    suite: str = "portraits",
    identities: int | None = None,
    prompts: int | None = None,
    seed: int = 0,
    judge: Judge | None = None,
    rows: Sequence[str] = DRAWN_ROWS,
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    gallery: int = GALLERY,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Evaluate `pipeline` and write report.json, report.html, samples.png and pictures/ into `output`.

    Suite "people" draws several people in each picture (see `group_evaluate.run`); `rows` and `gallery` do not apply to
    it. `identities` and `prompts` have a default for each suite. `rows` are those the pipeline draws ("full",
    "detached"); `options` go to every call (steps, guidance ...); `gallery` is how many people rank-1 chooses among;
    `progress` is called as the stages advance. Returns what report.json holds. Raises ConfigError for an unknown suite
    or row, counts out of range, or an `output` that cannot be written or holds another evaluation.
    """
    identities = IDENTITIES.get(suite, 0) if identities is None else identities
    prompts = PROMPTS.get(suite, 0) if prompts is None else prompts
    if suite in GROUP_SUITES:
        return group_evaluate.run(
            pipeline, output, suite, identities, prompts, seed, judge, batch, options, progress=progress
        )
    output = Path(output)
    chosen = load_suite(suite)
    _check(chosen, identities, prompts, rows)
    judge = judge or Judge.from_pretrained()
    cases = make_cases(chosen[:prompts], identities, seed, gallery)
    settings = {"suite": suite, "identities": identities, "prompts": prompts, "seed": seed, "world": VERSION}
    check_settings_file(output, {**settings, "options": dict(options or {}), "weights": fingerprint(pipeline)})
    started = time.monotonic()
    progress("rendering the references", 0, 0)
    references = _render_references(cases, output)
    _draw(pipeline, cases, references, output, rows, seed, batch, dict(options or {}), progress)
    drawing = time.monotonic() - started
    real = judge_real_pictures(cases, judge, progress)
    judged = {row: _judge_row(judge, output, row, cases, progress) for row in rows} | real.rows
    progress("computing the scores", 0, 0)
    scores = {row: score(cases, judged[row], real) for row in judged}
    summary = {
        "format_version": FORMAT_VERSION, **settings, "commit": commit(), "gallery": len(cases.gallery),
        "options": dict(options or {}), "seconds": round(drawing, 1),
        "notes": world_notes(getattr(pipeline, "adapter", None)),
        **summarise(cases, scores, judged, real, seed),
    }  # fmt: skip
    _write(output, summary, cases, scores, judged, rows)
    return summary


def _render_references(cases: Cases, output: Path) -> list[Image.Image]:
    pictures = render(cases.people[: cases.identities], cases.references).images
    images = [report.to_pil(picture) for picture in pictures]
    for index, image in enumerate(images):
        save_atomically(image, output / "pictures" / "reference" / f"{index:03}.png")
    return images


# ---- drawn pictures ----


def _picture_path(output: Path, row: str, cases: Cases, case: int) -> Path:
    person, prompt = divmod(case, len(cases.prompts))
    return output / "pictures" / row / f"{person:03}_{prompt:02}.png"


def _draw(
    pipeline: Any, cases: Cases, references: Sequence[Image.Image], output: Path, rows: Sequence[str], seed: int,
    batch: int, options: dict[str, Any], progress: Progress,
) -> None:  # fmt: skip
    """Draw the missing pictures in batches; the noise of a picture does not depend on its batch."""
    todo = [
        (row, case)
        for row in rows
        for case in range(len(cases))
        if not _picture_path(output, row, cases, case).exists()
    ]
    total = len(cases) * len(rows)
    progress("drawing", total - len(todo), total)
    if not todo:
        return
    personas: dict[int, Any] = {}
    pipeline.set_progress_bar_config(disable=True)  # `progress` counts the pictures of the whole run
    done = total - len(todo)
    for row, some in _batches(todo, batch):
        for case in some:
            person = case // len(cases.prompts)
            if person not in personas:
                personas[person] = pipeline.enroll([references[person]], on_no_face="whole")
        drawn = pipeline(
            [cases.prompt(case).text for case in some],
            reference=[personas[case // len(cases.prompts)] for case in some] if row == "full" else None,
            generator=[generator_for(seed, case) for case in some],
            output_type="pil",
            **options,
        )
        for case, image in zip(some, drawn.images, strict=True):
            save_atomically(image, _picture_path(output, row, cases, case))
        done += len(some)
        progress("drawing", done, total)


def _batches(todo: Sequence[tuple[str, int]], batch: int) -> Iterator[tuple[str, list[int]]]:
    for row in dict.fromkeys(row for row, _ in todo):
        cases_of_row = [case for other, case in todo if other == row]
        for start in range(0, len(cases_of_row), batch):
            yield row, cases_of_row[start : start + batch]


def _judge_row(judge: Judge, output: Path, row: str, cases: Cases, progress: Progress) -> Judged:
    pictures = _from_disk(output, row, cases)
    return judge_pictures(judge, len(cases), pictures, progress=progress, stage=f"judging row {row}")


def _from_disk(output: Path, row: str, cases: Cases) -> PictureLoader:
    def pictures(start: int, stop: int) -> tuple[Tensor, None]:
        return torch.stack([read_picture(_picture_path(output, row, cases, case)) for case in range(start, stop)]), None

    return pictures


# ---- the run folder ----


def _check(suite: Sequence[Prompt], identities: int, prompts: int, rows: Sequence[str]) -> None:
    if not 2 <= identities <= GALLERY:
        raise ConfigError(f"{identities} identities cannot be evaluated: choose a number from 2 to {GALLERY}.")
    if not 1 <= prompts <= len(suite):
        raise ConfigError(f"{prompts} prompts cannot be evaluated: choose 1 to {len(suite)}, all that this suite has.")
    if not rows or set(rows) - set(DRAWN_ROWS):
        raise ConfigError(f"Rows {', '.join(rows) or '(none)'} cannot be drawn: choose from {', '.join(DRAWN_ROWS)}.")


def _write(
    output: Path, summary: Mapping[str, Any], cases: Cases, scores: Mapping[str, Mapping[str, Tensor]],
    judged: Mapping[str, Judged], rows: Sequence[str],
) -> None:  # fmt: skip
    samples = _samples(output, rows[0], cases)
    with config_error_on_failure(output / "report.html"):
        with (output / "pictures.jsonl").open("w", encoding="utf-8") as lines:
            for row in rows:
                for case in range(len(cases)):
                    line = _line(output, row, cases, case, scores[row], judged[row])
                    lines.write(json.dumps(line) + "\n")
        samples.save(output / "samples.png")
        (output / "report.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (output / "report.html").write_text(report.html(summary), encoding="utf-8")


def _line(
    output: Path, row: str, cases: Cases, case: int, scores: Mapping[str, Tensor], judged: Judged
) -> dict[str, Any]:
    prompt = cases.prompt(case)
    return {
        "row": row,
        "file": _picture_path(output, row, cases, case).relative_to(output).as_posix(),
        "identity": case // len(cases.prompts),
        "text": prompt.text,
        "asked": dict(prompt.asked),
        "read": judged.read[case],
        **{name: round(float(scores[name].view(-1)[case]), 4) for name in METRICS},
    }


def _samples(output: Path, row: str, cases: Cases, people: int = 8, prompts: int = 13) -> Image.Image:
    """Return a grid of the first people and prompts, with the reference in the first column."""
    lines = []
    for person in range(min(people, cases.identities)):
        files = [output / "pictures" / "reference" / f"{person:03}.png"] + [
            _picture_path(output, row, cases, person * len(cases.prompts) + prompt)
            for prompt in range(min(prompts, len(cases.prompts)))
        ]
        lines.append([report.Cell(report.to_pil(read_picture(file))) for file in files])
    headers = ["reference"] + [prompt.text for prompt in cases.prompts[:prompts]]
    return report.contact_sheet(headers, lines)
