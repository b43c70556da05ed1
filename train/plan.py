"""Plan a run before it starts (`--dry-run`): parameters by part, memory, steps and hours of each stage.

Networks are built without weights (on torch's meta device), so that planning a large model takes no memory.
For a public base, a step is planned as `imagine plan --train` does, including activations and arithmetic. For the small
networks of the portrait world, the plan gives the memory without activations, and the hours only after the stage has
run for a minute in the output folder, from its measured speed.
"""

import json
import math
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from imagine.planning.cards import UTILISATION, speeds
from imagine.planning.denoisers import kind_of
from imagine.planning.inference import Precision
from imagine.planning.networks import LORA_PART
from imagine.planning.training import Recipe, TrainingPlan, TrainingPlanner, TrainingWorkload
from train.bases.base_lora import NAME as BASE_LORA
from train.config import Run, Stage
from train.run import parts
from train.stages import TASKS, build_on_meta, resolved
from train.task import Task
from train.tasks.diffusers import DiffusersTask

_FLOAT = 4  # bytes; trained weights, gradients and averages are float32 in every precision
_LATEST = 20  # rows of metrics.jsonl whose median speed is used


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage: trained and frozen parameters, memory, and progress so far."""

    name: str
    initial_weights: str  # where its initial weights come from
    trained: dict[str, int]  # part -> parameters
    rates: dict[str, float]  # part -> learning rate
    frozen: int  # number of frozen parameters
    bytes: int  # memory of weights, gradients, optimiser state and average, without activations
    step: TrainingPlan | None  # the plan of one step, with activations; None for tasks without a blueprint
    images: int
    images_seen: int
    batch_size: int
    speed: float | None  # images per second, as last measured in the output folder
    remarks: list[str]  # warnings about its settings, one sentence each

    @property
    def steps(self) -> int:
        """Remaining optimiser steps."""
        return math.ceil((self.images - self.images_seen) / self.batch_size)

    @property
    def hours(self) -> float | None:
        """Remaining hours at the speed last measured; None if it was never measured in the output folder."""
        return None if self.speed is None else (self.images - self.images_seen) / self.speed / 3600

    @property
    def hours_on(self) -> dict[str, float]:
        """Card -> remaining hours at a share of its published speed; empty if the step is not planned."""
        if self.step is None:
            return {}
        known = speeds(None, None, self.step.recipe.precision != "fp32")
        return {card: self.steps * self.step.seconds(speed.flops) / 3600 for card, speed in known.items()}


def plan(run: Run, output: Path, tasks: Mapping[str, Any] = TASKS) -> list[StagePlan]:
    """Plan every stage; ConfigError for every mistake that would stop the run before its first step."""
    stages = {name: resolved(name, stage, tasks) for name, stage in run.stages.items()}
    # Tasks write files while they are built, such as tokenizers, which the stages share.
    with tempfile.TemporaryDirectory() as folder:
        run = run.model_copy(update={"stages": stages})
        trainings: dict[str, TrainingPlanner] = {}  # stages with the same base and workload share one plan
        return [_plan_stage(name, run, output, tasks, Path(folder), trainings) for name in stages]


def format_plan(plans: list[StagePlan]) -> str:
    """Format the plans as text, with one line per stage and one per part."""
    lines = []
    for each in plans:
        so_far = f"{each.images_seen:,} of " if each.images_seen else ""
        lines.append(
            f"{each.name}: {so_far}{each.images:,} images, {each.steps:,} steps of {each.batch_size}, "
            f"{_memory(each)}, {_duration([each])}, from {each.initial_weights}"
        )
        lines += [f"  {part:<20} {count / 1e6:>9.2f} M at {each.rates[part]:g}" for part, count in each.trained.items()]
        lines.append(f"  {'frozen':<20} {each.frozen / 1e6:>9.2f} M")
        lines += [f"  {remark}" for remark in each.remarks]
    images, steps = (sum(counts) for counts in zip(*((p.images - p.images_seen, p.steps) for p in plans), strict=True))
    lines.append(f"all stages: {images:,} images and {steps:,} steps remaining, {_duration(plans)}")
    if any(each.step for each in plans):
        share = f"{UTILISATION:.0%} of its published speed"
        lines.append(f"  (hours assume one card at {share}; preparing the data is not included)")
    return "\n".join(lines)


def _plan_stage(
    name: str, run: Run, output: Path, tasks: Mapping[str, Any], folder: Path, trainings: dict[str, TrainingPlanner]
) -> StagePlan:
    stage, task = run.stages[name], build_on_meta(name, run, output, folder, tasks)
    remarks = task.check()
    chosen = parts.choose(task.parts(), stage.train, name)
    everything = {id(p): p for module in task.modules.values() for p in module.parameters()}.values()
    trained = parts.sizes(chosen)
    memory = sum(p.numel() * p.element_size() for p in everything) + _training_state(stage, chosen)
    seen, speed = _so_far(output / name / "metrics.jsonl")
    initial_weights = (
        ", ".join([*([str(stage.initial)] if stage.initial else []), *stage.start_from]) or "random weights"
    )
    frozen = sum(p.numel() for p in everything) - sum(trained.values())
    return StagePlan(
        name, initial_weights, trained, dict(stage.train), frozen, memory, _plan_step(stage, task, trainings),
        stage.images, min(seen, stage.images), stage.batch_size, speed, remarks,
    )  # fmt: skip


def _plan_step(stage: Stage, task: Task, trainings: dict[str, TrainingPlanner]) -> TrainingPlan | None:
    """Plan a step in one process, if the task has a blueprint. Precision `auto` counts as bf16, as on every card."""
    if not isinstance(task, DiffusersTask):
        return None
    base = task.blueprint()
    settings = stage.settings
    # The planner names peft's LoRA on a transformer as it names our own on a U-Net.
    trained = tuple(LORA_PART if part == BASE_LORA else part for part in stage.train)
    text = min(kind_of(base.denoiser.kind).text, task.most_text_tokens)
    workload = TrainingWorkload(settings["resolution"], stage.batch_size, trained, text)
    key = repr((base, workload))
    training = trainings[key] = trainings.get(key) or TrainingPlanner(base, workload)
    precision: Precision = "fp32" if stage.precision == "fp32" else "bf16"
    recipe = Recipe(
        precision, settings["gradient_checkpointing"], stage.optimiser, stage.accumulation, bool(stage.ema)
    )  # fmt: skip
    planned = training.plan(recipe)
    # The frozen weights are stored in base_precision; the planner assumes the step's precision.
    own = 2 if settings["base_precision"] == "bf16" else _FLOAT
    frozen = [p for p in training.networks.denoiser.parameters() if not p.requires_grad]
    stored = sum(p.numel() * own for p in frozen) - sum(p.numel() * p.element_size() for p in frozen)
    memory = {**planned.memory, "frozen weights": planned.memory["frozen weights"] + stored}
    counts = {BASE_LORA if BASE_LORA in stage.train and part == LORA_PART else part: count
              for part, count in planned.trained.items()}  # fmt: skip
    return replace(planned, trained=counts, memory=memory)


def _training_state(stage: Stage, chosen: parts.Parts) -> int:
    """Return the bytes of the trained parameters' gradients, optimiser states and averages."""
    total = 0
    for part, parameters in chosen.items():
        for parameter in parameters:
            optimiser_states = 1 if part in stage.muon and parameter.ndim >= 2 else 2
            each = parts.bytes_per_state_value(parameter, stage.optimiser)
            total += int(parameter.numel() * (_FLOAT * (1 + bool(stage.ema)) + optimiser_states * each))
    return total


def _so_far(path: Path) -> tuple[int, float | None]:
    """Return the images seen, and the median images per second of the latest rows; (0, None) if the stage never ran."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # a row that was cut short when the process was killed
            break
    measured = [row["images_per_second"] for row in rows if "images_per_second" in row]
    seen = max((int(row["images_seen"]) for row in rows), default=0)
    return seen, statistics.median(measured[-_LATEST:]) if measured else None


def _memory(plan: StagePlan) -> str:
    if plan.step is None:
        return f"{_size(plan.bytes)} without activations"
    return f"{_size(plan.step.peak)} of a card's memory"


def _duration(plans: list[StagePlan]) -> str:
    """Return the remaining time of the stages: as measured, else as planned for a few cards, else as not known."""
    known = [each.hours for each in plans if each.hours is not None]
    if len(known) == len(plans):
        return _time(sum(known))
    cards = list(plans[0].hours_on) if all(each.step for each in plans) else []
    if not cards:
        return _time(None)
    return ", ".join(f"{sum(each.hours_on[card] for each in plans):.3g} hours on {card}" for card in cards)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _time(hours: float | None) -> str:
    if hours is None:
        return "hours not known until it has run for a minute"
    return f"{hours:.1f} hours left" if hours >= 1 else f"{hours * 60:.0f} minutes left"
