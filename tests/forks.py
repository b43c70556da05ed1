"""Processes of tests, forked from one that has imported everything: starting and killing them takes milliseconds."""

import gc
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
# In one place, since there is one fork server, which imports only what it was told last. What the first optimiser,
# the first shards and the first real task import takes far longer than a run.
_FORKS.set_forkserver_preload(
    [
        "tests.toy_training", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp",
        "train.tasks.adapter", "data_synth.build", "tests.toy_pairs",
    ]
)  # fmt: skip


def fork_process(target: Callable[..., None], *given: Any, daemon: bool = False) -> ForkServerProcess:
    """A process that does `target(*given)`; a daemon ends with this one."""
    paths, root = os.environ.get("PYTHONPATH", "").split(os.pathsep), str(Path(__file__).parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *(path for path in paths if path not in ("", root))])  # for it
    process = _FORKS.Process(target=_begin, args=(target, given), daemon=daemon)
    process.start()
    return process


def _begin(target: Callable[..., None], given: tuple[Any, ...]) -> None:
    gc.freeze()  # what the fork server imported is no garbage: nobody need look, in as many copied pages
    target(*given)
