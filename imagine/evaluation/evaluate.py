"""Evaluate a system on held-out people, with the same prompts, people and noise in every run, next to real renders.

The same code scores every row of the report:

    full       the system
    detached   the system without a reference: the base alone, which has no information about the person
    ceiling    real renders of the person as the prompt describes
    other      real renders of another person as the prompt describes: identity by chance
    copy       the reference itself, for every prompt

The run writes each picture when it is made and each batch of results when it is judged, and an interrupted run resumes
after them. The judge reads the pictures back from disk, so a resumed run judges the same pixels as any other.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from imagine.errors import ConfigError
from imagine.evaluation import breakdown, report
from imagine.evaluation.cases import GALLERY, Cases, Judged, JudgedReal, judge_pictures, judge_real_pictures, make_cases
from imagine.evaluation.judge import Judge
from imagine.evaluation.page import portraits as portraits_page
from imagine.evaluation.people import evaluate as people_evaluate
from imagine.evaluation.people.suites import GROUP_SUITES
from imagine.evaluation.photos import evaluate as photos_evaluate
from imagine.evaluation.photos.subjects import PHOTO_SUITES
from imagine.evaluation.runs.folder import (
    check_settings_file,
    commit,
    config_error_on_failure,
    noise_seed,
    save_atomically,
)
from imagine.evaluation.runs.judged import JudgedStore
from imagine.evaluation.runs.pictures import RunPictures, Task, draw_missing, read_costs, remove_partial_files
from imagine.evaluation.runs.shards import WHOLE, Executor, Shard, run_shards
from imagine.evaluation.scores import FLOORS, MAIN, TABLE, Metric, other_metrics, score, summarise, weights
from imagine.evaluation.suites import Prompt, load_suite, suite_version
from imagine.evaluation.systems.contracts import DETACHED, FULL
from imagine.evaluation.systems.finished import FinishedPictures, Judgeable
from imagine.evaluation.systems.photographs import refuse_photographs
from imagine.evaluation.systems.pipelines import as_judgeable
from imagine.pipeline.notes import world_notes
from imagine.records import Progress, no_progress
from imagine.world import VERSION, render

__all__ = ["FLOORS", "IDENTITIES", "PROMPTS", "run", "run_sharded"]

FORMAT_VERSION = 2
DRAWN_ROWS = (FULL, DETACHED)
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
    rows: Sequence[str] | None = None,
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    gallery: int = GALLERY,
    progress: Progress = no_progress,
    variants: int = 1,
    shard: Shard = WHOLE,
    photos: photos_evaluate.PhotoSettings | None = None,
) -> dict[str, Any]:
    """Evaluate a system and write report.json, report.html, samples.png and pictures/ into `output`.

    `pipeline` is one of our pipelines, a `systems.System`, or a folder of `FinishedPictures`. Suite "people" draws
    several people in each picture (see `people.evaluate.run`); "dreambench" and "photos" use the photographs of
    `photos` (see `photos.evaluate.run`); `rows`, `gallery` and `variants` apply to neither.

    `identities` and `prompts` have a default for each suite. `rows` are those the system draws ("full", "detached");
    `options` go to every call of one of our pipelines (steps, guidance ...); `gallery` is how many people rank-1
    chooses among; `variants` is the number of pictures of each case, from which diversity is measured; `progress` is
    called as the stages advance. With a `shard`, only this part of the work is done, and {} is returned. Otherwise the
    result is what report.json holds. Raises ConfigError for an unknown suite or row, counts out of range, photographs
    where drawings are judged, or an `output` that cannot be written or holds another evaluation.
    """
    shared: dict[str, Any] = {"seed": seed, "batch": batch, "options": options, "progress": progress, "shard": shard}
    if suite in PHOTO_SUITES:
        return photos_evaluate.run(pipeline, output, suite, photos, identities, prompts, **shared)
    identities = IDENTITIES.get(suite, 0) if identities is None else identities
    prompts = PROMPTS.get(suite, 0) if prompts is None else prompts
    if suite in GROUP_SUITES:
        return people_evaluate.run(pipeline, output, suite, identities, prompts, judge=judge, **shared)
    chosen = load_suite(suite)
    system = as_judgeable(pipeline, options)
    rows = system.rows if rows is None else rows
    _check(chosen, identities, prompts, rows, system, variants)
    cases = make_cases(chosen[:prompts], identities, seed, gallery)
    settings = {"suite": suite, "identities": identities, "prompts": prompts, "seed": seed, "world": VERSION}
    if (version := suite_version(prompts)) > 1:  # files of version 1 do not say it
        settings["suite_version"] = version
    portraits = Portraits(
        RunPictures(Path(output), system), cases, judge or Judge.from_pretrained(), tuple(rows), settings, variants,
        dict(options or {}), shard, progress,
    )  # fmt: skip
    return portraits.run(batch)


def run_sharded(
    make_system: Callable[[], Any],
    output: str | Path,
    shards: int,
    executor: Executor = "processes",
    progress: Progress = no_progress,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluate in several processes, or on Ray: the result is that of `run(make_system(), output, **settings)`.

    Each process makes its own system, so `make_system` and the settings must be picklable.
    """
    run_shards(_ShardWork(make_system, str(output), settings), shards, executor, progress)
    return run(make_system(), output, progress=progress, **settings)


@dataclass(frozen=True)
class _ShardWork:
    """What each process of `run_sharded` does."""

    make_system: Callable[[], Any]
    output: str
    settings: Mapping[str, Any]

    def __call__(self, shard: Shard) -> None:
        run(self.make_system(), self.output, shard=shard, **self.settings)


@dataclass(frozen=True)
class Portraits:
    """One evaluation of the suite `portraits`."""

    pictures: RunPictures
    cases: Cases
    judge: Judge
    rows: tuple[str, ...]
    settings: Mapping[str, Any]
    variants: int
    options: Mapping[str, Any]
    shard: Shard
    progress: Progress

    @property
    def output(self) -> Path:
        return self.pictures.output

    def run(self, batch: int) -> dict[str, Any]:
        """Draw, judge and report; in a part of a run, only draw and judge."""
        variants = {} if self.variants == 1 else {"variants": self.variants}
        check_settings_file(
            self.output,
            {**self.settings, **variants, "options": self.options, "weights": self.pictures.system.fingerprint()},
        )
        if self.shard.is_whole:
            remove_partial_files(self.output)
        self.progress("rendering the references", 0, 0)
        references = self._render_references()
        failed = self._draw(references, batch)
        refuse_photographs(self.judge.finder, [self.pictures.image(self.rows[0], self.id(c)) for c in self._sample()])
        judged, more, real = self._judge()
        if not self.shard.is_whole:
            return {}
        self.progress("computing the scores", 0, 0)
        table = (*TABLE, *other_metrics(list(real.truths.others)))
        scores = {row: score(self.cases, each, real, table) for row, each in judged.items()}
        summary = self._summary(judged, more, real, scores, table)
        summary["unreadable"] = {**self.pictures.unreadable, **failed}
        summary["notes"] = [*summary["notes"], *unreadable_notes(summary["unreadable"])]
        self._write(summary, scores, judged)
        return summary

    def id(self, case: int, variant: int = 0) -> str:
        """Return the name of a picture within its row."""
        person, prompt = divmod(case, len(self.cases.prompts))
        return f"{person:03}_{prompt:02}" + (f"_{variant}" if variant else "")

    def _sample(self) -> list[int]:
        return list(range(0, len(self.cases), max(1, len(self.cases) // 16)))

    def _render_references(self) -> list[Image.Image]:
        rendered = render(self.cases.people[: self.cases.identities], self.cases.references).images
        images = [report.to_pil(picture) for picture in rendered]
        for index, image in enumerate(images):
            path = self.output / "pictures" / "reference" / f"{index:03}.png"
            if not path.exists():
                save_atomically(image, path)
        return images

    def _draw(self, references: Sequence[Image.Image], batch: int) -> dict[str, str]:
        places = [(row, variant) for row in self.rows for variant in range(self.variants if row == FULL else 1)]
        seed, each = int(self.settings["seed"]), len(self.cases.prompts)
        tasks = [
            Task(
                row, self.id(case, variant), self.cases.prompt(case).text, case // each if row == FULL else None,
                noise_seed(seed, case, variant),
            )
            for row, variant in places
            for case in range(len(self.cases))
        ]  # fmt: skip
        facts = {"suite": self.settings["suite"], "system": self.pictures.system.name}
        return draw_missing(
            self.pictures, tasks, lambda person: ([references[person]], "person"), batch,
            {**facts, "weights": self.pictures.system.fingerprint()}, self.shard, self.progress,
        )  # fmt: skip

    def _judge(self) -> tuple[dict[str, Judged], list[Judged], JudgedReal]:
        """Return the judged rows, the further variants of the first row, and the real pictures."""
        store = JudgedStore(self.output, self.judge.fingerprint(), self.shard)
        real = judge_real_pictures(self.cases, self.judge, self.progress, store, scenes=DETACHED in self.rows)
        judged = {row: self._judge_row(row, 0, store) for row in self.rows}
        more = [self._judge_row(FULL, variant, store) for variant in range(1, self.variants)]
        return {**judged, **real.rows}, more, real

    def _judge_row(self, row: str, variant: int, store: JudgedStore) -> Judged:
        def pictures(start: int, stop: int) -> tuple[Tensor, None]:
            return self.pictures.load(row, [self.id(case, variant) for case in range(start, stop)]), None

        return judge_pictures(
            self.judge, len(self.cases), pictures, progress=self.progress, stage=f"judging row {row}", store=store,
            name=f"{row} {variant}",
        )  # fmt: skip

    def _summary(
        self, judged: Mapping[str, Judged], more: Sequence[Judged], real: JudgedReal,
        scores: Mapping[str, Mapping[str, Tensor]], table: Sequence[Metric],
    ) -> dict[str, Any]:  # fmt: skip
        cases, seed, main = self.cases, int(self.settings["seed"]), judged[self.rows[0]]
        counts = weights(cases, main, real, table)
        evaluated = cases.people[: cases.identities]
        main_scores = {row: {name: values[name] for name in MAIN} for row, values in scores.items()}
        return {
            "format_version": FORMAT_VERSION, "suite_version": 1, **self.settings, "commit": commit(),
            "gallery": len(cases.gallery),
            "system": self.pictures.system.name, "options": self.options, "variants": self.variants,
            "costs": read_costs(self.output),
            "notes": world_notes(getattr(getattr(self.pictures.system, "pipeline", None), "adapter", None)),
            **summarise(scores, counts, table, seed),
            "attributes": breakdown.attribute_table(cases, judged),
            "groups": breakdown.prompt_groups(cases, main_scores),
            "leakage": breakdown.leakage_table(cases, judged, real.reference_attributes),
            **breakdown.people_table(evaluated, scores, counts, seed),
            "faces": {row: float(each.faces.float().mean()) for row, each in judged.items()},
            "agreement": breakdown.agreement(judged, real),
            "distributions": breakdown.distribution_table(cases, judged, real),
            "diversity": breakdown.diversity_table(cases, [main, *more], real, seed),
            "disturbance": breakdown.disturbance_table(cases, judged, real, seed),
            "people": {
                name: [round(float(value), 6) for value in _person_means(scores[self.rows[0]][name], counts[name])]
                for name in counts
            },
        }  # fmt: skip

    def _write(
        self, summary: Mapping[str, Any], scores: Mapping[str, Mapping[str, Tensor]], judged: Mapping[str, Judged]
    ) -> None:
        samples = self._samples()
        gallery = portraits_page.ranked_pictures(
            scores[self.rows[0]],
            self._picture_of,
            [self.cases.prompt(c).text for c in range(len(self.cases))],
            lambda case: self._reference(case // len(self.cases.prompts)),
        )
        with config_error_on_failure(self.output / "report.html"):
            with (self.output / "pictures.jsonl").open("w", encoding="utf-8") as lines:
                for row in self.rows:
                    for case in range(len(self.cases)):
                        lines.write(json.dumps(self._line(row, case, scores[row], judged[row])) + "\n")
            samples.save(self.output / "samples.png")
            (self.output / "report.html").write_text(portraits_page.html(summary, samples, gallery), encoding="utf-8")
            (self.output / "report.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def _line(self, row: str, case: int, scores: Mapping[str, Tensor], judged: Judged) -> dict[str, Any]:
        prompt = self.cases.prompt(case)
        return {
            "row": row,
            "id": self.id(case),
            "file": self.pictures.name(self.pictures.path(row, self.id(case))),
            "identity": case // len(self.cases.prompts),
            "reference": f"pictures/reference/{case // len(self.cases.prompts):03}.png",
            "text": prompt.text,
            "asked": dict(prompt.asked),
            "read": judged.read[case],
            "face": bool(judged.faces[case]),
            "readable": bool(judged.readable[case]),
            **{name: round(float(values.view(-1)[case]), 4) for name, values in scores.items()},
        }

    def _reference(self, person: int) -> Image.Image | None:
        with Image.open(self.output / "pictures" / "reference" / f"{person:03}.png") as image:
            return image.convert("RGB")

    def _picture_of(self, case: int) -> Image.Image | None:
        return replace(self.pictures, unreadable={}).image(self.rows[0], self.id(case))

    def _samples(self, people: int = 8, prompts: int = 13) -> Image.Image:
        """Return a grid of the first people and prompts, with the reference in the first column."""
        lines, each = [], len(self.cases.prompts)
        for person in range(min(people, self.cases.identities)):
            cells = [self._picture_of(person * each + prompt) for prompt in range(min(prompts, each))]
            lines.append([report.Cell(image or report.blank()) for image in [self._reference(person), *cells]])
        headers = ["reference"] + [prompt.text for prompt in self.cases.prompts[:prompts]]
        return report.contact_sheet(headers, lines)


def unreadable_notes(unreadable: Mapping[str, str]) -> list[str]:
    """Return the sentence about pictures that count as failures, or nothing."""
    if not unreadable:
        return []
    first = next(iter(unreadable.values()))
    count = "1 picture" if len(unreadable) == 1 else f"{len(unreadable)} pictures"
    counts = "counts as a failure" if len(unreadable) == 1 else "count as failures"
    return [f"{count} could not be read and {counts} in every metric. The first: {first}"]


def _person_means(values: Tensor, weight: Tensor) -> list[float]:
    means: list[float] = ((values * weight).sum(1) / weight.sum(1).clamp(min=1e-9)).tolist()
    return means


def _check(
    suite: Sequence[Prompt], identities: int, prompts: int, rows: Sequence[str], system: Judgeable, variants: int
) -> None:
    if not 2 <= identities <= GALLERY:
        raise ConfigError(f"{identities} identities cannot be evaluated: choose a number from 2 to {GALLERY}.")
    if not 1 <= prompts <= len(suite):
        raise ConfigError(f"{prompts} prompts cannot be evaluated: choose 1 to {len(suite)}, all that this suite has.")
    if not rows or set(rows) - set(system.rows):
        raise ConfigError(f"Rows {', '.join(rows) or '(none)'} cannot be drawn: choose from {', '.join(system.rows)}.")
    if not 1 <= variants <= 100:
        raise ConfigError(f"{variants} pictures of each prompt cannot be evaluated: choose a number from 1 to 100.")
    if isinstance(system, FinishedPictures) and variants > 1:
        raise ConfigError("A folder of finished pictures has one picture of each prompt: leave the variants out.")
