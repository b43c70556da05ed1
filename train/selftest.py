"""`--self-test`: can each stage learn one batch by heart? A stage that cannot will not learn a million of them either.

The same few images, with the same noise, are shown again and again at the stage's own learning rates. If the loss does
not fall, the sentence says what is most likely wrong: numbers that are not finite, a part that the loss never reaches,
or rates that are far off.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train import parts
from train.config import Run, Stage
from train.data import to_device
from train.stages import TASKS, build, check_start, resolved, wanted_stages
from train.task import Task

log = logging.getLogger("train")
STEPS = 200
SECONDS = 40.0  # for one stage, building and data not counted
IMAGES = 8
ENOUGH = 0.7  # the loss must fall to this share of its first value
_SETTLED = 10  # steps after which every part must have felt the loss: gates and LoRA begin at zero


@dataclass(frozen=True)
class Outcome:
    """How one stage did."""

    stage: str
    passed: bool
    sentence: str


def self_test(
    run: Run, output: Path, only: Sequence[str] = (), tasks: Mapping[str, Any] = TASKS, steps: int = STEPS
) -> list[Outcome]:
    """Every wanted stage's outcome; nothing is kept. ConfigError if a stage starts from one that is not done."""
    run = Run(data=run.data, stages={name: resolved(name, stage, tasks) for name, stage in run.stages.items()})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    outcomes = []
    for name in wanted_stages(run, only):
        check_start(name, run, output)
        task = build(name, run, output, device, tasks)
        parts.train_mode(task.modules, ())
        with torch.no_grad():
            task.prepare()
        outcomes.append(_learn_by_heart(name, run.stages[name], task, device, steps))
        log.info("%s: %s", name, outcomes[-1].sentence)
    return outcomes


def _learn_by_heart(name: str, stage: Stage, task: Task, device: torch.device, steps: int) -> Outcome:
    chosen = parts.choose(task.parts(), stage.train, name)
    training = parts.freeze_all_but(task.modules, chosen)
    parts.train_mode(task.modules, training)
    optimiser = parts.optimiser(
        chosen, stage.train, stage.betas, stage.weight_decay, stage.muon, stage.optimiser
    )  # fmt: skip
    with torch.no_grad():
        batch = to_device(task.batch(0, IMAGES), device)
    first = last = math.nan
    felt: set[str] = set()
    began = time.monotonic()
    for step in range(steps):
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=stage.precision == "bf16"):
            loss = task.loss(batch, 0).per_sample.float().mean()
        last = float(loss.detach())
        first = last if step == 0 else first
        if not math.isfinite(last):
            return Outcome(name, False, _not_finite(step))
        loss.backward()
        felt |= {part for part, own in chosen.items() if any(p.grad is not None and p.grad.any() for p in own)}
        if step >= _SETTLED and felt != set(chosen):
            return Outcome(name, False, _unreached(sorted(set(chosen) - felt)))
        if step >= _SETTLED and last <= ENOUGH * first:
            return Outcome(
                name, True, f"learns {IMAGES} images by heart: loss {first:.4g} to {last:.4g} in {step} steps."
            )
        if time.monotonic() - began > SECONDS:
            break
        torch.nn.utils.clip_grad_norm_([p for own in chosen.values() for p in own], stage.clip or math.inf)
        optimiser.step()
    return Outcome(name, False, _stuck(first, last, step))


def _not_finite(step: int) -> str:
    if step == 0:
        return "the very first loss is not finite: look at its first images, and at the weights it starts from."
    return f"the loss is not finite after {step} steps on one batch: lower its learning rates."


def _unreached(names: Sequence[str]) -> str:
    return (
        f"no gradient reaches the part {' or '.join(names)} in {_SETTLED} steps: with these settings the loss does not "
        "depend on it; leave it out of `train`, or change the settings that switch it off."
    )


def _stuck(first: float, last: float, step: int) -> str:
    way = "rises" if last > first else "hardly falls"
    advice = "lower" if last > first else "raise"
    return (
        f"the loss {way} on one batch, {first:.4g} to {last:.4g} in {step + 1} steps: {advice} the learning rates, or "
        "check that inputs and targets belong together."
    )
