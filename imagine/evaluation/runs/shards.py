"""Divide the work of one run among processes, on one machine or on a Ray cluster.

Each process takes every n-th batch of the run and writes its pictures and results into the run's folder, as a run that
is later killed would. A last run without a shard finds everything there and writes the report, so its numbers are
those of a run in a single process.
"""

import importlib
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Literal

from imagine.errors import ConfigError
from imagine.records import Progress, no_progress

Executor = Literal["processes", "ray"]


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` parts of a run, counted from 0."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(f"There is no part {self.index} of {self.count}: number the parts from 0.")

    @property
    def is_whole(self) -> bool:
        return self.count == 1

    def owns(self, batch: int) -> bool:
        """Return whether this part computes the batch with this number."""
        return batch % self.count == self.index


WHOLE = Shard()


def run_shards(
    work: Callable[[Shard], Any], count: int, executor: Executor = "processes", progress: Progress = no_progress
) -> None:
    """Call `work` for every one of `count` shards, in processes of this machine or as tasks on Ray.

    `work` must be picklable, and reach the run's folder from where it is called. The first error ends the run.
    """
    if count < 1:
        raise ConfigError(f"A run cannot be divided into {count} parts: choose 1 or more.")
    shards = [Shard(index, count) for index in range(count)]
    if executor == "ray":
        return _run_on_ray(work, shards, progress)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        for done, future in enumerate(as_completed([pool.submit(work, shard) for shard in shards]), 1):
            future.result()
            progress("parts of the run", done, count)


def _run_on_ray(work: Callable[[Shard], Any], shards: list[Shard], progress: Progress) -> None:
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("Ray is not installed: run pip install -e '.[ray]', or leave --ray out.")
    ray: Any = importlib.import_module("ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": _path()}})
    remote = ray.remote(_do)
    waiting = [remote.remote(work, shard) for shard in shards]
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1)
        ray.get(ready)
        progress("parts of the run", len(shards) - len(waiting), len(shards))


def _do(work: Callable[[Shard], Any], shard: Shard) -> None:
    work(shard)


def _path() -> str:
    return ":".join(each for each in sys.path if each)
