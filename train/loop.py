"""One stage, from its start or its newest checkpoint to its last image: the loop, in sentences.

It knows no networks. The clock is the number of images seen; learning rate, data, random numbers and the moments for
validation follow from it, so a run that was stopped anywhere ends with the weights of one that was not.

Several processes take the same steps, each on its share of every batch. What only one of them knows (a signal, a clock,
a record that cannot be read, the validation's numbers) they tell each other before any of them acts on it.
"""

import functools
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from imagine.errors import BadRecordError, ConfigError, ImagineError
from imagine.settings import unknown_name
from train.config import Stage
from train.data.order import derive_seed, prefetched, to_device
from train.run import checkpoint, parts, trackers
from train.run.checkpoint import Checkpoint, Progress, State
from train.run.ema import Average
from train.run.report import Report, faster_precision
from train.run.stopping import Stopped, Stopping
from train.task import Loss, Task

log = logging.getLogger("train")
MAX_BAD_BATCHES = 3  # in a row
FIRST_BATCH_IMAGES = 32  # images of the first batch that are saved for people to see
# How long processes wait for each other; one that dies is noticed at once.
SETUP_TIMEOUT = timedelta(hours=24)  # for the main one, while it renders pictures, encodes them, validates or exports
STEP_TIMEOUT = timedelta(hours=1)  # within steps, so that one that hangs does not hold all machines for a day
Metrics = Mapping[str, float | Tensor]
Value = TypeVar("Value")
Arguments = ParamSpec("Arguments")


class TrainingError(ImagineError):
    """Training cannot go on with these settings."""


def on_any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Each flag as it is on any process: true on all of them if on one."""
    if accelerator.num_processes == 1:
        return list(flags)
    counts = accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=accelerator.device), "sum")
    return [count > 0 for count in counts.tolist()]


def broadcast_from_main(accelerator: Accelerator, value: Value) -> Value:
    """The main process's value, on all of them."""
    shared: list[Value] = [value] if accelerator.num_processes == 1 else broadcast_object_list([value])
    return shared[0]


def set_process_timeout(accelerator: Accelerator, timeout: timedelta) -> None:
    """How long this process waits for the others from now on, whatever for."""
    if accelerator.num_processes > 1:
        from torch.distributed import distributed_c10d as distributed

        set_timeout = getattr(distributed, "set_timeout", None) or distributed._set_pg_timeout  # as older torch has it
        set_timeout(timeout)


@contextmanager
def step_timeout(accelerator: Accelerator) -> Iterator[None]:
    """For the block processes wait no longer than steps may take."""
    set_process_timeout(accelerator, STEP_TIMEOUT)
    try:
        yield
    finally:
        set_process_timeout(accelerator, SETUP_TIMEOUT)


def with_setup_timeout(
    method: "Callable[Concatenate[StageRun, Arguments], Value]",
) -> "Callable[Concatenate[StageRun, Arguments], Value]":
    """A method of a hurried course that the main process may take its time for."""

    @functools.wraps(method)
    def with_timeout(stage_run: "StageRun", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
        set_process_timeout(stage_run.accelerator, SETUP_TIMEOUT)
        try:
            return method(stage_run, *args, **kwargs)
        finally:
            set_process_timeout(stage_run.accelerator, STEP_TIMEOUT)

    return with_timeout


def train_stage(
    name: str, stage: Stage, task: Task, folder: Path, accelerator: Accelerator, stopping: Stopping
) -> dict[str, float] | None:
    """Train `task` until `stage.images`; the last validation's numbers, or None if it was stopped before the end.

    `folder` receives checkpoints/, metrics.jsonl, samples/, weights.safetensors (the averaged weights of the modules
    that trained), best.safetensors (likewise, at the best validation), export/ (what the task writes) and best/
    (likewise, with the best weights).
    TrainingError if three batches in a row cannot be used, or `best_by` names no number of the validation.
    """
    try:
        stage_run = StageRun(name, stage, task, folder, accelerator, stopping)
    except Stopped as stopped:
        log.info("%s: stopped before its first step: %s.", name, stopped)
        return None
    state = stage_run.state
    with stage_run.report, closing(stage_run.micro_batches()) as micro_batches, step_timeout(accelerator):
        while state.progress.images_seen < stage.images:
            reason = stopping.reason
            stop, checkpoint_is_due = on_any_process(accelerator, reason is not None, stage_run.checkpoint_is_due())
            if stop or checkpoint_is_due:
                stage_run.save()
            if stop:
                stage_run.leave_weights()
                why = reason or "another process was asked to"
                log.info("%s: stopped at %s images: %s.", name, f"{state.progress.images_seen:,}", why)
                return None
            before = state.progress.images_seen
            stage_run.step(micro_batches)
            if _crossed(stage.validate_every, before, state.progress.images_seen, stage.images):
                stage_run.validate()
            if before < stage.decay_start <= state.progress.images_seen:
                stage_run.save(permanent=True)
        stage_run.save()
        numbers = stage_run.validate()
        stage_run.leave_weights(at_the_end=True)
    return numbers


class StageRun:
    """One stage under way: the task, what changes while it trains, and the steps of the loop."""

    def __init__(
        self,
        name: str,
        stage: Stage,
        task: Task,
        folder: Path,
        accelerator: Accelerator,
        stopping: Stopping | None = None,
    ) -> None:
        self.name, self.stage, self.task, self.folder, self.accelerator = name, stage, task, folder, accelerator
        chosen = parts.choose(task.parts(), stage.train, name)
        self.training = parts.freeze_all_but(task.modules, chosen)
        self._compile_modules()
        self._prepare(stopping or Stopping())
        with accelerator.main_process_first():
            saved = checkpoint.load(folder / "checkpoints", self._can_resume_from)
            self.best = self._best_so_far(saved)
        self.state = self._state(chosen, saved)
        if saved is not None:
            checkpoint.restore(self.state, saved, f"{folder / 'checkpoints'}")
        self._log_start(chosen)
        every, seen = stage.report_every_seconds, self.state.progress.images_seen
        self.report = Report(folder, name, stage.images, seen, every, accelerator.is_main_process, accelerator.log)
        self.saved_at = self.started_at = time.monotonic()
        self.saved_images = seen
        self.seconds_before = self.state.progress.seconds

    def micro_batches(self) -> Generator[tuple[int, Any], None, None]:
        """(first image number, batch) of every piece of every step from here to the end, this process's share.

        In place of a batch with a bad record stands the BadRecordError, so that the pieces after it still come.
        """
        return prefetched(torch.no_grad()(self._batch), self._micro_batch_ranges(), self.stage.prefetch)

    def step(self, micro_batches: Iterator[tuple[int, Any]]) -> None:
        """One optimiser step on `batch_size` images, or none if a record or a number in them is bad."""
        progress, stage = self.state.progress, self.stage
        parts.set_rates(self.state.optimiser, stage.rate(progress.images_seen))
        batches = list(islice(micro_batches, stage.accumulation))
        skip_reason = self._bad_record_reason(batches) or self._optimiser_step(batches)
        progress.images_seen += stage.batch_size
        progress.seconds = self.seconds_before + time.monotonic() - self.started_at
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skip_reason else 0
        if skip_reason:
            self._skip(skip_reason)
        self.report.row_if_due(progress.images_seen, self._rates_and_progress())

    @with_setup_timeout
    def validate(self) -> dict[str, float]:
        """The task's numbers and pictures with the averaged weights in place, written to metrics.jsonl and samples/."""
        seen = self.state.progress.images_seen
        self.report.row(seen, self._rates_and_progress())
        began = time.monotonic()
        with self._averaged():
            numbers = broadcast_from_main(self.accelerator, self._measure() if self.accelerator.is_main_process else {})
            self._save_if_best(numbers)
        self.report.validation(seen, numbers)
        self.report.pause(time.monotonic() - began)
        return numbers

    @with_setup_timeout
    def save(self, permanent: bool = False) -> None:
        """Write a checkpoint."""
        began, main = time.monotonic(), self.accelerator.is_main_process
        checkpoint.save(self.folder / "checkpoints", self.state, self.stage.keep, permanent, main)
        self.saved_at, self.saved_images = time.monotonic(), self.state.progress.images_seen
        self.report.pause(self.saved_at - began)

    def checkpoint_is_due(self) -> bool:
        """Whether there is something to save and it was not saved for long."""
        waited = time.monotonic() - self.saved_at >= self.stage.checkpoint_every_seconds
        return waited and self.state.progress.images_seen > self.saved_images

    @with_setup_timeout
    def leave_weights(self, at_the_end: bool = False) -> None:
        """Write the averaged weights for later stages and the task's own export; in the end also one of the best."""
        best = self.folder / checkpoint.BEST
        with self._averaged():
            if not self.accelerator.is_main_process:
                return
            self._write_weights("weights.safetensors", {})
            self._export("export")
            if at_the_end and self.stage.best_by and best.exists():
                checkpoint.load_weights(self.task.modules, checkpoint.read_tensors(best)[0], str(best))
                self._export("best")

    def _export(self, name: str) -> None:
        """What the task makes of the weights in place, in a folder of that name."""
        with checkpoint.replacing(self.folder / name) as draft:
            draft.mkdir()
            self.task.export(draft)

    def _batch(self, first: int, size: int) -> Any:
        try:
            return self.task.batch(first, size)
        except BadRecordError as error:
            return error

    def _bad_record_reason(self, batches: list[tuple[int, Any]]) -> str:
        """Why no process may take this step, if one of them met a bad record, in one line; "" if all can take it."""
        reasons = [str(batch) for _, batch in batches if isinstance(batch, BadRecordError)]
        if not on_any_process(self.accelerator, bool(reasons))[0]:
            return ""
        return " ".join("; ".join(gather_object(reasons)).split())[:300].rstrip(".")

    def _optimiser_step(self, batches: list[tuple[int, Any]]) -> str:
        """Move the weights by one step, or leave them and say why; "" if they moved."""
        loss, metrics = self._forward_backward(batches)
        norm = self._clip()
        is_finite, size = math.isfinite(float(loss + norm)), self.stage.batch_size
        if is_finite:
            self.optimiser.step()
            self.state.average.update(self.state.progress.images_seen + size, size)
            self.report.count({"loss": loss, "gradient_norm": norm}, size)
            for piece in metrics:
                self.report.count(piece, size // self.stage.accumulation)
        self.optimiser.zero_grad(set_to_none=True)
        return "" if is_finite else "a number in it is not finite"

    def _forward_backward(self, batches: list[tuple[int, Any]]) -> tuple[Tensor, list[Metrics]]:
        """Gradients of the mean loss over the whole batch, piece by piece; that mean, and the metrics of each piece."""
        count, total = len(batches), torch.zeros((), device=self.accelerator.device)
        metrics: list[Metrics] = []
        for number, (first, batch) in enumerate(batches):
            torch.manual_seed(derive_seed(self.task.context.seed, "step", first))  # for dropout and the like
            batch = to_device(batch, self.accelerator.device)
            with self._without_sync(number + 1 < count), self._autocast(), self._attention():
                per_sample, measured = self.model(batch, first)
            mean = per_sample.float().mean()
            with self._without_sync(number + 1 < count), self._attention():  # checkpoints compute it again
                self.accelerator.backward(mean / count)
            total = total + mean.detach() / count
            metrics.append(measured)
        shared = self.accelerator.num_processes > 1
        return self.accelerator.reduce(total, "mean") if shared else total, metrics

    def _clip(self) -> Tensor:
        """Norm of the gradients before they are cut to `clip`."""
        norm = nn.utils.clip_grad_norm_(list(self.state.trained.values()), self.stage.clip or math.inf)
        return checkpoint.gather_full(norm.detach())

    def _skip(self, skip_reason: str) -> None:
        progress = self.state.progress
        progress.skipped += 1
        where = f"{progress.images_seen:,}"
        log.warning("%s: the batch before image %s is left out: %s.", self.name, where, skip_reason)
        if progress.skipped_in_a_row >= MAX_BAD_BATCHES:
            raise TrainingError(
                f"Stage {self.name} stopped at {where} images because {MAX_BAD_BATCHES} batches in a row had to be "
                f"left out, the last because {skip_reason}: look at its data, or lower its learning rates or its clip, "
                "and run it again."
            )

    def _measure(self) -> dict[str, float]:
        """The task's numbers; its pictures into samples/, named by the images seen so that all of them stay."""
        samples, seen = self.folder / "samples", self.state.progress.images_seen
        samples.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=samples) as draft:
            # compiled code knows training's shapes only; validation's would be compiled again, for minutes
            with self._autocast(), torch.compiler.set_stance("force_eager"):
                numbers = self.task.validate(Path(draft), seen)
            pictures = {
                f"{self.name}/{path.stem}": path.replace(samples / f"{seen:09d}-{path.name}")
                for path in sorted(Path(draft).iterdir())
            }
        trackers.show(self.accelerator, pictures, seen)
        return {name: float(value) for name, value in numbers.items()}

    def _save_if_best(self, numbers: Mapping[str, float]) -> None:
        """Write best.safetensors if the number that `best_by` names was never as good; averaged weights in place."""
        wanted = self.stage.best_by
        if not wanted:
            return
        if wanted not in numbers:
            unknown = unknown_name("validation number", wanted, list(numbers))
            raise TrainingError(f"stage {self.name}, best_by: {unknown}.")
        value, sign = numbers[wanted], 1 if self.stage.best_is == "lowest" else -1
        if not math.isfinite(value) or (self.best is not None and sign * value >= sign * self.best):
            return
        self.best = value
        if self.accelerator.is_main_process:
            self._write_weights(checkpoint.BEST, {"best_by": wanted, "best_is": self.stage.best_is, "value": value})

    def _best_so_far(self, saved: Checkpoint | None) -> float | None:
        """The best number up to that checkpoint; best.safetensors goes back to where it was then."""
        if not self.stage.best_by:
            return None
        if self.accelerator.is_main_process:
            checkpoint.restore_best(self.folder / "checkpoints", saved.progress.images_seen if saved else 0)
        note = checkpoint.read_provenance(self.folder / checkpoint.BEST)
        same = (note.get("best_by"), note.get("best_is")) == (self.stage.best_by, self.stage.best_is)
        return note["value"] if same else None

    def _write_weights(self, name: str, note: Mapping[str, Any]) -> None:
        """The weights that are in place, with a note of where they are from."""
        facts = {"stage": self.name, "images_seen": self.state.progress.images_seen, **note}
        tensors = checkpoint.weights(self.task.modules, self.training)
        checkpoint.write_tensors(self.folder / name, tensors, {"from": json.dumps(facts)})

    def _rates_and_progress(self) -> dict[str, float]:
        rates = {group["part"]: group["lr"] for group in self.state.optimiser.param_groups}
        named = {"lr": next(iter(rates.values())), **{f"lr/{part}": rate for part, rate in rates.items()}}
        return {**named, "skipped": self.state.progress.skipped, "seconds": round(self.state.progress.seconds, 1)}

    def _micro_batch_ranges(self) -> Iterator[tuple[int, int]]:
        shares = self.stage.accumulation * self.accelerator.num_processes
        size, rank = self.stage.batch_size // shares, self.accelerator.process_index
        for step_start in range(self.state.progress.images_seen, self.stage.images, self.stage.batch_size):
            for piece in range(self.stage.accumulation):
                yield step_start + (piece * self.accelerator.num_processes + rank) * size, size

    def _can_resume_from(self, saved: Checkpoint) -> bool:
        """Whether this stage, run straight, would have passed through that checkpoint: its rate did not fall yet."""
        facts = ("images", "batch_size", "schedule", "decay")
        then = self.stage.model_copy(update={fact: saved.stage[fact] for fact in facts})
        if then.images == self.stage.images:
            return True
        last_step = saved.progress.images_seen - then.batch_size
        return self.stage.schedule == "constant" or last_step <= min(then.decay_start, self.stage.decay_start)

    def _state(self, chosen: parts.Parts, saved: Checkpoint | None) -> State:
        """What changes while training; from here on FSDP, if it is used, has cut the modules into shards."""
        stage, paths = self.stage, list(parts.named(self.task.modules, chosen))
        optimiser = parts.optimiser(
            chosen, stage.train, stage.betas, stage.weight_decay, stage.muon, stage.optimiser
        )  # fmt: skip
        losses = _Losses(self.task, self.training)
        self.model, self.optimiser = self.accelerator.prepare(losses, optimiser)
        trained = parts.parameters_at(self.task.modules, paths)
        if stage.optimiser == "adamw8bit" and any(checkpoint.is_sharded(p) for p in trained.values()):
            raise ConfigError(f"stage {self.name}: optimiser adamw8bit cannot train shards (FSDP): take adamw.")
        modules = {name: self.task.modules[name] for name in self.training}
        described, average = stage.model_dump(mode="json"), Average(trained, stage.ema)
        return State(modules, trained, optimiser, average, Progress(), described, self._precision(saved))

    def _precision(self, saved: Checkpoint | None) -> str:
        """What the stage says, or what its checkpoint began with, or what the run found to be faster."""
        if self.stage.precision != "auto":
            return self.stage.precision
        if saved is not None:
            return saved.precision
        main = self.accelerator.is_main_process  # which measures for all
        precision, words = broadcast_from_main(self.accelerator, self._faster() if main else ("", ""))
        log.info("%s: trains in %s (%s)", self.name, precision, words)
        return precision

    def _faster(self) -> tuple[str, str]:
        """The faster precision on this kind of device, and the measurement, which is taken once for the whole run.

        On a busy machine it may come out otherwise, and a run that starts again must go on with the same numbers.
        """
        path, device = self.folder.parent / "precision.json", self.accelerator.device
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if device.type not in known:
            known[device.type] = dict(zip(("precision", "measured"), faster_precision(device), strict=True))
            checkpoint.write_json(path, known)
        return known[device.type]["precision"], known[device.type]["measured"]

    def _prepare(self, stopping: Stopping) -> None:
        """The main process first: it fills the caches that the others find. Stopped, on all, if it is to stop there."""
        main, reason = self.accelerator.is_main_process, ""
        for main_turn in (True, False):
            if main == main_turn and not reason:
                try:
                    with stopping.interruptible():
                        self._prepare_task()
                except Stopped as stopped:
                    reason = str(stopped)
            if on_any_process(self.accelerator, bool(reason))[0]:
                raise Stopped(reason or "another process was asked to")

    def _prepare_task(self) -> None:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            parts.train_mode(self.task.modules, ())
            self.task.prepare()
            self._show_first_batch()
            parts.train_mode(self.task.modules, self.training)

    def _show_first_batch(self) -> None:
        """Leave the first pictures of the stage as a sheet beside its numbers."""
        path = self.folder / "first_batch.png"
        if not self.accelerator.is_main_process or path.exists():
            return
        batch = self._batch(0, min(FIRST_BATCH_IMAGES, self.stage.batch_size))
        if isinstance(batch, BadRecordError):
            log.warning("%s: there is no first_batch.png, since a record is bad: %s", self.name, batch)
            return
        with checkpoint.replacing(path) as draft:
            self.task.show(batch, draft)

    def _log_start(self, chosen: parts.Parts) -> None:
        seen = self.state.progress.images_seen
        sizes = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in parts.sizes(chosen).items())
        begins = f"carries on at {seen:,}" if seen else "starts"
        log.info("%s: %s of %s images, training %s", self.name, begins, f"{self.stage.images:,}", sizes)

    def _compile_modules(self) -> None:
        if self.stage.compile and self.accelerator.device.type == "cpu" and not _cpp_compiler():
            raise ConfigError(
                f"stage {self.name}: compile: true needs a C++ compiler on a CPU: install g++ or clang++ (or name "
                "one in CXX), or leave it out."
            )
        for module in self.task.modules.values():  # frozen ones too: most of a step may be theirs
            if self.stage.channels_last:
                module.to(memory_format=torch.channels_last)
            if self.stage.compile:
                module.compile()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Averaged weights in whole modules, eval mode, no gradients; afterwards all as before. For all processes."""
        main = self.accelerator.is_main_process  # the only one that uses them
        modules = self.task.modules
        with torch.no_grad(), self.state.average.applied(), parts.unsharded(modules.values(), main):
            parts.train_mode(modules, ())
            try:
                yield
            finally:
                parts.train_mode(modules, self.training)

    def _autocast(self) -> AbstractContextManager[Any]:
        device = self.accelerator.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.state.precision == "bf16")

    def _attention(self) -> AbstractContextManager[Any]:
        """On a CPU in bf16 attention as plain products: PyTorch's fused kernel takes six times as long backwards."""
        on_cpu = self.accelerator.device.type == "cpu"
        return plain_attention() if on_cpu and self.state.precision == "bf16" else ExitStack()

    def _without_sync(self, hold: bool) -> AbstractContextManager[Any]:
        """Gradients travel between processes once per step, with its last piece."""
        return self.accelerator.no_sync(self.model) if hold else ExitStack()


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as products and a softmax, all in the precision of its inputs."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


class _Losses(nn.Module):
    """The task's loss as one forward call over its training modules, which is what several processes can share.

    It returns plain tuples and dicts, in which DDP and FSDP find the tensors whose gradients they wait for.
    """

    def __init__(self, task: Task, training: list[str]) -> None:
        super().__init__()
        self.networks = nn.ModuleList([task.modules[name] for name in training])
        self.loss: Callable[[Any, int], Loss] = task.loss

    def forward(self, batch: Any, images_seen: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        loss = self.loss(batch, images_seen)
        measured = {k: v.detach() if isinstance(v, Tensor) else v for k, v in loss.metrics.items()}
        return loss.per_sample, measured


def _cpp_compiler() -> str | None:
    """The compiler that torch.compile would call on a CPU, if there is one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))), None)


def _crossed(every: int, before: int, after: int, end: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; the end has a validation of its own."""
    return bool(every) and before // every != after // every and after < end
