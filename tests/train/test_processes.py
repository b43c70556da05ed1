"""Several processes on one machine: the same numbers as with one, with DDP and FSDP, stops and bad records."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy_training import run_in_processes, start_training, stderr_of
from train.__main__ import DONE, STOPPED, WRONG
from train.config import Run, Stage
from train.run.checkpoint import load, read_provenance, read_tensors

SHARDS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
BLOCKS = {**SHARDS, "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Linear"}


def one_stage(**settings: Any) -> Run:
    given: dict[str, Any] = {"task": "toy", "train": {"first": 1e-2, "second": 3e-3}, "images": 160, "batch_size": 8}
    given |= {"ema": 40, "precision": "fp32", "report_every_seconds": 0, **settings}
    return Run(stages={"one": Stage.model_validate(given)}, trackers=())


def alone(run: Run, output: Path) -> int | None:
    process = start_training(run, output)
    process.join()
    return process.exitcode


def state(output: Path) -> dict[str, torch.Tensor]:
    saved = load(output / "one" / "checkpoints", lambda _: True)
    assert saved is not None
    return {**saved.tensors, "images seen": torch.tensor(saved.progress.images_seen)}


def rows(output: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (output / "one" / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in lines if name in row]


def assert_close(left: Path, right: Path, tolerance: float) -> None:
    """Compare the losses of all steps, validations, checkpoints, final and best weights, and exports."""
    for name in ("loss", "gradient_norm", "validate/error"):
        assert len(rows(left, name)) > 3
        torch.testing.assert_close(rows(left, name), rows(right, name), rtol=0, atol=tolerance)
    torch.testing.assert_close(state(left), state(right), rtol=0, atol=tolerance)
    for name in ("weights.safetensors", "best.safetensors"):
        own, other = (read_tensors(output / "one" / name)[0] for output in (left, right))
        torch.testing.assert_close(own, other, rtol=0, atol=tolerance)
    exports = [json.loads((output / "one" / "export" / "head.json").read_text()) for output in (left, right)]
    torch.testing.assert_close(torch.tensor(exports[0]), torch.tensor(exports[1]), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("extra", "environment", "tolerance"),
    [
        ({}, {}, 1e-5),
        ({"accumulation": 2, "prefetch": 2}, {}, 1e-5),
        ({"muon": ["first", "second"], "settings": {"width": 16}}, {}, 1e-5),
        ({"accumulation": 2}, SHARDS, 1e-4),
        (
            {"muon": ["first"], "settings": {"width": 16}},
            SHARDS,
            1e-4,
        ),  # a long matrix, so that Muon uses its Gram matrix
        ({}, BLOCKS, 1e-4),
    ],
    ids=["DDP", "DDP with accumulation", "DDP with muon", "FSDP with accumulation", "FSDP with muon", "FSDP by block"],
)
def test_two_processes_take_the_same_steps_as_one(
    tmp_path: Path, extra: dict[str, Any], environment: dict[str, str], tolerance: float
) -> None:
    run = one_stage(validate_every=40, best_by="error", **extra)
    assert run_in_processes(run, tmp_path / "two", environment) == [DONE, DONE]
    assert alone(run, tmp_path / "one") == DONE
    assert_close(tmp_path / "one", tmp_path / "two", tolerance)
    assert read_provenance(tmp_path / "two" / "one" / "best.safetensors")["stage"] == "one"
    assert len(list((tmp_path / "two" / "one" / "samples").iterdir())) == 4


def test_a_signal_to_one_process_stops_both_and_the_resumed_run_ends_the_same(tmp_path: Path) -> None:
    run = one_stage(settings={"end_at": (84, 1)})  # only the second process gets the signal
    quiet = one_stage()
    assert run_in_processes(run, tmp_path / "stopped") == [STOPPED, STOPPED]
    assert int(state(tmp_path / "stopped")["images seen"]) == 88
    assert run_in_processes(run, tmp_path / "stopped") == [DONE, DONE]
    assert run_in_processes(quiet, tmp_path / "straight") == [DONE, DONE]
    stopped, straight = state(tmp_path / "stopped"), state(tmp_path / "straight")
    assert stopped.keys() == straight.keys()
    assert [name for name in stopped if not torch.equal(stopped[name], straight[name])] == []


@pytest.mark.parametrize("again", [2, 1])
def test_any_number_of_processes_can_resume_a_sharded_run(tmp_path: Path, again: int) -> None:
    run = one_stage(validate_every=40, best_by="error", settings={"end_at": (84, 1)})
    assert run_in_processes(run, tmp_path / "stopped", SHARDS) == [STOPPED, STOPPED]
    saved = state(tmp_path / "stopped")
    assert int(saved["images seen"]) == 88 and saved["weights/body.0.weight"].shape == (4, 3)
    assert saved["optimiser/exp_avg/body.0.weight"].shape == saved["average/body.0.weight"].shape == (4, 3)
    ended = run_in_processes(run, tmp_path / "stopped", SHARDS) if again == 2 else [alone(run, tmp_path / "stopped")]
    assert ended == [DONE] * again
    assert alone(one_stage(validate_every=40, best_by="error"), tmp_path / "straight") == DONE
    assert_close(tmp_path / "straight", tmp_path / "stopped", 1e-4)


def test_a_bad_record_in_one_process_skips_the_step_in_both(tmp_path: Path) -> None:
    """In the batch at 16, images 20 to 23 belong to the second process; the batch at 64 is bad in the first."""
    run = one_stage(validate_every=40, best_by="error", settings={"broken": [21, 64], "bad": [110]})
    assert run_in_processes(run, tmp_path / "two") == [DONE, DONE]
    assert "skipped the batch before image 24: Record 21 cannot be used: it is torn" in stderr_of(tmp_path / "two")
    assert "skipped the batch" not in stderr_of(tmp_path / "two", rank=1)
    assert alone(run, tmp_path / "one") == DONE
    assert rows(tmp_path / "two", "skipped")[-1] == 3
    assert_close(tmp_path / "one", tmp_path / "two", 1e-5)
    hopeless = one_stage(settings={"broken": [20, 28, 36]})
    assert run_in_processes(hopeless, tmp_path / "hopeless") == [WRONG, WRONG]


def test_the_main_process_makes_files_before_the_others_read_them(tmp_path: Path) -> None:
    """The toy task's constructor and its `prepare` slowly make folders that must not be made twice."""
    run = one_stage(images=16, settings={"careful": True})
    assert run_in_processes(run, tmp_path) == [DONE, DONE]
    assert (tmp_path / "one" / "cache" / "ready").exists() and (tmp_path / "one" / "first_batch.png").exists()


@pytest.mark.parametrize(
    ("extra", "environment", "sentence"),
    [
        ({}, {**SHARDS, "FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        (
            {"batch_size": 9},
            {},
            "batch_size 9 does not divide into 1 micro-batches (accumulation) on each of 2 processes",
        ),
        ({}, {"ACCELERATE_USE_CPU": "false"}, "set ACCELERATE_USE_CPU=true"),
    ],
    ids=["old FSDP", "odd batch", "no device"],
)
def test_unsupported_settings_are_errors_in_every_process(
    tmp_path: Path, extra: dict[str, Any], environment: dict[str, str], sentence: str
) -> None:
    if "ACCELERATE_USE_CPU" in environment and torch.cuda.is_available():
        pytest.skip("this test needs a machine without a GPU")
    assert run_in_processes(one_stage(**extra), tmp_path / "out", environment) == [WRONG, WRONG]
    assert sentence in stderr_of(tmp_path / "out") and not (tmp_path / "out").exists()


def test_a_hanging_step_times_out_and_a_long_validation_does_not(tmp_path: Path) -> None:
    """A process sleeps longer than the step timeout: first within a step, then while the other one waits for it."""
    timeout = {"TOY_STEP_TIMEOUT": "1"}
    hanging = one_stage(images=24, settings={"hang_at": (12, 1)})
    assert not {DONE, STOPPED, WRONG} & set(run_in_processes(hanging, tmp_path / "hanging", timeout))
    busy = one_stage(images=24, settings={"hang_at": (10**9, 0)}, validate_every=16)
    assert run_in_processes(busy, tmp_path / "busy", timeout) == [DONE, DONE]


def test_a_signal_before_the_first_step_stops_all_processes(tmp_path: Path) -> None:
    """The main process gets the signal while it fills its caches; the other one waits for it and stops as well."""
    run = one_stage(images=16, settings={"rows": 600, "end_in_row": 300})
    assert run_in_processes(run, tmp_path / "out") == [STOPPED, STOPPED]
    assert rows_kept(tmp_path / "out") == 512 and not (tmp_path / "out" / "one" / "checkpoints").exists()
    assert run_in_processes(run, tmp_path / "out") == [DONE, DONE]
    assert rows_kept(tmp_path / "out") == 600


def rows_kept(output: Path) -> int:
    (state,) = (output / "one" / "cache").glob("rows*.json")
    return int(json.loads(state.read_text())["rows"])
