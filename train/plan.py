"""What a run would do, before it does it: parameters by part, memory, steps and, where its speed is known, hours.

Networks are built without their numbers (on torch's meta device), so that planning for a large model takes no memory.
"""

import json
import math
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import parts
from train.config import Run, Stage
from train.stages import TASKS, outlined, resolved

_FLOAT = 4  # bytes; what trains, its gradients and averages are float32 whatever a step computes in
_LATEST = 20  # rows of metrics.jsonl that speed is taken from


@dataclass(frozen=True)
class StagePlan:
    """One stage: what trains and what does not, what that takes, and how far it is."""

    name: str
    begins: str  # where its weights come from
    trained: dict[str, int]  # part -> parameters
    rates: dict[str, float]  # part -> learning rate
    frozen: int  # parameters
    bytes: int  # weights, gradients, optimiser and average; activations come on top
    images: int
    images_seen: int
    batch_size: int
    speed: float | None  # images per second, as last measured in this run's folder
    remarks: list[str]  # what is odd about it, a sentence each

    @property
    def steps(self) -> int:
        """Optimiser steps still to do."""
        return math.ceil((self.images - self.images_seen) / self.batch_size)

    @property
    def hours(self) -> float | None:
        """Hours still to go at the speed last measured; None if it was never measured here."""
        return None if self.speed is None else (self.images - self.images_seen) / self.speed / 3600


def plan(run: Run, output: Path, tasks: Mapping[str, Any] = TASKS) -> list[StagePlan]:
    """The plan of every stage; ConfigError for all that would stop the run itself before its first step."""
    stages = {name: resolved(name, stage, tasks) for name, stage in run.stages.items()}
    with tempfile.TemporaryDirectory() as folder:  # what tasks write while they are built, tokenizers once for all
        run = run.model_copy(update={"stages": stages})
        return [_plan_stage(name, run, output, tasks, Path(folder)) for name in stages]


def words(plans: list[StagePlan]) -> str:
    """The plans as text: a line a stage, a line a part."""
    lines = []
    for each in plans:
        so_far = f"{each.images_seen:,} of " if each.images_seen else ""
        lines.append(
            f"{each.name}: {so_far}{each.images:,} images, {each.steps:,} steps of {each.batch_size}, "
            f"{_size(each.bytes)} without activations, {_time(each.hours)}, from {each.begins}"
        )
        lines += [f"  {part:<20} {count / 1e6:>9.2f} M at {each.rates[part]:g}" for part, count in each.trained.items()]
        lines.append(f"  {'frozen':<20} {each.frozen / 1e6:>9.2f} M")
        lines += [f"  {remark}" for remark in each.remarks]
    known = [each.hours for each in plans if each.hours is not None]
    if len(known) == len(plans):
        lines.append(f"all stages: {_time(sum(known))}")
    return "\n".join(lines)


def _plan_stage(name: str, run: Run, output: Path, tasks: Mapping[str, Any], folder: Path) -> StagePlan:
    stage, task = run.stages[name], outlined(name, run, output, folder, tasks)
    remarks = task.check()
    chosen = parts.choose(task.parts(), stage.train, name)
    everything = {id(p): p for module in task.modules.values() for p in module.parameters()}.values()
    trained = parts.sizes(chosen)
    memory = sum(p.numel() * p.element_size() for p in everything) + _training_state(stage, chosen)
    seen, speed = _so_far(output / name / "metrics.jsonl")
    begins = ", ".join([*([str(stage.initial)] if stage.initial else []), *stage.start_from]) or "nothing"
    frozen = sum(p.numel() for p in everything) - sum(trained.values())
    return StagePlan(
        name, begins, trained, dict(stage.train), frozen, memory, stage.images, min(seen, stage.images),
        stage.batch_size, speed, remarks,
    )  # fmt: skip


def _training_state(stage: Stage, chosen: parts.Parts) -> int:
    """Bytes kept for each trained parameter beside itself: gradient, optimiser state, average."""
    total = 0
    for part, parameters in chosen.items():
        for parameter in parameters:
            moments = 1 if part in stage.muon and parameter.ndim >= 2 else 2
            each = parts.bytes_per_moment(parameter, stage.optimiser)
            total += int(parameter.numel() * (_FLOAT * (1 + bool(stage.ema)) + moments * each))
    return total


def _so_far(path: Path) -> tuple[int, float | None]:
    """Images seen, and images per second over the latest rows; (0, None) if the stage never ran."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # a row that a kill cut short
            break
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    seen = max((int(row["images_seen"]) for row in rows), default=0)
    return seen, statistics.median(speeds[-_LATEST:]) if speeds else None


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _time(hours: float | None) -> str:
    if hours is None:
        return "hours not known before it ran for a minute"
    return f"{hours:.1f} hours left" if hours >= 1 else f"{hours * 60:.0f} minutes left"
