"""The training loop: train one stage from its start, or from its newest checkpoint, to its last image.

The loop is independent of the networks. Progress is the number of images seen; learning rate, data, random numbers and
validations depend only on it, so a run that was stopped and resumed ends with the weights of an uninterrupted run.

Several processes take the same steps, each on its share of every batch. Information that only one process has (a
signal, a time limit, a record that cannot be read, validation numbers) is reduced or broadcast before any process acts
on it.
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
MAX_BAD_BATCHES = 3  # skipped batches in a row after which training stops
FIRST_BATCH_IMAGES = 32  # images of the first batch that are saved for inspection
# How long processes wait for each other. A process that dies is noticed immediately.
SETUP_TIMEOUT = timedelta(hours=24)  # while the main process renders or encodes pictures, validates or exports
STEP_TIMEOUT = timedelta(hours=1)  # within steps: a process that hangs must not block all machines for a day
Metrics = Mapping[str, float | Tensor]
Value = TypeVar("Value")
Arguments = ParamSpec("Arguments")


class TrainingError(ImagineError):
    """Raised when training cannot continue with the stage's settings."""


def on_any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Return the logical OR of each flag over all processes."""
    if accelerator.num_processes == 1:
        return list(flags)
    counts = accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=accelerator.device), "sum")
    return [count > 0 for count in counts.tolist()]


def broadcast_from_main(accelerator: Accelerator, value: Value) -> Value:
    """Return the main process's value on every process."""
    shared: list[Value] = [value] if accelerator.num_processes == 1 else broadcast_object_list([value])
    return shared[0]


def set_process_timeout(accelerator: Accelerator, timeout: timedelta) -> None:
    """Set the timeout of all later collective operations of this process."""
    if accelerator.num_processes > 1:
        from torch.distributed import distributed_c10d as distributed

        set_timeout = getattr(distributed, "set_timeout", None) or distributed._set_pg_timeout  # older torch versions
        set_timeout(timeout)


@contextmanager
def step_timeout(accelerator: Accelerator) -> Iterator[None]:
    """Use STEP_TIMEOUT within the block, and SETUP_TIMEOUT after it."""
    set_process_timeout(accelerator, STEP_TIMEOUT)
    try:
        yield
    finally:
        set_process_timeout(accelerator, SETUP_TIMEOUT)


def with_setup_timeout(
    method: "Callable[Concatenate[StageRun, Arguments], Value]",
) -> "Callable[Concatenate[StageRun, Arguments], Value]":
    """Wrap a method that may take the main process long: use SETUP_TIMEOUT during the call, STEP_TIMEOUT after it."""

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
    """Train `task` until `stage.images`; return the last validation's numbers, or None if stopped before the end.

    `folder` receives checkpoints/, metrics.jsonl, samples/, weights.safetensors (averaged weights of the trained
    modules), best.safetensors (averaged weights at the best validation), export/ (the task's export) and best/ (the
    task's export with the best weights).
    Raises TrainingError if three batches in a row cannot be used, or if `best_by` is not a number of the validation.
    """
    try:
        stage_run = StageRun(name, stage, task, folder, accelerator, stopping)
    except Stopped as stopped:
        log.info("%s: stopped before its first step: %s.", name, stopped)
        return None
    state = stage_run.state
    with stage_run.report, closing(stage_run.micro_batches()) as micro_batches, step_timeout(accelerator):
        while state.progress.images_seen < stage.images:
            stopping.trained_seconds = state.progress.seconds
            reason = stopping.reason
            stop, checkpoint_is_due = on_any_process(accelerator, reason is not None, stage_run.checkpoint_is_due())
            if stop or checkpoint_is_due:
                stage_run.save()
            if stop:
                stage_run.leave_weights()
                why = reason or "another process was stopped"
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
    """A stage in training: the task, the training state, and the steps of the loop."""

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
        """Yield (first image number, batch) for this process's share of every remaining micro-batch.

        A batch with a bad record is replaced by its BadRecordError, so that the iterator continues after it.
        """
        return prefetched(torch.no_grad()(self._batch), self._micro_batch_ranges(), self.stage.prefetch)

    def step(self, micro_batches: Iterator[tuple[int, Any]]) -> None:
        """Take one optimiser step on `batch_size` images; skip it for a bad record or a loss or gradient not finite."""
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
        """Validate with the averaged weights: write metrics.jsonl and samples/, and return the numbers."""
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
        """Return whether `checkpoint_every_seconds` have passed since the last checkpoint, with at least one step."""
        waited = time.monotonic() - self.saved_at >= self.stage.checkpoint_every_seconds
        return waited and self.state.progress.images_seen > self.saved_images

    @with_setup_timeout
    def leave_weights(self, at_the_end: bool = False) -> None:
        """Write the averaged weights for later stages, and the export; at the end also export the best weights."""
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
        """Have the task export its current weights to the folder `name`."""
        with checkpoint.replacing(self.folder / name) as draft:
            draft.mkdir()
            self.task.export(draft)

    def _batch(self, first: int, size: int) -> Any:
        try:
            return self.task.batch(first, size)
        except BadRecordError as error:
            return error

    def _bad_record_reason(self, batches: list[tuple[int, Any]]) -> str:
        """Return in one line which bad records any process met in this step; "" if there are none."""
        reasons = [str(batch) for _, batch in batches if isinstance(batch, BadRecordError)]
        if not on_any_process(self.accelerator, bool(reasons))[0]:
            return ""
        return " ".join("; ".join(gather_object(reasons)).split())[:300].rstrip(".")

    def _optimiser_step(self, batches: list[tuple[int, Any]]) -> str:
        """Update the weights and return ""; if loss or gradient is not finite, return that reason and do not update."""
        loss, metrics = self._forward_backward(batches)
        norm = self._clip()
        is_finite, size = math.isfinite(float(loss + norm)), self.stage.batch_size
        if is_finite:
            self.optimiser.step()
            self.state.average.update(self.state.progress.images_seen + size, size)
            self.report.count({"loss": loss, "gradient_norm": norm}, size)
            for micro_batch_metrics in metrics:
                self.report.count(micro_batch_metrics, size // self.stage.accumulation)
        self.optimiser.zero_grad(set_to_none=True)
        return "" if is_finite else "its loss or gradient is not finite"

    def _forward_backward(self, batches: list[tuple[int, Any]]) -> tuple[Tensor, list[Metrics]]:
        """Accumulate the gradients of the whole batch's mean loss; return that mean and each micro-batch's metrics."""
        count, total = len(batches), torch.zeros((), device=self.accelerator.device)
        metrics: list[Metrics] = []
        for number, (first, batch) in enumerate(batches):
            torch.manual_seed(derive_seed(self.task.context.seed, "step", first))  # for dropout
            batch = to_device(batch, self.accelerator.device)
            with self._without_sync(number + 1 < count), self._autocast(), self._attention():
                per_sample, measured = self.model(batch, first)
            mean = per_sample.float().mean()
            with self._without_sync(number + 1 < count), self._attention():  # gradient checkpointing recomputes it
                self.accelerator.backward(mean / count)
            total = total + mean.detach() / count
            metrics.append(measured)
        shared = self.accelerator.num_processes > 1
        return self.accelerator.reduce(total, "mean") if shared else total, metrics

    def _clip(self) -> Tensor:
        """Clip the gradients to the norm `clip`, and return their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(list(self.state.trained.values()), self.stage.clip or math.inf)
        return checkpoint.gather_full(norm.detach())

    def _skip(self, skip_reason: str) -> None:
        progress = self.state.progress
        progress.skipped += 1
        where = f"{progress.images_seen:,}"
        log.warning("%s: skipped the batch before image %s: %s.", self.name, where, skip_reason)
        if progress.skipped_in_a_row >= MAX_BAD_BATCHES:
            raise TrainingError(
                f"Stage {self.name} stopped at {where} images because {MAX_BAD_BATCHES} batches in a row were "
                f"skipped. The reason for the last one: {skip_reason}. Check the stage's data, or lower its learning "
                "rates or its clip, and run it again."
            )

    def _measure(self) -> dict[str, float]:
        """Return the task's validation numbers; save its pictures in samples/, with the images seen in their names."""
        samples, seen = self.folder / "samples", self.state.progress.images_seen
        samples.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=samples) as draft:
            # The modules are compiled for the shapes of training; compiling those of validation would take minutes.
            with self._autocast(), torch.compiler.set_stance("force_eager"):
                numbers = self.task.validate(Path(draft), seen)
            pictures = {
                f"{self.name}/{path.stem}": path.replace(samples / f"{seen:09d}-{path.name}")
                for path in sorted(Path(draft).iterdir())
            }
        trackers.show(self.accelerator, pictures, seen)
        return {name: float(value) for name, value in numbers.items()}

    def _save_if_best(self, numbers: Mapping[str, float]) -> None:
        """Write best.safetensors if the number `best_by` is the best so far. The averaged weights must be applied."""
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
        """Return the best number up to the checkpoint `saved`, and restore the best.safetensors of that time."""
        if not self.stage.best_by:
            return None
        if self.accelerator.is_main_process:
            checkpoint.restore_best(self.folder / "checkpoints", saved.progress.images_seen if saved else 0)
        note = checkpoint.read_provenance(self.folder / checkpoint.BEST)
        same = (note.get("best_by"), note.get("best_is")) == (self.stage.best_by, self.stage.best_is)
        return note["value"] if same else None

    def _write_weights(self, name: str, note: Mapping[str, Any]) -> None:
        """Write the modules' current weights, with a note of their stage and images seen in the header."""
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
            for micro_batch in range(self.stage.accumulation):
                yield step_start + (micro_batch * self.accelerator.num_processes + rank) * size, size

    def _can_resume_from(self, saved: Checkpoint) -> bool:
        """Return whether an uninterrupted run of this stage would have reached that checkpoint.

        It would if `images` is the same, or if the learning rate had not begun to fall at the checkpoint.
        """
        facts = ("images", "batch_size", "schedule", "decay")
        then = self.stage.model_copy(update={fact: saved.stage[fact] for fact in facts})
        if then.images == self.stage.images:
            return True
        last_step = saved.progress.images_seen - then.batch_size
        return self.stage.schedule == "constant" or last_step <= min(then.decay_start, self.stage.decay_start)

    def _state(self, chosen: parts.Parts, saved: Checkpoint | None) -> State:
        """Create the training state. After this call, the modules are sharded if FSDP is used."""
        stage, paths = self.stage, list(parts.named(self.task.modules, chosen))
        optimiser = parts.optimiser(
            chosen, stage.train, stage.betas, stage.weight_decay, stage.muon, stage.optimiser
        )  # fmt: skip
        losses = _Losses(self.task, self.training)
        self.model, self.optimiser = self.accelerator.prepare(losses, optimiser)
        trained = parts.parameters_at(self.task.modules, paths)
        if stage.optimiser == "adamw8bit" and any(checkpoint.is_sharded(p) for p in trained.values()):
            raise ConfigError(f"stage {self.name}: optimiser adamw8bit does not support FSDP; use optimiser adamw.")
        modules = {name: self.task.modules[name] for name in self.training}
        described, average = stage.model_dump(mode="json"), Average(trained, stage.ema)
        return State(modules, trained, optimiser, average, Progress(), described, self._precision(saved))

    def _precision(self, saved: Checkpoint | None) -> str:
        """Return the stage's precision; for `auto` the checkpoint's, or else the one measured to be faster."""
        if self.stage.precision != "auto":
            return self.stage.precision
        if saved is not None:
            return saved.precision
        main = self.accelerator.is_main_process  # the only process that measures
        precision, words = broadcast_from_main(self.accelerator, self._faster() if main else ("", ""))
        log.info("%s: training in %s (%s)", self.name, precision, words)
        return precision

    def _faster(self) -> tuple[str, str]:
        """Return the faster precision on this type of device, and the measurement as text. Measure it once per run.

        A second measurement on a busy machine could differ, and a resumed run must compute in the same precision.
        """
        path, device = self.folder.parent / "precision.json", self.accelerator.device
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if device.type not in known:
            known[device.type] = dict(zip(("precision", "measured"), faster_precision(device), strict=True))
            checkpoint.write_json(path, known)
        return known[device.type]["precision"], known[device.type]["measured"]

    def _prepare(self, stopping: Stopping) -> None:
        """Prepare the task, on the main process first, which fills the caches that the other processes read.

        Raises Stopped on all processes if one of them is asked to stop.
        """
        main, reason = self.accelerator.is_main_process, ""
        for main_turn in (True, False):
            if main == main_turn and not reason:
                try:
                    with stopping.interruptible():
                        self._prepare_task()
                except Stopped as stopped:
                    reason = str(stopped)
            if on_any_process(self.accelerator, bool(reason))[0]:
                raise Stopped(reason or "another process was stopped")

    def _prepare_task(self) -> None:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            parts.train_mode(self.task.modules, ())
            self.task.prepare()
            self._show_first_batch()
            parts.train_mode(self.task.modules, self.training)

    def _show_first_batch(self) -> None:
        """Save the first pictures of the stage as first_batch.png in its folder, unless the file exists."""
        path = self.folder / "first_batch.png"
        if not self.accelerator.is_main_process or path.exists():
            return
        batch = self._batch(0, min(FIRST_BATCH_IMAGES, self.stage.batch_size))
        if isinstance(batch, BadRecordError):
            log.warning("%s: first_batch.png is not written, because a record is bad: %s", self.name, batch)
            return
        with checkpoint.replacing(path) as draft:
            self.task.show(batch, draft)

    def _log_start(self, chosen: parts.Parts) -> None:
        seen = self.state.progress.images_seen
        sizes = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in parts.sizes(chosen).items())
        start = f"resuming at {seen:,}" if seen else "starting at 0"
        log.info("%s: %s of %s images, training %s", self.name, start, f"{self.stage.images:,}", sizes)

    def _compiles(self) -> bool:
        """Return whether the modules are compiled. Raise ConfigError if they must be and cannot."""
        if not self.stage.compile or self.accelerator.device.type != "cpu" or _cpp_compiler():
            return bool(self.stage.compile)
        if self.stage.compile == "auto":
            log.info("%s: not compiled, because there is no C++ compiler; with g++ it is faster", self.name)
            return False
        raise ConfigError(
            f"stage {self.name}: compile: true needs a C++ compiler on a CPU. Install g++ or clang++ (or name "
            "one in CXX), or leave compile out."
        )

    def _compile_modules(self) -> None:
        modules = self.task.modules.values()  # frozen ones too: they may take most of a step
        for module in modules:
            if self.stage.channels_last:
                module.to(memory_format=torch.channels_last)
        if self._compiles():
            own = getattr(self.task, "compile", None)  # of a task whose modules need more than `Module.compile`
            for compile_one in [own] if own else [module.compile for module in modules if self._can_compile(module)]:
                compile_one()

    def _can_compile(self, module: nn.Module) -> bool:
        """Return False for PyTorch's own attention module on a CPU: in bf16, compiled, it gives gradients of NaN."""
        on_cpu = self.accelerator.device.type == "cpu"
        return not (on_cpu and any(isinstance(part, nn.MultiheadAttention) for part in module.modules()))

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within the block: averaged weights, unsharded modules, eval mode, no gradients. All processes must enter."""
        main = self.accelerator.is_main_process  # the only process that uses the unsharded modules
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
        """Use plain attention on a CPU in bf16: the backward pass of PyTorch's fused kernel takes six times as long."""
        on_cpu = self.accelerator.device.type == "cpu"
        return plain_attention() if on_cpu and self.state.precision == "bf16" else ExitStack()

    def _without_sync(self, hold: bool) -> AbstractContextManager[Any]:
        """Suspend gradient synchronisation if `hold`: gradients are exchanged once a step, in its last micro-batch."""
        return self.accelerator.no_sync(self.model) if hold else ExitStack()


@contextmanager
def plain_attention() -> Iterator[None]:
    """Compute attention within the block as matrix products and a softmax, all in the precision of its inputs."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


class _Losses(nn.Module):
    """The task's loss as the forward call of one module that holds the training modules, as DDP and FSDP need it.

    It returns plain tuples and dicts, in which DDP and FSDP can find the tensors whose gradients they synchronise.
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
    """Return the path of the C++ compiler that torch.compile would call on a CPU, or None."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))), None)


def _crossed(every: int, before: int, after: int, end: int) -> bool:
    """Return whether a multiple of `every` is in (before, after]; False at the end, where a validation runs anyway."""
    return bool(every) and before // every != after // every and after < end
