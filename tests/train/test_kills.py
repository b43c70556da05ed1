"""SIGKILL at any moment: a run that is restarted after each kill ends with the weights of an uninterrupted run."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.toy_training import start_training, stderr_of
from train.__main__ import DONE
from train.config import Run, Stage
from train.run.checkpoint import read_tensors

KILLS = 20
STAGES = ("one", "two")


def two_stages() -> Run:
    """Return a run that writes a checkpoint after every step, so that most kills hit a write."""
    first = Stage.model_validate({
        "task": "toy", "train": {"both": 1e-2}, "images": 160, "batch_size": 8, "ema": 40, "precision": "fp32",
        "checkpoint_every_seconds": 0, "validate_every": 40, "best_by": "error",
    })  # fmt: skip
    second = first.model_copy(update={"start_from": ("one",), "train": {"second": 3e-3}, "schedule": "cosine"})
    return Run(stages={"one": first, "two": second}, trackers=())


def left_behind(output: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of both stages' checkpoints, final weights and best weights, by file and name."""
    found: dict[str, torch.Tensor] = {}
    for stage in STAGES:
        files = ("weights.safetensors", "best.safetensors", "checkpoints/000000000160.safetensors")
        for file in files:
            tensors = read_tensors(output / stage / file)[0]
            found |= {f"{stage}/{file}/{name}": tensor for name, tensor in tensors.items()}
    return found


def assert_same(left: Path, right: Path) -> None:
    one, other = left_behind(left), left_behind(right)
    assert one.keys() == other.keys() and len(one) > 40
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    exports = [[(output / stage / "export" / "head.json").read_text() for stage in STAGES] for output in (left, right)]
    assert exports[0] == exports[1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An uninterrupted run, and its duration in seconds."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    warm = start_training(two_stages(), output.with_name("warm"))  # the first start waits for the fork server's imports
    warm.join()
    began = time.monotonic()
    process = start_training(two_stages(), output)
    process.join()
    assert process.exitcode == DONE
    return output, time.monotonic() - began


def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path, straight: tuple[Path, float]) -> None:
    output, seconds = straight
    dice, kills, runs = random.Random(7), 0, 0
    while kills < KILLS or not (tmp_path / str(runs) / "two" / "done.json").exists():
        process = start_training(two_stages(), tmp_path / str(runs))
        longest = seconds / dice.choice((1, 4))  # often short, so that one run is killed many times
        process.join(dice.uniform(0, longest) if kills < KILLS else None)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            continue
        assert process.exitcode == DONE, stderr_of(tmp_path / str(runs))
        assert_same(output, tmp_path / str(runs))
        runs += kills < KILLS  # the run finished before the kill: the next kills need a new run
    assert kills >= KILLS
    assert_same(output, tmp_path / str(runs))


def test_kills_while_a_checkpoint_is_written_change_nothing(tmp_path: Path, straight: tuple[Path, float]) -> None:
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "one" / "checkpoints"
    half_written = 0
    for _ in range(200):
        process = start_training(two_stages(), run)
        while process.is_alive() and not list(checkpoints.glob(".*.safetensors.draft")):
            pass
        process.kill()
        process.join()
        half_written += bool(list(checkpoints.glob(".*.safetensors.draft")))
        if half_written == 3 or process.exitcode == DONE:
            break
    assert half_written == 3
    process = start_training(two_stages(), run)
    process.join()
    assert process.exitcode == DONE
    assert_same(straight[0], run)
