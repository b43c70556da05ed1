"""`--self-test`: can each stage learn one batch by heart? A stage that cannot will not learn a million of them either.

The same few images, with the same noise, are shown again and again at the stage's own learning rates, in pieces of its
own size and in its own precision. If the loss does not fall, the sentence says what is most likely wrong: numbers that
are not finite, a part that the loss never reaches, or rates that are far off.

It needs no run: a stage begins with the weights of earlier ones where the run's folder has them, with untrained ones
elsewhere. Data are made of few people, or of a few records of the first shards, in a folder that is gone afterwards.
"""

import gc
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from imagine.errors import BadRecordError
from train.config import Run, Stage
from train.data.order import to_device
from train.loop import plain_attention
from train.run import parts
from train.run.report import faster_precision
from train.stages import TASKS, build_with_weights, resolved, task_context, wanted_stages
from train.task import Task

log = logging.getLogger("train")
STEPS = 200
SECONDS = 100.0  # for all stages together, whatever they spend them on
IMAGES = 8
PASS_RATIO = 0.7  # a loss at this share of its first value is learnt by heart
FALLING_RATIO = 0.98  # and at this one it falls, if there is no time for more
DIVERGENCE_RATIO = 10.0  # neither counts if it rose to so many times its first value on the way
_PEOPLE = 32  # of each gallery, or records
_GRADIENT_CHECK_STEPS = 10  # steps after which every part must have felt the loss: gates and LoRA begin at zero
_MIN_STEPS = 30  # steps that a stage takes even if its time is over


@dataclass(frozen=True)
class Outcome:
    """How one stage did."""

    stage: str
    passed: bool
    sentence: str


def self_test(
    run: Run,
    output: Path,
    only: Sequence[str] = (),
    tasks: Mapping[str, Any] = TASKS,
    steps: int = STEPS,
    seconds: float = SECONDS,
) -> list[Outcome]:
    """Every wanted stage's outcome; nothing is kept, and nothing need have been trained.

    `seconds` are shared out among the stages; each takes a few steps even if they are over.
    """
    stages = {name: resolved(name, stage, tasks) for name, stage in run.stages.items()}
    wanted, end = wanted_stages(run, only), time.monotonic() + seconds
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="imagine-self-test-") as place:
        data = {**run.data, "folder": str(Path(place) / "data"), "most": _PEOPLE}
        builder = _StageBuilder(Run(data=data, stages=stages), output, Path(place), tasks)
        for left, name in zip(range(len(wanted), 0, -1), wanted, strict=True):
            now = time.monotonic()
            outcomes.append(builder.outcome(name, steps, now + (end - now) / left))
            log.info("%s: %s", name, outcomes[-1].sentence)
    return outcomes


class _StageBuilder:
    """Builds stages in a folder of its own, whatever the run's folder holds."""

    def __init__(self, run: Run, output: Path, place: Path, tasks: Mapping[str, Any]) -> None:
        self.run, self.output, self.place, self.tasks = run, output, place, tasks
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def outcome(self, name: str, steps: int, deadline: float) -> Outcome:
        """How the stage does in so many steps at most, and up to that moment."""
        try:
            passed, sentence = _overfit_one_batch(
                _OverfitRun(name, self.run.stages[name], self.prepared_task(name)), steps, deadline
            )
        except BadRecordError as error:
            passed, sentence = False, f"its first batch cannot be made: {error}"
        gc.collect()  # the next stage needs the memory
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return Outcome(name, passed, sentence)

    def prepared_task(self, name: str) -> Task:
        """The stage's task with its data, from what was trained so far."""
        stage = self.run.stages[name]
        trained = [self.output / source for source in stage.start_from if self._is_trained(source)]
        context = task_context(name, self.run, self.output, self.device, self.place / "stages")
        task = build_with_weights(
            stage, replace(context, earlier=_Exports(self, stage.start_from)), trained, self.tasks
        )
        parts.train_mode(task.modules, ())
        with torch.no_grad():
            task.prepare()
        return task

    def export(self, name: str) -> Path:
        """What the run's stage exported, or what it would export untrained."""
        if self._is_trained(name):
            return self.output / name / "export"
        folder = self.place / "exports" / name
        if not folder.exists():
            folder.mkdir(parents=True)
            with torch.no_grad():
                self.prepared_task(name).export(folder)
        return folder

    def _is_trained(self, name: str) -> bool:
        return (self.output / name / "weights.safetensors").exists()


class _Exports(Mapping[str, Path]):
    """Earlier stages and their exports, made when one is asked for: few stages ask, and networks may be large."""

    def __init__(self, builder: _StageBuilder, names: Sequence[str]) -> None:
        self._builder, self._names = builder, names

    def __getitem__(self, name: str) -> Path:
        if name not in self._names:
            raise KeyError(name)
        return self._builder.export(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _OverfitRun:
    """A stage with one piece of its first batch, as the loop would train it."""

    def __init__(self, name: str, stage: Stage, task: Task) -> None:
        self.stage, self.task = stage, task
        self.chosen = parts.choose(task.parts(), stage.train, name)
        parts.train_mode(task.modules, parts.freeze_all_but(task.modules, self.chosen))
        self.parameters = [parameter for own in self.chosen.values() for parameter in own]
        self.device = self.parameters[0].device
        self.optimiser = parts.optimiser(
            self.chosen, stage.train, stage.betas, stage.weight_decay, stage.muon, stage.optimiser
        )  # fmt: skip
        self.images = min(IMAGES, stage.batch_size // stage.accumulation)
        self.precision = faster_precision(self.device)[0] if stage.precision == "auto" else stage.precision
        with torch.no_grad():
            self.batch = to_device(task.batch(0, self.images), self.device)
        self.reached: set[str] = set()

    def loss(self) -> float:
        """The batch's loss, and its gradients in place."""
        self.optimiser.zero_grad(set_to_none=True)
        bf16 = self.precision == "bf16"
        with plain_attention() if bf16 and self.device.type == "cpu" else ExitStack():  # checkpoints compute it again
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                loss = self.task.loss(self.batch, 0).per_sample.float().mean()
            if math.isfinite(value := float(loss.detach())):
                loss.backward()
        if math.isfinite(value):
            self.reached |= {part for part, own in self.chosen.items() if any(_has_gradient(p) for p in own)}
        return value

    def optimiser_step(self) -> None:
        """One step down those gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.stage.clip or math.inf)
        self.optimiser.step()

    @property
    def unreached(self) -> list[str]:
        """Parts that trained and that no gradient came to."""
        return sorted(set(self.chosen) - self.reached)


def _overfit_one_batch(overfit_run: _OverfitRun, steps: int, deadline: float) -> tuple[bool, str]:
    """Show the batch until it is learnt, or steps or time are over: whether the stage passes, and why."""
    first = last = overfit_run.loss()
    step, diverged = 0, False
    while (
        math.isfinite(last)
        and step < steps
        and not (step >= _GRADIENT_CHECK_STEPS and last <= PASS_RATIO * first and not diverged)
    ):
        if (step >= _GRADIENT_CHECK_STEPS and overfit_run.unreached) or (
            step >= _MIN_STEPS and time.monotonic() > deadline
        ):
            break
        overfit_run.optimiser_step()
        last, step = overfit_run.loss(), step + 1
        diverged = diverged or last > DIVERGENCE_RATIO * first
    if not math.isfinite(last):
        return False, _not_finite(step)
    if overfit_run.unreached:
        return False, _unreached(overfit_run.unreached)
    numbers = f"{first:.4g} to {last:.4g} in {step} steps"
    if last <= PASS_RATIO * first and not diverged:
        return True, f"learns {overfit_run.images} images by heart: loss {numbers}, in {overfit_run.precision}."
    if last <= FALLING_RATIO * first and not diverged:
        return (
            True,
            f"begins to learn {overfit_run.images} images by heart: loss {numbers}, in {overfit_run.precision}.",
        )
    return False, _stuck(numbers, diverged or last > first)


def _has_gradient(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def _not_finite(step: int) -> str:
    if step == 0:
        return "the very first loss is not finite: look at its first images, and at the weights it starts from."
    return f"the loss is not finite after {step} steps on one batch: lower its learning rates."


def _unreached(names: Sequence[str]) -> str:
    return (
        f"no gradient reaches the part {' or '.join(names)} in {_GRADIENT_CHECK_STEPS} steps: with these settings "
        "the loss does not depend on it; leave it out of `train`, or change the settings that switch it off."
    )


def _stuck(numbers: str, rises: bool) -> str:
    way, advice = ("rises", "lower") if rises else ("hardly falls", "raise")
    return (
        f"the loss {way} on one batch, {numbers}: {advice} the learning rates, or check that inputs and targets belong "
        "together."
    )
