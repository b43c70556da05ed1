"""Compare recipes at equal wall-clock: `python -m train.bakeoff configs/bakeoff/arms.yaml --output runs/bakeoff`.

The arms are those of an ablation (`train.ablation`), but each of their stages trains for a time instead of a number of
images, because a better network may be slower. A stage first trains for a share of its time with a constant rate; from
its speed follows how many images it reaches in all, which then fixes its learning rate. These numbers are kept, so a
command that was stopped at any moment carries on with the same ones.

    DIR/shared/STAGE                 the stages that all arms share
    DIR/ARM-SEED/                    the arm's run, its weights/ and its evaluation/
    DIR/ARM-SEED/STAGE.budget.json   the images of a stage, and the speed from which they follow
    DIR/bakeoff.json, bakeoff.md     the table

The deciding number is the geometric mean of SimGT and prompt, each as a share of its ceiling. Intervals are 95 %, from
a bootstrap over people; those of the differences to `full` use the same people in both arms.
"""

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import Field, model_validator

from imagine.errors import ConfigError
from imagine.settings import listed
from train.ablation import (
    FULL,
    Ablation,
    arm_run,
    command_line,
    judge_arm,
    link_shared,
    people_scores,
    run_command,
)
from train.config import Run, Stage
from train.run import checkpoint
from train.run.checkpoint import replacing, write_json
from train.run.progress import duration

log = logging.getLogger("train")
_UNBOUNDED = 1_000_000_000  # images of a stage while its speed is measured
_RESAMPLES = 2_000


class Bakeoff(Ablation):
    """The arms, the training time of each stage in seconds, and the weights whose judge decides."""

    seconds: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    measure: Annotated[float, Field(gt=0, lt=0.5)] = 0.15  # share of a stage's time in which its speed is measured
    # a folder of weights, relative to where the command runs; None: the shared stages recogniser and reader
    judge: Path | None = None
    identities: Annotated[int, Field(ge=2)] = 20

    @model_validator(mode="after")
    def _every_stage_has_a_time(self) -> "Bakeoff":
        needed = {stage for name in self.arms for stage in self.own_stages(name)}
        if missing := sorted(needed - set(self.seconds)):
            raise ValueError(f"seconds: give a time for {listed(missing)}, which arms train")
        if unused := sorted(set(self.seconds) - needed - set(self.shared)):
            raise ValueError(f"seconds: no arm trains {unused[0]}; remove it")
        if self.judge is None and not {"recogniser", "reader"} <= set(self.shared):
            raise ValueError("judge: name a folder of weights with a judge, or share the stages recogniser and reader")
        return self


def run_bakeoff(
    bakeoff: Bakeoff,
    output: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    max_minutes: float | None = None,
    tasks: Mapping[str, Any] | None = None,
) -> bool:
    """Train and judge these arms, and write the table; return False if it was stopped before the end."""
    if bakeoff.judge is not None and not (bakeoff.judge / "judge").is_dir():
        raise ConfigError(f"The bake-off's judge is {bakeoff.judge}, which holds no judge; name weights with one.")
    trainer = _Trainer(bakeoff, output / "shared", max_minutes, tasks)
    if not trainer.train(arm_run(bakeoff, FULL, seeds[0], overrides), output / "shared", bakeoff.shared):
        return False
    todo = [(name, seed) for seed in seeds for name in arms]
    for number, (name, seed) in enumerate(todo, 1):
        log.info("arm %d of %d: %s, seed %d", number, len(todo), name, seed)
        run, folder = arm_run(bakeoff, name, seed, overrides), output / f"{name}-{seed}"
        link_shared(bakeoff, name, run, output / "shared", folder)
        if not trainer.train(run, folder, bakeoff.own_stages(name)):
            return False
        judge_arm(bakeoff, run, folder, bakeoff.own_stages(name)[-1], bakeoff.judge or folder / "weights")
        write_table(bakeoff, output)
    return True


class _Trainer:
    """Trains stages for their time. Gates do not count: they are for a whole recipe."""

    def __init__(
        self, bakeoff: Bakeoff, shared: Path, max_minutes: float | None, tasks: Mapping[str, Any] | None
    ) -> None:
        import time

        from train.stages import TASKS

        self.bakeoff, self.shared, self.clock = bakeoff, shared, time.monotonic
        self.tasks = TASKS if tasks is None else tasks
        self.ends = None if max_minutes is None else self.clock() + 60 * max_minutes

    def train(self, run: Run, folder: Path, stages: Sequence[str]) -> bool:
        """Train these stages in order; return False if stopped before the end. One without a time trains its images."""
        places = {stage: folder if stage in stages else self.shared for stage in run.stages}
        budgets = {stage: _read_budget(place, stage) for stage, place in places.items()}
        run = _with_images(run, {stage: found["images"] for stage, found in budgets.items() if found})
        for stage in stages:
            if stage in self.bakeoff.seconds and not budgets[stage]:
                images = self._measure(run, folder, stage)
                if images is None:
                    return False
                run = _with_images(run, {stage: images})
            if not self._run(run, folder, stage):
                return False
        return True

    def _run(self, run: Run, folder: Path, stage: str, seconds: float | None = None) -> bool:
        from train.stages import run_stages

        left = None if self.ends is None else max(0.0, (self.ends - self.clock()) / 60)
        return run_stages(
            run, folder, resume=True, only=[stage], max_minutes=left, max_training_seconds=seconds, tasks=self.tasks
        )

    def _measure(self, run: Run, folder: Path, stage: str) -> int | None:
        """Train a stage for the first share of its time; return its images in all, or None if it was stopped."""
        it, budget = run.stages[stage], self.bakeoff.seconds[stage]
        if it.schedule == "cosine":
            raise ConfigError(
                f"Stage {stage}: the rate of a cosine depends on the images, which follow from the time; use trapezoid."
            )
        until = self.bakeoff.measure * budget
        most = _UNBOUNDED // it.batch_size * it.batch_size
        self._run(_with_images(run, {stage: most}), folder, stage, until)
        saved = checkpoint.load(folder / stage / "checkpoints", lambda _: True)
        if saved is None or saved.progress.seconds < until:
            return None
        speed = measured_speed(folder / stage / "metrics.jsonl", saved.progress.images_seen, saved.progress.seconds)
        images = images_for(it, saved.progress.images_seen, saved.progress.seconds, speed, budget)
        facts = {"images": images, "images_per_second": speed, "seconds": budget, "measured": saved.progress.seconds}
        write_json(folder / f"{stage}.budget.json", facts)
        log.info("%s: %.1f images/s, so %s images in %s", stage, speed, f"{images:,}", duration(budget))
        return images


def measured_speed(metrics: Path, images: int, seconds: float) -> float:
    """Return images per second: the median of a stage's rows but the first, in which networks may be compiled."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.exists() else []
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row][1:]
    return float(median(speeds)) if len(speeds) >= 2 else images / max(seconds, 1e-9)


def images_for(stage: Stage, seen: int, seconds: float, speed: float, budget: float) -> int:
    """Return the images that a stage reaches in `budget` seconds, whole batches and one more than it has `seen`."""
    wanted = seen + speed * max(0.0, budget - seconds)
    return max(seen // stage.batch_size + 1, round(wanted / stage.batch_size)) * stage.batch_size


def _with_images(run: Run, images: Mapping[str, int]) -> Run:
    """Return the run with these numbers of images, and without gates."""
    stages = {
        name: stage.model_copy(update={"images": images.get(name, stage.images), "gates": {}})
        for name, stage in run.stages.items()
    }
    return run.model_copy(update={"stages": stages})


def _read_budget(folder: Path, stage: str) -> dict[str, Any]:
    path = folder / f"{stage}.budget.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


# --- the table --------------------------------------------------------------------------------------------------------
def table(bakeoff: Bakeoff, output: Path) -> list[dict[str, Any]]:
    """Return one row per judged arm, the best first: the deciding number, and its difference to `full`."""
    judged = {name: list(_judged(bakeoff, output, name)) for name in bakeoff.arms}
    rows = []
    for name, runs in judged.items():
        if not runs:
            continue
        row: dict[str, Any] = {"arm": name, "seeds": len(runs), **decided([run["people"] for run in runs])}
        if judged[FULL] and name != FULL:
            row["difference"] = decided([run["people"] for run in runs], [run["people"] for run in judged[FULL]])
        for fact in ("images", "images_per_second", "seconds", "letters"):
            values = [run[fact] for run in runs if run[fact] is not None]
            row[fact] = sum(values) / len(values) if values else None
        rows.append(row)
    return sorted(rows, key=lambda row: -row["value"])


def decided(
    arm: Sequence[Mapping[str, Sequence[float]]], other: Sequence[Mapping[str, Sequence[float]]] = ()
) -> dict[str, float]:
    """Return an arm's geometric mean of SimGT and prompt, minus that of `other` if given, and its 95 % interval.

    Each entry of `arm` and `other` is a run: metric -> each person's mean, as a share of the ceiling.
    """
    import torch

    def means(runs: Sequence[Mapping[str, Sequence[float]]], rows: Any) -> Any:
        shares = [torch.tensor([list(run[metric]) for run in runs]).mean(0) for metric in ("sim_gt", "prompt")]
        return torch.stack([share[rows].mean(-1).clamp(min=0) for share in shares]).prod(0).sqrt()

    people = len(arm[0]["sim_gt"])
    draws = torch.randint(people, (_RESAMPLES, people), generator=torch.Generator().manual_seed(0))
    found = [means(arm, rows) - (means(other, rows) if other else 0) for rows in (torch.arange(people), draws)]
    low, high = torch.quantile(found[1], torch.tensor([0.025, 0.975])).tolist()
    return {"value": float(found[0]), "low": low, "high": high}


def _judged(bakeoff: Bakeoff, output: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield what is known of each judged run of an arm: its people's shares of the ceilings, images, speed, letters."""
    stage = bakeoff.own_stages(name)[-1]
    for seed in bakeoff.seeds:
        folder = output / f"{name}-{seed}"
        if not (folder / "evaluation" / "report.json").exists():
            continue
        report = json.loads((folder / "evaluation" / "report.json").read_text(encoding="utf-8"))
        scores, budget = people_scores(folder), _read_budget(folder, stage)
        ceilings = {metric: max(report["metrics"][metric]["ceiling"], 1e-9) for metric in ("sim_gt", "prompt")}
        saved = checkpoint.load(folder / stage / "checkpoints", lambda _: True)
        yield {
            "people": {metric: [value / top for value in scores[metric]] for metric, top in ceilings.items()},
            "images": budget.get("images"),
            "images_per_second": budget.get("images_per_second"),
            "seconds": None if saved is None else saved.progress.seconds,
            "letters": report.get("attributes", {}).get("letters", {}).get(FULL),
        }


def write_table(bakeoff: Bakeoff, output: Path) -> None:
    """Write bakeoff.json and bakeoff.md."""
    rows = table(bakeoff, output)
    write_json(output / "bakeoff.json", {"rows": rows})
    lines = [
        "| arm | seeds | geometric mean of SimGT and prompt, of their ceilings | difference to full | letters read | "
        "images | images/s | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [row["arm"], str(row["seeds"]), _interval(row, ""), _interval(row.get("difference"), "+")]
        cells += ["-" if row["letters"] is None else f"{row['letters']:.2f}"]
        cells += [
            "-" if row[name] is None else f"{row[name]:,.0f}" for name in ("images", "images_per_second", "seconds")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    with replacing(output / "bakeoff.md") as draft:
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _interval(found: Mapping[str, float] | None, sign: str) -> str:
    if found is None:
        return "-"
    return f"{found['value']:{sign}.3f} ({found['low']:{sign}.3f} to {found['high']:{sign}.3f})"


# --- the command ------------------------------------------------------------------------------------------------------
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = command_line(
        "python -m train.bakeoff",
        "Train arms for equal times and judge them. The same command carries on with one that was stopped.",
    ).parse_intermixed_args(arguments)
    return run_command(options, Bakeoff, _describe, run_bakeoff)


def _describe(bakeoff: Bakeoff, arms: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]) -> None:
    from train.stages import TASKS, resolved

    total = sum(bakeoff.seconds.get(stage, 0) for stage in bakeoff.shared)
    sys.stdout.write(f"shared stages: {duration(total)}, and the images of those without a time\n")
    for name in arms:
        run, own = arm_run(bakeoff, name, seeds[0], overrides), bakeoff.own_stages(name)
        for stage in own:
            resolved(stage, run.stages[stage], TASKS)
        seconds = sum(bakeoff.seconds[stage] for stage in own)
        total += seconds * len(seeds)
        sys.stdout.write(f"{name:24} {duration(seconds)} in {len(own)} stages x {len(seeds)} seeds\n")
    pictures = len(arms) * len(seeds) * bakeoff.identities * bakeoff.prompts
    sys.stdout.write(f"training in all: {duration(total)}; pictures to judge: {pictures:,}\n")


if __name__ == "__main__":
    sys.exit(main())
