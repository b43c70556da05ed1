"""Fork test processes from one that has imported everything, so that starting and killing them takes milliseconds."""

import gc
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
# Set in one place, since there is only one fork server, and the last call replaces its list. The modules that the first
# optimiser, the first shards and the first real task import take far longer than a run.
_FORKS.set_forkserver_preload(
    [
        "tests.toy_training", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp",
        "train.tasks.adapter", "data_synth.build", "tests.toy_pairs",
    ]
)  # fmt: skip


def fork_process(target: Callable[..., None], *given: Any, daemon: bool = False) -> ForkServerProcess:
    """Start a process that calls `target(*given)`; a daemon ends with this process."""
    paths, root = os.environ.get("PYTHONPATH", "").split(os.pathsep), str(Path(__file__).parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [root, *(path for path in paths if path not in ("", root))]
    )  # inherited by the fork server
    process = _FORKS.Process(target=_begin, args=(target, given), daemon=daemon)
    process.start()
    return process


def _begin(target: Callable[..., None], given: tuple[Any, ...]) -> None:
    gc.freeze()  # a scan of the imported objects would copy their memory pages
    target(*given)
