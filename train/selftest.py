"""`--self-test`: overfit one batch per stage. A stage that cannot overfit one batch cannot learn a data set either.

Each stage trains repeatedly on the same few images with the same noise, with its own learning rates, micro-batch size
and precision. If the loss does not fall, the result says the most likely cause: values that are not finite, a part
that gets no gradient, or learning rates that are far too high or too low.

No stage needs to be trained before: a stage starts from the weights of earlier stages where the output folder has them,
and from untrained weights otherwise. The data, of few people or a few records of the first shards, are made in a
temporary folder.
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
STEPS = 200  # most steps of a stage
SECONDS = 100.0  # time limit of all stages together, with building and data
IMAGES = 8  # most images in the batch
PASS_RATIO = 0.7  # the batch is overfitted when the loss falls to this share of its first value
FALLING_RATIO = 0.98  # if the time is over, the stage passes when the loss fell to this share of its first value
DIVERGENCE_RATIO = 10.0  # a stage whose loss rose to this multiple of its first value does not pass
_PEOPLE = 32  # most people, or records, of each gallery
_GRADIENT_CHECK_STEPS = 10  # every part needs a gradient within these steps: zero-initialised gates and LoRA delay it
_MIN_STEPS = 30  # steps that a stage takes even if its time is over


@dataclass(frozen=True)
class Outcome:
    """The result of one stage."""

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
    """Run the self-test of the stages (all, or those in `only`) and return their outcomes. It keeps no file.

    `seconds` are divided among the stages. Each stage takes at least 30 steps, even if its time is over.
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
    """Builds stages in the temporary folder `place`, with the weights that the run's folder `output` holds."""

    def __init__(self, run: Run, output: Path, place: Path, tasks: Mapping[str, Any]) -> None:
        self.run, self.output, self.place, self.tasks = run, output, place, tasks
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def outcome(self, name: str, steps: int, deadline: float) -> Outcome:
        """Run the stage for at most `steps` steps, until `deadline` (of time.monotonic)."""
        try:
            passed, sentence = _overfit_one_batch(
                _OverfitRun(name, self.run.stages[name], self.prepared_task(name)), steps, deadline
            )
        except BadRecordError as error:
            passed, sentence = False, f"the first batch cannot be made: {error}"
        gc.collect()  # the next stage needs the memory
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return Outcome(name, passed, sentence)

    def prepared_task(self, name: str) -> Task:
        """Return the stage's task with its data, and with the weights of earlier stages that are trained."""
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
        """Return the stage's export in the run's folder, or an export of the untrained stage."""
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
    """Earlier stages and their exports. An export is made on first access: few stages need one, and it may be large."""

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
    """A stage with one micro-batch of its first batch, trained as the loop would."""

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
        """Compute the batch's loss and its gradients, and return the loss."""
        self.optimiser.zero_grad(set_to_none=True)
        bf16 = self.precision == "bf16"
        # Gradient checkpointing recomputes the attention in the backward pass.
        with plain_attention() if bf16 and self.device.type == "cpu" else ExitStack():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                loss = self.task.loss(self.batch, 0).per_sample.float().mean()
            if math.isfinite(value := float(loss.detach())):
                loss.backward()
        if math.isfinite(value):
            self.reached |= {part for part, own in self.chosen.items() if any(_has_gradient(p) for p in own)}
        return value

    def optimiser_step(self) -> None:
        """Clip the gradients and take one optimiser step."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.stage.clip or math.inf)
        self.optimiser.step()

    @property
    def unreached(self) -> list[str]:
        """Trained parts that have got no gradient so far."""
        return sorted(set(self.chosen) - self.reached)


def _overfit_one_batch(overfit_run: _OverfitRun, steps: int, deadline: float) -> tuple[bool, str]:
    """Train on the batch until it is overfitted or steps or time are over; return whether the stage passes, and why."""
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
        return True, f"passes: overfits {overfit_run.images} images, loss {numbers}, in {overfit_run.precision}."
    if last <= FALLING_RATIO * first and not diverged:
        return (
            True,
            f"passes: the loss on {overfit_run.images} images falls, {numbers}, in {overfit_run.precision}.",
        )
    return False, _stuck(numbers, diverged or last > first)


def _has_gradient(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def _not_finite(step: int) -> str:
    if step == 0:
        return "the first loss is not finite: check the stage's first images and its initial weights."
    return f"the loss is not finite after {step} steps on one batch: lower the learning rates."


def _unreached(names: Sequence[str]) -> str:
    return (
        f"no gradient reaches the part {' or '.join(names)} in {_GRADIENT_CHECK_STEPS} steps, because with these "
        "settings the loss does not depend on it: leave it out of `train`, or change the settings that disable it."
    )


def _stuck(numbers: str, rises: bool) -> str:
    way, advice = ("rises", "lower") if rises else ("hardly falls", "raise")
    return (
        f"the loss {way} on one batch, {numbers}: {advice} the learning rates, or check that inputs and targets belong "
        "together."
    )
