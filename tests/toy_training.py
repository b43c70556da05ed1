"""A task small enough to train in a test: a small network that learns a fixed linear map from noise.

Runs can also be started in separate processes. They are forked from a process that has imported everything, so that
killing and restarting them takes milliseconds.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

import train.loop
from imagine.errors import BadRecordError, ImagineError
from tests.forks import fork_process
from train.__main__ import DONE, STOPPED, WRONG
from train.cache.rows import cache_rows
from train.config import Run
from train.data.order import normals
from train.stages import run_stages
from train.task import Loss, TaskContext


class ToySettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = 4
    dropout: float = 0.0
    bad: tuple[int, ...] = ()  # image numbers whose batch has a NaN loss
    broken: tuple[int, ...] = ()  # image numbers whose batch raises BadRecordError
    scores: dict[int, float] = {}  # images seen -> the validation number "score"; 1 at others
    end_at: tuple[int, int] = (-1, 0)  # (images seen, process): SIGTERM for that process before that batch
    pause: float = 0.0  # seconds per batch
    hang_at: tuple[int, int] = (-1, 0)  # (images seen, process): that process sleeps before that batch
    rows: int = 0  # cached rows that it makes before its first batch
    end_in_row: int = -1  # SIGTERM once, while the block with this row is made
    careful: bool = False  # builds and prepares in folders that two processes must not make at the same time
    image: bool = False  # the network starts with a convolution


@dataclass(frozen=True)
class _Rows:
    """A gallery without pictures, for caching rows."""

    count: int
    size: int = 1
    mark: str = "toy"

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class ToyBatch:
    x: Tensor
    y: Tensor


class ToyTask:
    Settings: ClassVar[type[BaseModel]] = ToySettings
    PARTS: ClassVar[tuple[str, ...]] = ("first", "second", "both")

    def __init__(self, settings: ToySettings, context: TaskContext) -> None:
        self.settings, self.context = settings, context
        width = settings.width
        first = _Convolution(width) if settings.image else nn.Linear(3, width)
        self.modules: dict[str, nn.Module] = {
            "body": nn.Sequential(first, nn.Tanh(), nn.Dropout(settings.dropout)),
            "head": nn.Linear(width, 2),
        }
        if settings.careful:
            _fill(context.folder / "built")

    def parts(self) -> dict[str, list[nn.Parameter]]:
        first, second = list(self.modules["body"].parameters()), list(self.modules["head"].parameters())
        return {"first": first, "second": second, "both": first + second}

    def check(self) -> list[str]:
        return ["a width of 1 is odd."] if self.settings.width == 1 else []

    def prepare(self) -> None:
        assert not self.modules["head"].training
        if self.settings.careful:
            _fill(self.context.folder / "cache")
        if self.settings.rows:
            folder = self.context.folder / "cache"
            cache_rows(folder / "rows.f32", _Rows(self.settings.rows), (1,), np.float32, self._make, "filling rows")

    def _make(self, rows: Tensor) -> Tensor:
        once = self.context.folder / "asked"
        if self.settings.end_in_row in rows.tolist() and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return rows[:, None].float()

    def batch(self, images_seen: int, size: int) -> ToyBatch:
        time.sleep(self.settings.pause)
        broken = [number for number in self.settings.broken if images_seen <= number < images_seen + size]
        if broken:
            raise BadRecordError(f"Record {broken[0]} cannot be used:\nit is torn.")
        here = (images_seen, int(os.environ.get("RANK", "0")))
        if self.settings.end_at == here:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.settings.hang_at == here:
            time.sleep(2.5)
        x = normals(self.context.seed, "x", images_seen, size, (3,))
        y = x[:, :2] * 2 - x[:, 2:]
        if any(images_seen <= bad < images_seen + size for bad in self.settings.bad):
            y = y * float("nan")
        return ToyBatch(x, y)

    def show(self, batch: ToyBatch, path: Path) -> None:
        path.write_text(json.dumps(batch.x.tolist()))

    def loss(self, batch: ToyBatch, images_seen: int) -> Loss:
        noise = normals(self.context.seed, "noise", images_seen, len(batch.x), (2,)) * 0.1
        error = self.modules["head"](self.modules["body"](batch.x)) - batch.y - noise
        return Loss(error.square().mean(1), {"largest": error.detach().abs().max()})

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        batch = self.batch(10**9, 64)
        error = self.modules["head"](self.modules["body"](batch.x)) - batch.y
        Image.new("RGB", (2, 2), (images_seen % 256, 0, 0)).save(folder / "pictures.png")
        return {"error": float(error.square().mean()), "score": self.settings.scores.get(images_seen, 1.0)}

    def export(self, folder: Path) -> None:
        weight = self.modules["head"].get_parameter("weight")
        (folder / "head.json").write_text(json.dumps(weight.tolist()))


class _Convolution(nn.Module):
    """A linear map of three numbers as a convolution, whose weights can be stored in the channels-last format."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.filter = nn.Conv2d(3, width, 1)
        self.spread = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.spread(self.filter(x[:, :, None, None].expand(-1, -1, 2, 2))).mean((2, 3))


def _fill(folder: Path) -> None:
    """Make a folder slowly, unless it exists; FileExistsError if two processes do it at the same time."""
    if not (folder / "ready").exists():
        folder.mkdir(parents=True)
        time.sleep(0.1)
        (folder / "ready").touch()


@dataclass(frozen=True)
class ProcessSpec:
    """A process of a group: its rank, the number of processes, their port, and environment variables."""

    rank: int = 0
    processes: int = 1
    port: int = 0
    environment: dict[str, str] = field(default_factory=dict)


def start_training(
    run: Run, output: Path, spec: ProcessSpec = ProcessSpec(), tasks: Mapping[str, Any] | None = None
) -> ForkServerProcess:
    """Start a process that trains `run` with the toy task, or with `tasks`, and exits with DONE, STOPPED or WRONG."""
    return fork_process(_train, run, output, spec, tasks or {"toy": ToyTask}, daemon=True)


def stderr_of(output: Path, rank: int = 0) -> str:
    """Return the stderr of the process with this rank in the last start."""
    return _stderr_file(output, rank).read_text()


def run_in_processes(
    run: Run,
    output: Path,
    environment: dict[str, str] | None = None,
    count: int = 2,
    tasks: Mapping[str, Any] | None = None,
) -> list[int | None]:
    """Train `run` in `count` processes that share each batch; return their exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    together = [
        start_training(run, output, ProcessSpec(rank, count, port, environment or {}), tasks) for rank in range(count)
    ]
    for process in together:
        process.join()
    return [process.exitcode for process in together]


def _stderr_file(output: Path, rank: int) -> Path:
    return output.with_name(f"{output.name}.{rank}.txt")


def _train(run: Run, output: Path, spec: ProcessSpec, tasks: Mapping[str, Any]) -> None:
    with _stderr_file(output, spec.rank).open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    if spec.processes > 1:
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(spec.port), RANK=str(spec.rank), LOCAL_RANK=str(spec.rank),
            WORLD_SIZE=str(spec.processes), LOCAL_WORLD_SIZE=str(spec.processes),
        )  # fmt: skip
    os.environ.update(spec.environment)
    if "TOY_STEP_TIMEOUT" in os.environ:
        train.loop.STEP_TIMEOUT = timedelta(seconds=float(os.environ["TOY_STEP_TIMEOUT"]))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        _shard_on_cpus()
    try:
        sys.exit(DONE if run_stages(run, output, tasks=tasks) else STOPPED)
    except ImagineError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(WRONG)


def _shard_on_cpus() -> None:
    """Make accelerate use FSDP on CPUs, which it would use on GPUs only; FSDP itself works on both."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    Accelerator(mixed_precision="no")
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()


if __name__ == "__main__":  # the trainer with the toy task, as a separate process that a test can kill
    from train.__main__ import main

    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:], {"toy": ToyTask}))
