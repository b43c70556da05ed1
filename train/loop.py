"""One stage, from its start or its newest checkpoint to its last image: the loop, in sentences.

It knows no networks. The clock is the number of images seen; learning rate, data, random numbers and the moments for
validation follow from it, so a run that was stopped anywhere ends with the weights of one that was not.
"""

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from imagine.errors import ImagineError
from train import checkpoint, parts
from train.checkpoint import Progress, Saved, State
from train.config import Stage
from train.data import ahead, key, to_device
from train.ema import Average
from train.report import Report, faster_precision
from train.task import Loss, Task

log = logging.getLogger("train")
MOST_BAD_BATCHES = 3  # in a row
SHOWN = 32  # images of the first batch that are saved for people to see
Metrics = Mapping[str, float | Tensor]


class TrainingError(ImagineError):
    """Training cannot go on with these settings."""


class Stopping:
    """Whether to stop cleanly: after a number of minutes, or when the process is asked to end (SIGTERM, SIGINT)."""

    def __init__(self, max_minutes: float | None = None) -> None:
        self.deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.signal: str | None = None

    @property
    def reason(self) -> str | None:
        """Why to stop, in words, or None."""
        if self.signal:
            return f"asked to by {self.signal}"
        return "the minutes given are over" if time.monotonic() >= self.deadline else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of the two signals; a second one ends the process as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def train_stage(
    name: str, stage: Stage, task: Task, folder: Path, accelerator: Accelerator, stopping: Stopping
) -> dict[str, float] | None:
    """Train `task` until `stage.images`; the last validation's numbers, or None if it was stopped before the end.

    `folder` receives checkpoints/, metrics.jsonl, samples/, weights.safetensors (the averaged weights of the modules
    that trained) and export/ (what the task writes). TrainingError if three batches in a row are not finite.
    """
    course = Course(name, stage, task, folder, accelerator)
    state = course.state
    with course.report, closing(course.pieces()) as pieces:
        while state.progress.images_seen < stage.images:
            reason = stopping.reason
            if course.all_agree(reason is not None):
                course.save()
                course.leave_weights()
                log.info("%s: stopped at %s images: %s.", name, f"{state.progress.images_seen:,}", reason)
                return None
            before = state.progress.images_seen
            course.step(pieces)
            if _crossed(stage.validate_every, before, state.progress.images_seen, stage.images):
                course.validate()
            if before < stage.decay_start <= state.progress.images_seen:
                course.save(for_good=True)
            elif course.checkpoint_is_due():
                course.save()
        course.save()
        numbers = course.validate()
        course.leave_weights()
    return numbers


class Course:
    """One stage under way: the task, what changes while it trains, and the steps of the loop."""

    def __init__(self, name: str, stage: Stage, task: Task, folder: Path, accelerator: Accelerator) -> None:
        self.name, self.stage, self.task, self.folder, self.accelerator = name, stage, task, folder, accelerator
        chosen = parts.choose(task.parts(), stage.train, name)
        self.training = parts.freeze_all_but(task.modules, chosen)
        saved = checkpoint.load(folder / "checkpoints", self._same_course)
        self.state = self._state(chosen, saved)
        if saved is not None:
            checkpoint.restore(self.state, saved, f"{folder / 'checkpoints'}")
        self._tell(chosen)
        self.model, self.optimiser = accelerator.prepare(_Losses(task, self.training), self.state.optimiser)
        self._shape_up()
        with self._at_rest(averaged=False):
            task.prepare()
            self._show_first_batch()
        every, seen = stage.report_every_seconds, self.state.progress.images_seen
        self.report = Report(folder, name, stage.images, seen, every, accelerator.is_main_process)
        self.saved_at = self.started_at = time.monotonic()
        self.seconds_before = self.state.progress.seconds

    def pieces(self) -> Generator[tuple[int, Any], None, None]:
        """(first image number, batch) of every piece of every step from here to the end, this process's share."""
        return ahead(torch.no_grad()(self.task.batch), self._numbers(), self.stage.prefetch)

    def step(self, pieces: Iterator[tuple[int, Any]]) -> None:
        """One optimiser step on `batch_size` images, or none if a number in them is not finite."""
        progress, stage = self.state.progress, self.stage
        parts.set_rates(self.state.optimiser, stage.rate(progress.images_seen))
        loss, metrics = self._forward_backward(pieces)
        norm = self._clip()
        progress.images_seen += stage.batch_size
        progress.seconds = self.seconds_before + time.monotonic() - self.started_at
        if math.isfinite(float(loss + norm)):
            self.optimiser.step()
            self.state.average.update(progress.images_seen, stage.batch_size)
            progress.skipped_in_a_row = 0
            self.report.count({"loss": loss, "gradient_norm": norm}, stage.batch_size)
            for piece in metrics:
                self.report.count(piece, stage.batch_size // stage.accumulation)
        else:
            self._skip()
        self.optimiser.zero_grad(set_to_none=True)
        self.report.maybe_row(progress.images_seen, self._fixed())

    def validate(self) -> dict[str, float]:
        """The task's numbers and pictures with the averaged weights in place, written to metrics.jsonl and samples/."""
        self.report.row(self.state.progress.images_seen, self._fixed())
        if not self.accelerator.is_main_process:
            return {}
        began = time.monotonic()
        samples = self.folder / "samples"
        samples.mkdir(exist_ok=True)
        with self._at_rest(averaged=True), self._autocast():
            numbers = self.task.validate(samples, self.state.progress.images_seen)
        numbers = {name: float(value) for name, value in numbers.items()}
        self.report.validation(self.state.progress.images_seen, numbers)
        self.report.pause(time.monotonic() - began)
        return numbers

    def save(self, for_good: bool = False) -> None:
        """Write a checkpoint."""
        began = time.monotonic()
        if self.accelerator.is_main_process:
            checkpoint.save(self.folder / "checkpoints", self.state, self.stage.keep, for_good)
        self.saved_at = time.monotonic()
        self.report.pause(self.saved_at - began)

    def checkpoint_is_due(self) -> bool:
        return time.monotonic() - self.saved_at >= self.stage.checkpoint_every_seconds

    def leave_weights(self) -> None:
        """Write the averaged weights for later stages, and the task's own export."""
        if not self.accelerator.is_main_process:
            return
        with self._at_rest(averaged=True):
            tensors = checkpoint.weights(self.task.modules, self.training)
            note = {"stage": self.name, "images_seen": self.state.progress.images_seen}
            checkpoint.write_tensors(self.folder / "weights.safetensors", tensors, {"from": json.dumps(note)})
            with checkpoint.replacing(self.folder / "export") as draft:
                draft.mkdir()
                self.task.export(draft)

    def all_agree(self, stop: bool) -> bool:
        """True if any process wants to stop, so that all do it after the same step."""
        if self.accelerator.num_processes == 1:
            return stop
        flag = torch.tensor(float(stop), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _forward_backward(self, pieces: Iterator[tuple[int, Any]]) -> tuple[Tensor, list[Metrics]]:
        """Gradients of the mean loss over the whole batch, piece by piece; that mean, and the metrics of each piece."""
        count, total = self.stage.accumulation, torch.zeros((), device=self.accelerator.device)
        metrics: list[Metrics] = []
        for number, (first, batch) in enumerate(islice(pieces, count)):
            torch.manual_seed(key(self.stage.seed, "step", first))  # for dropout and the like inside the networks
            batch = to_device(batch, self.accelerator.device)
            with self._without_sync(number + 1 < count), self._autocast():
                loss: Loss = self.model(batch, first)
            mean = loss.per_sample.float().mean()
            with self._without_sync(number + 1 < count):
                self.accelerator.backward(mean / count)
            total = total + mean.detach() / count
            metrics.append({k: v.detach() if isinstance(v, Tensor) else v for k, v in loss.metrics.items()})
        shared = self.accelerator.num_processes > 1
        return self.accelerator.reduce(total, "mean") if shared else total, metrics

    def _clip(self) -> Tensor:
        """Norm of the gradients before they are cut to `clip`."""
        largest = self.stage.clip or math.inf
        return torch.as_tensor(self.accelerator.clip_grad_norm_(list(self.state.trained.values()), largest)).detach()

    def _skip(self) -> None:
        progress = self.state.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        where = f"{progress.images_seen:,}"
        log.warning("%s: the batch before image %s gave a number that is not finite; it is left out.", self.name, where)
        if progress.skipped_in_a_row >= MOST_BAD_BATCHES:
            raise TrainingError(
                f"Stage {self.name} stopped at {where} images because {MOST_BAD_BATCHES} batches in a row "
                "were not finite: lower its learning rates or its clip, or look at its data, and run it again."
            )

    def _fixed(self) -> dict[str, float]:
        rates = {group["part"]: group["lr"] for group in self.state.optimiser.param_groups}
        named = {"lr": next(iter(rates.values())), **{f"lr/{part}": rate for part, rate in rates.items()}}
        return {**named, "skipped": self.state.progress.skipped, "seconds": round(self.state.progress.seconds, 1)}

    def _numbers(self) -> Iterator[tuple[int, int]]:
        shares = self.stage.accumulation * self.accelerator.num_processes
        size, rank = self.stage.batch_size // shares, self.accelerator.process_index
        for start in range(self.state.progress.images_seen, self.stage.images, self.stage.batch_size):
            for piece in range(self.stage.accumulation):
                yield start + (piece * self.accelerator.num_processes + rank) * size, size

    def _same_course(self, saved: Saved) -> bool:
        """Whether this stage, run straight, would have passed through that checkpoint: its rate did not fall yet."""
        facts = ("images", "batch_size", "schedule", "decay")
        then = self.stage.model_copy(update={fact: saved.stage[fact] for fact in facts})
        if then.images == self.stage.images:
            return True
        last_step = saved.progress.images_seen - then.batch_size
        return self.stage.schedule == "constant" or last_step <= min(then.decay_start, self.stage.decay_start)

    def _state(self, chosen: parts.Parts, saved: Saved | None) -> State:
        trained = parts.named(self.task.modules, chosen)
        stage = self.stage
        optimiser = parts.optimiser(chosen, stage.train, stage.betas, stage.weight_decay, stage.muon)
        modules = {name: self.task.modules[name] for name in self.training}
        precision: str = self.stage.precision
        if precision == "auto":
            measured, words = faster_precision(self.accelerator.device)
            precision = saved.precision if saved else measured  # a resumed run stays with what it began with
            log.info("%s: trains in %s (%s)", self.name, precision, words)
        described = self.stage.model_dump(mode="json")
        return State(modules, trained, optimiser, Average(trained, self.stage.ema), Progress(), described, precision)

    def _show_first_batch(self) -> None:
        """Leave the first pictures of the stage as a sheet beside its numbers."""
        path = self.folder / "first_batch.png"
        if self.accelerator.is_main_process and not path.exists():
            with checkpoint.replacing(path) as draft:
                self.task.show(self.task.batch(0, min(SHOWN, self.stage.batch_size)), draft)

    def _tell(self, chosen: parts.Parts) -> None:
        seen = self.state.progress.images_seen
        sizes = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in parts.sizes(chosen).items())
        begins = f"carries on at {seen:,}" if seen else "starts"
        log.info("%s: %s of %s images, training %s", self.name, begins, f"{self.stage.images:,}", sizes)

    def _shape_up(self) -> None:
        for name in self.training:
            if self.stage.channels_last:
                self.task.modules[name].to(memory_format=torch.channels_last)
            if self.stage.compile:
                self.task.modules[name].compile()
        parts.train_mode(self.task.modules, self.training)

    @contextmanager
    def _at_rest(self, averaged: bool) -> Iterator[None]:
        """Eval mode, no gradients and, if wanted, the averaged weights; afterwards all as before."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if averaged:
                stack.enter_context(self.state.average.in_place())
            parts.train_mode(self.task.modules, ())
            stack.callback(parts.train_mode, self.task.modules, self.training)
            yield

    def _autocast(self) -> AbstractContextManager[Any]:
        device = self.accelerator.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.state.precision == "bf16")

    def _without_sync(self, hold: bool) -> AbstractContextManager[Any]:
        """Gradients travel between processes once per step, with its last piece."""
        return self.accelerator.no_sync(self.model) if hold else ExitStack()


class _Losses(nn.Module):
    """The task's loss as one forward call over its training modules, which is what several processes can share."""

    def __init__(self, task: Task, training: list[str]) -> None:
        super().__init__()
        self.networks = nn.ModuleList([task.modules[name] for name in training])
        self.loss: Callable[[Any, int], Loss] = task.loss

    def forward(self, batch: Any, images_seen: int) -> Loss:
        return self.loss(batch, images_seen)


def _crossed(every: int, before: int, after: int, end: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; the end has a validation of its own."""
    return bool(every) and before // every != after // every and after < end
