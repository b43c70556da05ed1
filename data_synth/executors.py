"""Run the steps of a build in this process, in worker processes, or on a Ray cluster; the results are the same.

An executor takes an iterable of tasks and returns each task, in order, with the results that its targets lacked.
Only the driver (the main process) opens the store. Workers receive and return records, so they may run on any machine
and may be killed at any time.
"""

import importlib
import logging
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any

from data_synth.config import BuildConfig, Cluster, StageResources
from data_synth.steps import STEPS, Backends, Recipe, Task, advance, find_in, replay_targets
from imagine.errors import ConfigError, ImagineError

Executor = Callable[[Recipe, Iterable[Task]], Iterator[Task]]

_QUEUED_PER_WORKER = 2  # tasks queued per worker, so that a worker never waits for the driver


def choose_executor(config: BuildConfig, backend: str) -> Executor:
    """Return the executor for `--backend local` or `ray`. Raises ConfigError if it is unknown or not installed."""
    if backend == "ray":
        _import_ray()
        return on_ray
    if backend != "local":
        raise ConfigError(f"There is no backend {backend!r} to run a build on: give local or ray.")
    return in_processes if config.workers else in_this_process


def in_this_process(recipe: Recipe, tasks: Iterable[Task]) -> Iterator[Task]:
    """Run the tasks one after the other in this process."""
    backends = Backends(recipe.config)
    for task in tasks:
        yield advance(recipe, task, backends)


# --- worker processes -------------------------------------------------------------------------------------------------
def in_processes(recipe: Recipe, tasks: Iterable[Task]) -> Iterator[Task]:
    """Run the tasks in `workers` processes; each loads its own models and uses its share of the cores."""
    workers = recipe.config.workers
    threads = max(1, (os.cpu_count() or 1) // workers)
    # Spawn, not fork: a forked process may hang if torch has started threads in its parent.
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (recipe, threads)) as pool:
        try:
            yield from _in_order((pool.submit(_run_task, task) for task in tasks), _QUEUED_PER_WORKER * workers)
        except BrokenProcessPool as error:
            raise ConfigError(
                "A worker process was killed, perhaps for lack of memory: lower workers or chunk, and build again."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_order(started: Iterator["Future[Task]"], queue_size: int) -> Iterator[Task]:
    running: deque[Future[Task]] = deque(islice(started, queue_size))
    while running:
        yield running.popleft().result()
        running.extend(islice(started, 1))


_worker_state: tuple[Recipe, Backends]  # set in each worker process when it starts


def _start_worker(recipe: Recipe, threads: int) -> None:
    global _worker_state
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the driver prints the message
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by torch, which is imported later
    _worker_state = recipe, Backends(recipe.config)


def _exit_with_parent() -> None:
    """Exit when the driver exits: a killed driver cannot stop its workers."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_task(task: Task) -> Task:
    return _new_results_only(advance(_worker_state[0], task, _worker_state[1]))


def _new_results_only(task: Task) -> Task:
    """Return the task with only the results that the driver does not have yet."""
    return Task(task.numbers, {key: task.known[key] for key in task.made}, task.made)


# --- a Ray cluster ----------------------------------------------------------------------------------------------------
def on_ray(recipe: Recipe, tasks: Iterable[Task]) -> Iterator[Task]:
    """Run the tasks on Ray Data, in stages of one or more steps, each with its own workers, cores and GPUs.

    Tasks run in windows of `ray.window`. A window passes through the stages that its targets need, and passes again
    while a target needs an earlier stage once more, for example for another attempt.
    """
    ray, stages = _import_ray(), stages_of(recipe)
    _connect(ray, recipe.config.ray, stages)
    waiting = iter(tasks)
    while window := list(islice(waiting, recipe.config.ray.window)):
        done = dict(enumerate(window))
        while wanted := {place: want for place, task in done.items() if (want := _wanted_steps(recipe, task))}:
            pending_stages = _needed(stages, set[str]().union(*wanted.values()))
            done |= _run_stages(recipe, {place: done[place] for place in wanted}, pending_stages)
        yield from (_new_results_only(done[place]) for place in range(len(window)))


@dataclass(frozen=True)
class StagePlan:
    """Steps that run together, and their share of the cluster."""

    steps: tuple[str, ...]
    resources: StageResources


def stages_of(recipe: Recipe) -> list[StagePlan]:
    """Return the stages in order; neighbouring steps without their own resources form one stage."""
    stages: list[StagePlan] = []
    cluster = recipe.config.ray
    for step in (step for step in STEPS if step in recipe.identities):
        step_resources = cluster.resources(step)
        if step_resources is None and stages and stages[-1].resources is cluster:
            stages[-1] = StagePlan((*stages[-1].steps, step), cluster)
        else:
            stages.append(StagePlan((step,), step_resources or cluster))
    return stages


def _needed(stages: Sequence[StagePlan], wanted: set[str]) -> list[StagePlan]:
    """Return all stages from the first wanted one on; a stage that only refines is left out unless it is wanted."""
    first = next(number for number, stage in enumerate(stages) if wanted & {*stage.steps})
    return [stage for stage in stages[first:] if stage.steps != ("refine",) or "refine" in wanted]


def _import_ray() -> Any:
    try:
        importlib.import_module("ray.data")
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            "Ray is not installed: run `pip install -e '.[ray]'`, or build without --backend ray."
        ) from error


def _connect(ray: Any, cluster: Cluster, stages: Sequence[StagePlan]) -> None:
    """Connect to the cluster, or start one on this machine.

    Raises ConfigError if there is no cluster at the address, or if this machine cannot run all stages at the same time.
    """
    if not ray.is_initialized():
        try:
            ray.init(address=cluster.address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = "by RAY_ADDRESS or on this machine" if cluster.address is None else f"at {cluster.address}"
            raise ConfigError(
                f"There is no Ray cluster {where} ({' '.join(str(error).split())}): start one with `ray start --head`, "
                "or remove ray.address to start one on this machine."
            ) from error
    available = ray.cluster_resources()
    for name, kind in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        wanted = sum(getattr(stage.resources, name) * stage.resources.concurrency for stage in stages)
        if cluster.address is None and wanted > available.get(kind, 0):
            raise ConfigError(
                f"The stages of this build need {wanted:g} {kind}s and Ray has {available.get(kind, 0):g}: lower "
                f"ray.concurrency or ray.{name}, or the same keys in ray.steps."
            )


def _wanted_steps(recipe: Recipe, task: Task) -> set[str]:
    """Return the steps that the task's targets need next."""
    return {one.pending.step for one in replay_targets(recipe, task.numbers, find_in(task.known)) if one.pending}


def _run_stages(recipe: Recipe, tasks: Mapping[int, Task], stages: Sequence[StagePlan]) -> dict[int, Task]:
    """Return the tasks, by place, after one pass through `stages`."""
    data: Any = importlib.import_module("ray.data")
    data.DataContext.get_current().enable_progress_bars = False  # the build shows its own progress bar
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    rows = [{"place": place, "task": pickle.dumps(task)} for place, task in tasks.items()]
    dataset = data.from_items(rows, override_num_blocks=len(rows))
    for stage in stages:
        dataset = dataset.map_batches(
            Stage,
            fn_constructor_args=(recipe, stage.steps),
            compute=data.ActorPoolStrategy(size=stage.resources.concurrency),
            num_cpus=stage.resources.num_cpus,
            num_gpus=stage.resources.num_gpus,
            batch_size=1,
        )
    passed = {}
    for row in dataset.iter_rows():
        task = pickle.loads(row["task"])
        if isinstance(task, ImagineError):
            raise task
        passed[int(row["place"])] = task
    if missing := tasks.keys() - passed.keys():
        raise RuntimeError(f"Ray Data lost {len(missing)} of {len(tasks)} tasks")
    return passed


class Stage:
    """A Ray Data worker: loads the backends of its steps once, and runs these steps for each task that needs them."""

    def __init__(self, recipe: Recipe, steps: Sequence[str]) -> None:
        self.recipe, self.steps = recipe, steps
        self.backends = Backends(recipe.config)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Advance a batch of pickled tasks, in Ray Data's format. An ImagineError replaces the task that raised it."""
        return {"place": batch["place"], "task": [self._advance_row(task) for task in batch["task"]]}

    def _advance_row(self, row: bytes) -> bytes:
        task = pickle.loads(row)
        if isinstance(task, ImagineError):  # raised in an earlier stage
            return row
        try:
            return pickle.dumps(advance(self.recipe, task, self.backends, self.steps))
        except ImagineError as error:  # returned, not raised: Ray would wrap it in its own exception with a traceback
            return pickle.dumps(error)
