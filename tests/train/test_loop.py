"""The training loop on a toy task: a resumed run equals an uninterrupted one, and bad batches are skipped."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from imagine.errors import ConfigError
from tests.root import ROOT
from tests.toy_training import ToyBatch, ToyTask
from train.config import Run, Stage
from train.data.order import normals
from train.loop import TrainingError
from train.run.checkpoint import load, read_provenance, read_tensors
from train.stages import run_stages

TRAIN = {"first": 1e-2, "second": 3e-3}


def one_stage(**settings: Any) -> Run:
    given = {"task": "toy", "train": TRAIN, "images": 160, "batch_size": 8, "ema": 40, "precision": "fp32", **settings}
    return Run(stages={"one": Stage.model_validate(given)}, trackers=())


def train(output: Path, run: Run, task: type[ToyTask] = ToyTask, **options: Any) -> bool:
    return run_stages(run, output, tasks={"toy": task}, **options)


def state(output: Path, stage: str = "one") -> dict[str, torch.Tensor]:
    saved = load(output / stage / "checkpoints", lambda _: True)
    assert saved is not None
    return {**saved.tensors, "images seen": torch.tensor(saved.progress.images_seen)}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def rows(output: Path, stage: str = "one") -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / stage / "metrics.jsonl").read_text().splitlines()]


def crashing_at(images_seen: int) -> type[ToyTask]:
    class Crashing(ToyTask):
        def batch(self, images_seen_now: int, size: int) -> ToyBatch:
            if images_seen_now == images_seen:
                raise RuntimeError("the machine is gone")
            return super().batch(images_seen_now, size)

    return Crashing


def ending_at(images_seen: int, number: int) -> type[ToyTask]:
    class Ending(ToyTask):
        def batch(self, images_seen_now: int, size: int) -> ToyBatch:
            if images_seen_now == images_seen:
                os.kill(os.getpid(), number)
            return super().batch(images_seen_now, size)

    return Ending


@pytest.mark.parametrize(
    ("extra", "image"),
    [
        ({}, False),
        ({"accumulation": 2, "prefetch": 2, "schedule": "cosine", "ema": 0}, False),
        ({"channels_last": True}, True),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_run_bit_for_bit(
    tmp_path: Path, extra: dict[str, Any], image: bool
) -> None:
    settings = {"dropout": 0.2, "image": image}
    run = one_stage(settings=settings, checkpoint_every_seconds=0, report_every_seconds=0, **extra)
    train(tmp_path / "straight", run)
    for crash in (40, 80, 136):
        with pytest.raises(RuntimeError, match="gone"):
            train(tmp_path / "resumed", run, crashing_at(crash))
        assert int(state(tmp_path / "resumed")["images seen"]) == crash
    train(tmp_path / "resumed", run)
    straight = state(tmp_path / "straight")
    assert_same(straight, state(tmp_path / "resumed"))
    assert any(name.startswith("optimiser/exp_avg_sq/") for name in straight)
    assert any(name.startswith("average/") for name in straight) == ("ema" not in extra)
    finals = [read_tensors(tmp_path / name / "one" / "weights.safetensors")[0] for name in ("straight", "resumed")]
    assert_same(*finals)
    pairs = zip(rows(tmp_path / "straight"), rows(tmp_path / "resumed"), strict=True)
    assert all(left.get("loss") == right.get("loss") for left, right in pairs)


def test_rows_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    run = one_stage(report_every_seconds=0, validate_every=40)
    with pytest.raises(RuntimeError):
        train(tmp_path, run, crashing_at(120))  # no checkpoint yet: the next call starts again
    assert rows(tmp_path)[-1]["images_seen"] == 120
    with (tmp_path / "one" / "metrics.jsonl").open("a") as file:
        file.write('{"images_seen": 1')
    train(tmp_path, run)
    seen = [row["images_seen"] for row in rows(tmp_path) if "loss" in row]
    assert seen == list(range(8, 161, 8))
    assert [row["images_seen"] for row in rows(tmp_path) if "validate/error" in row] == [40, 80, 120, 160]
    names = sorted(path.name for path in (tmp_path / "one" / "samples").iterdir())
    assert names == [f"{seen:09d}-pictures.png" for seen in (40, 80, 120, 160)]
    assert {"lr", "lr/first", "images_per_second", "largest", "skipped", "gradient_norm"} <= rows(tmp_path)[0].keys()


def test_a_killed_process_leaves_a_run_that_ends_the_same(tmp_path: Path) -> None:
    text = "trackers: []\nstages: {one: {task: toy, train: {both: 1e-2}, images: 400, batch_size: 8, ema: 50, "
    text += "precision: fp32, checkpoint_every_seconds: 0, settings: {pause: PAUSE}}}"
    for name, pause in (("slow", "0.05"), ("quick", "0.0")):
        (tmp_path / f"{name}.yaml").write_text(text.replace("PAUSE", pause))
    command = [sys.executable, str(ROOT / "tests" / "toy_training.py"), str(tmp_path / "slow.yaml")]
    setting = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--output", str(tmp_path / "killed")], env=setting, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed" / "one" / "checkpoints"
    while process.poll() is None and len(list(checkpoints.glob("*.safetensors"))) < 2:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    from train.config import load_run

    assert not (tmp_path / "killed" / "one" / "done.json").exists()
    train(tmp_path / "killed", load_run(tmp_path / "quick.yaml"), resume=True)
    train(tmp_path / "straight", load_run(tmp_path / "quick.yaml"))
    assert_same(state(tmp_path / "killed"), state(tmp_path / "straight"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_cleanly_with_a_checkpoint(tmp_path: Path, number: int) -> None:
    run, before = one_stage(), signal.getsignal(number)
    assert not train(tmp_path / "stopped", run, ending_at(80, number))
    assert int(state(tmp_path / "stopped")["images seen"]) == 88 and signal.getsignal(number) is before
    assert (tmp_path / "stopped" / "one" / "export" / "head.json").exists()
    assert not (tmp_path / "stopped" / "one" / "done.json").exists()
    assert train(tmp_path / "stopped", run) and train(tmp_path / "straight", run)
    assert_same(state(tmp_path / "stopped"), state(tmp_path / "straight"))


def test_max_minutes_stops_the_run_cleanly(tmp_path: Path) -> None:
    run = one_stage(images=8 * 10**6, settings={"pause": 0.005})
    assert not train(tmp_path, run, max_minutes=1.5 / 60)
    images_seen = int(state(tmp_path)["images seen"])
    assert 0 < images_seen < 8 * 10**6
    assert not train(tmp_path, run, max_minutes=1.5 / 60)
    assert int(state(tmp_path)["images seen"]) > images_seen


def test_a_bad_batch_is_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert train(tmp_path, one_stage(settings={"bad": [20, 61]}, report_every_seconds=0))
    assert "not finite" in caplog.text
    skipped = [row["skipped"] for row in rows(tmp_path) if "skipped" in row]
    assert skipped[0] == 0 and skipped[-1] == 2
    assert all(number == number for row in rows(tmp_path) for number in row.values())
    assert all(tensor.isfinite().all() for tensor in state(tmp_path).values())


def test_three_bad_batches_in_a_row_are_a_training_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"3 batches in a row .* loss or gradient is not finite. .* learning rates"):
        train(tmp_path, one_stage(settings={"bad": [80, 88, 96]}))


@pytest.mark.parametrize("extra", [{}, {"prefetch": 2}, {"accumulation": 4}])
def test_a_step_with_a_bad_record_is_skipped(
    tmp_path: Path, extra: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run = one_stage(settings={"broken": [1, 20, 23, 61]}, report_every_seconds=0, **extra)
    assert train(tmp_path, run)
    lines = [record.getMessage() for record in caplog.records if "skipped the batch" in record.getMessage()]
    assert len(lines) == 3 and "\n" not in "".join(lines)
    assert lines[1].startswith("one: skipped the batch before image 24: Record 20 cannot be used: it is torn")
    assert "first_batch.png is not written" in caplog.text
    skipped = {row["images_seen"]: row["skipped"] for row in rows(tmp_path) if "skipped" in row}
    assert skipped[16] == 1 and skipped[24] == 2 and skipped[160] == 3
    assert {row["images_seen"] for row in rows(tmp_path) if "loss" in row} == set(range(16, 161, 8)) - {24, 64}
    train(tmp_path / "nan", one_stage(settings={"bad": [1, 20, 23, 61]}, **extra))
    assert_same(state(tmp_path), state(tmp_path / "nan"))  # skipped like a batch with a loss that is not finite


def test_three_bad_records_in_a_row_are_a_training_error(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"stopped at 104 images because 3 .* Record 96 .*torn. Check the stage's data"
    ):
        train(tmp_path, one_stage(settings={"broken": [80, 88, 96]}, prefetch=2))


SCORES = {40: 0.5, 80: 0.3, 120: 0.4, 160: 0.35}


def best(output: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    path = output / "one" / "best.safetensors"
    return read_tensors(path)[0], read_provenance(path)


def test_the_best_weights_are_those_of_the_best_validation(tmp_path: Path) -> None:
    constant: dict[str, Any] = {"schedule": "constant", "settings": {"scores": SCORES}}
    train(tmp_path / "short", one_stage(images=80, **constant))
    train(tmp_path / "long", one_stage(validate_every=40, best_by="score", **constant))
    tensors, note = best(tmp_path / "long")
    assert_same(tensors, read_tensors(tmp_path / "short" / "one" / "weights.safetensors")[0])
    assert note == {"stage": "one", "images_seen": 80, "best_by": "score", "best_is": "lowest", "value": 0.3}
    exports = [json.loads((tmp_path / "long" / "one" / name / "head.json").read_text()) for name in ("best", "export")]
    assert exports[0] == tensors["head.weight"].tolist() != exports[1]


@pytest.mark.parametrize("seconds", [0, 1e9])
def test_the_best_weights_survive_any_stop(tmp_path: Path, seconds: float) -> None:
    """The weights at 80 of 160 images are best.

    With a checkpoint only at the end, a restart finds a best.safetensors with more images seen than its own.
    """
    extra: dict[str, Any] = {"validate_every": 40, "best_by": "score", "checkpoint_every_seconds": seconds}
    run = one_stage(settings={"scores": SCORES}, **extra)
    train(tmp_path / "straight", run)
    for crash in (40, 80, 88, 128):
        with pytest.raises(RuntimeError, match="gone"):
            train(tmp_path / "resumed", run, crashing_at(crash))
    train(tmp_path / "resumed", run)
    assert_same(best(tmp_path / "resumed")[0], best(tmp_path / "straight")[0])
    assert best(tmp_path / "resumed")[1] == best(tmp_path / "straight")[1]
    checkpoints = tmp_path / "resumed" / "one" / "checkpoints"
    assert {path.stem for path in checkpoints.glob("*.best")} == {
        path.name.split(".")[0] for path in checkpoints.glob("*.safetensors")
    }


def test_the_best_weights_of_an_abandoned_continuation_are_deleted(tmp_path: Path) -> None:
    """The first run was best after its rate had fallen; the longer run resumes from before that."""
    extra: dict[str, Any] = {"validate_every": 40, "best_by": "score", "best_is": "highest"}
    train(tmp_path / "twice", one_stage(images=80, settings={"scores": {40: 2.0, 80: 9.0}}, **extra))
    assert best(tmp_path / "twice")[1]["images_seen"] == 80
    longer = one_stage(images=240, settings={"scores": {40: 2.0, 120: 1.5}}, **extra)
    train(tmp_path / "twice", longer, resume=True)
    train(tmp_path / "once", longer)
    assert best(tmp_path / "twice")[1] == best(tmp_path / "once")[1] and best(tmp_path / "once")[1]["images_seen"] == 40
    assert_same(best(tmp_path / "twice")[0], best(tmp_path / "once")[0])


def test_a_value_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    scores = {40: float("nan"), 80: 0.9, 120: float("-inf"), 160: float("nan")}
    train(tmp_path, one_stage(validate_every=40, best_by="score", settings={"scores": scores}))
    assert best(tmp_path)[1]["images_seen"] == 80


def test_an_unknown_best_by_is_an_error_that_lists_the_valid_names(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"no validation number 'eror' \(did you mean error\?\); valid: error, score"
    ):
        train(tmp_path, one_stage(validate_every=40, best_by="eror"))
    assert train(tmp_path, one_stage(validate_every=40, best_by="error"))  # corrected, it resumes without --resume
    assert best(tmp_path)[1]["best_by"] == "error"


def tracked(output: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tracking" / "imagine"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_receives_the_numbers_of_metrics_jsonl(tmp_path: Path) -> None:
    run = one_stage(report_every_seconds=0, validate_every=80)
    train(tmp_path, run.model_copy(update={"trackers": ("tensorboard",)}))
    found, written = tracked(tmp_path), rows(tmp_path)
    for name in ("loss", "lr/first", "skipped", "validate/error"):
        expected = [(row["images_seen"], row[name]) for row in written if name in row]
        assert [step for step, _ in found[f"one/{name}"]] == [step for step, _ in expected]
        assert [v for _, v in found[f"one/{name}"]] == pytest.approx([v for _, v in expected])


def test_a_missing_tracker_is_a_warning_and_the_run_works_without_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    trackers = ("tensorboard", "wandb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *given: name not in trackers and find(name, *given))
    assert train(tmp_path, one_stage(images=16).model_copy(update={"trackers": trackers}))
    lines = [record.getMessage() for record in caplog.records if "tracker" in record.getMessage()]
    assert len(lines) == 2 and "`pip install tensorboard`" in lines[0] and "`pip install wandb`" in lines[1]
    assert rows(tmp_path) and not (tmp_path / "tracking").exists()


@pytest.mark.parametrize("optimiser", ["adamw", "adamw8bit"])
def test_the_eight_bit_optimiser_trains_and_resumes_like_the_others(tmp_path: Path, optimiser: str) -> None:
    if optimiser == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    wide = {"width": 2048}  # large enough for 8-bit states in bitsandbytes
    often: dict[str, Any] = {"checkpoint_every_seconds": 0, "report_every_seconds": 0}
    run = one_stage(optimiser=optimiser, settings=wide, train={"both": 1e-3}, **often)
    train(tmp_path / "straight", run)
    with pytest.raises(RuntimeError, match="gone"):
        train(tmp_path / "resumed", run, crashing_at(80))
    train(tmp_path / "resumed", run)
    straight = state(tmp_path / "straight")
    assert_same(straight, state(tmp_path / "resumed"))
    bytes_ = [name for name, tensor in straight.items() if tensor.dtype == torch.uint8]
    assert len(bytes_) == (4 if optimiser == "adamw8bit" else 0)
    losses = [row["loss"] for row in rows(tmp_path / "straight") if "loss" in row]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_eight_bit_optimiser_without_bitsandbytes_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match="`pip install bitsandbytes`, or use optimiser adamw"):
        train(tmp_path, one_stage(optimiser="adamw8bit"))


def test_a_setting_that_is_newer_than_the_run_does_not_count_as_changed(tmp_path: Path) -> None:
    import yaml

    assert train(tmp_path, one_stage(images=16))
    path = tmp_path / "one" / "stage.yaml"
    older = {name: value for name, value in yaml.safe_load(path.read_text()).items() if name != "optimiser"}
    path.write_text(yaml.safe_dump(older))
    assert train(tmp_path, one_stage(images=16))
    path.write_text(yaml.safe_dump({**older, "optimiser": "adamw8bit"}))
    with pytest.raises(ConfigError, match="optimiser adamw8bit, not adamw"):
        train(tmp_path, one_stage(images=16))


def test_accumulation_gives_the_same_weights(tmp_path: Path) -> None:
    for name, micro_batch_count in (("whole", 1), ("accumulated", 4)):
        train(tmp_path / name, one_stage(accumulation=micro_batch_count))
    whole, accumulated = state(tmp_path / "whole"), state(tmp_path / "accumulated")
    torch.testing.assert_close(whole["weights/head.weight"], accumulated["weights/head.weight"], rtol=1e-4, atol=1e-5)


def test_more_images_equal_a_run_that_had_them_from_the_start(tmp_path: Path) -> None:
    assert train(tmp_path / "twice", one_stage(images=80))
    assert train(tmp_path / "twice", one_stage(images=240), resume=True)
    assert train(tmp_path / "once", one_stage(images=240))
    assert_same(state(tmp_path / "twice"), state(tmp_path / "once"))
    assert [row["images_seen"] for row in rows(tmp_path / "twice") if "validate/error" in row] == [240]


def test_a_stage_starts_from_the_weights_of_an_earlier_stage(tmp_path: Path) -> None:
    one = one_stage().stages["one"]
    two = one.model_copy(update={"start_from": ("one",), "train": {"second": 0.0}, "weight_decay": 0.0, "images": 8})
    run = Run(stages={"one": one, "two": two}, trackers=())
    with pytest.raises(ConfigError, match="train one first"):
        train(tmp_path, run, only=["two"])
    assert train(tmp_path, run)
    left, right = state(tmp_path, "one"), read_tensors(tmp_path / "two" / "weights.safetensors")[0]
    assert set(right) == {"head.weight", "head.bias"}  # only trained modules are saved
    torch.testing.assert_close(left["average/head.weight"], right["head.weight"], rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "two" / "done.json").read_text())["from"] == {"one": 160}


def test_no_stage_starts_from_one_that_missed_its_gate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = one_stage(settings={"scores": {160: 0.5}}, gates={"score": 0.7}).stages["one"]
    two = one.model_copy(update={"start_from": ("one",), "train": {"second": 0.0}, "images": 8, "gates": {}})
    run = Run(stages={"one": one, "two": two}, trackers=())
    missed = r"Stage one reached score 0\.5, below its gate of 0\.7: raise its images and train it further, or lower"
    with pytest.raises(ConfigError, match=missed):
        train(tmp_path, run)
    assert "below its gate of 0.7" in caplog.text
    assert state(tmp_path)["images seen"] == 160  # nothing that was finished is lost
    lower = run.model_copy(update={"stages": {"one": one.model_copy(update={"gates": {"score": 0.5}}), "two": two}})
    assert train(tmp_path, lower)  # without `resume`, because a gate does not change the weights
    with pytest.raises(ConfigError, match="no validation number 'scor'"):
        train(tmp_path / "other", one_stage(gates={"scor": 1.0}))


def test_fresh_modules_start_from_random_weights(tmp_path: Path) -> None:
    one = one_stage().stages["one"]
    still = {"train": {"second": 0.0}, "weight_decay": 0.0, "images": 8, "start_from": ("one",)}
    fresh = {"two": (), "three": ("head",), "four": ("head.w*",)}
    stages = {name: one.model_copy(update={**still, "fresh": some}) for name, some in fresh.items()}
    assert train(tmp_path, Run(stages={"one": one, **stages}, trackers=()))
    inherited, whole, part = (read_tensors(tmp_path / name / "weights.safetensors")[0] for name in fresh)
    assert inherited.keys() == whole.keys() == part.keys()
    differs = {
        name: [not torch.equal(inherited[f"head.{name}"], some[f"head.{name}"]) for some in (whole, part)]
        for name in ("weight", "bias")
    }
    assert differs == {"weight": [True, True], "bias": [True, False]}
    wrong = Run(stages={"one": one.model_copy(update={"fresh": ("hat",)})}, trackers=())
    with pytest.raises(ConfigError, match=r"one, fresh: there is no module 'hat'.*valid: body, head"):
        train(tmp_path / "wrong", wrong)
    wrong = Run(stages={"one": one.model_copy(update={"fresh": ("head.hat.*",)})}, trackers=())
    with pytest.raises(ConfigError, match=r"one, fresh: no tensor of the module head matches hat"):
        train(tmp_path / "pattern", wrong)


def test_a_folder_with_another_run_needs_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "run", one_stage(images=16))
    written = (tmp_path / "run" / "one" / "weights.safetensors").stat().st_mtime_ns
    assert train(tmp_path / "run", one_stage(images=16, validate_every=8))  # already done; validate_every may change
    assert (tmp_path / "run" / "one" / "weights.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="batch_size 8, not 4; add --resume"):
        train(tmp_path / "run", one_stage(images=16, batch_size=4))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        train(tmp_path / "full", one_stage())
    assert train(tmp_path / "run", one_stage(images=32, train={"both": 1e-3}), resume=True)
    assert "resuming with train.both 0.001 instead of None" in caplog.text
    assert train(tmp_path / "run", one_stage(images=32, seed=9, train={"both": 1e-3}), resume=True)
    assert "already done with seed 0, and not trained again" in caplog.text


def test_a_run_that_was_killed_while_writing_its_first_file_can_be_started_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.yaml.draft").write_text("stages:\n  one:\n")
    assert train(tmp_path / "run", one_stage(images=8))
    assert not (tmp_path / "run" / ".run.yaml.draft").exists()


def first_batch(output: Path, stage: str = "one") -> list[list[float]]:
    batch: list[list[float]] = json.loads((output / stage / "first_batch.png").read_text())
    return batch


def test_every_stage_has_its_own_random_numbers(tmp_path: Path) -> None:
    one = one_stage(images=8).stages["one"]
    assert train(tmp_path / "two", Run(stages={"one": one, "two": one}, trackers=()))
    assert first_batch(tmp_path / "two", "one") != first_batch(tmp_path / "two", "two")
    left, right = (state(tmp_path / "two", stage) for stage in ("one", "two"))
    assert not torch.equal(left["weights/head.weight"], right["weights/head.weight"])
    assert train(tmp_path / "again", Run(stages={"one": one, "two": one}, trackers=()))
    assert_same(state(tmp_path / "two", "two"), state(tmp_path / "again", "two"))


def test_a_stage_started_by_an_earlier_version_keeps_its_random_numbers(tmp_path: Path) -> None:
    import yaml

    run, path = one_stage(settings={"dropout": 0.2}, checkpoint_every_seconds=0), Path("one") / "stage.yaml"
    for name, crashes in (("straight", (0,)), ("resumed", (0, 80))):
        for crash in crashes:
            with pytest.raises(RuntimeError, match="gone"):
                train(tmp_path / name, run, crashing_at(crash))
            described = yaml.safe_load((tmp_path / name / path).read_text())
            assert described.pop("numbering") == (1 if crash else 2)
            (tmp_path / name / path).write_text(yaml.safe_dump(described))
        assert train(tmp_path / name, run)
    assert first_batch(tmp_path / "straight") == normals(0, "x", 0, 8, (3,)).tolist()
    assert_same(state(tmp_path / "straight"), state(tmp_path / "resumed"))


def test_the_faster_precision_is_measured_once_for_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ["bf16", "fp32", "fp32", "fp32"]  # as on a machine that is busy at times
    monkeypatch.setattr("train.loop.faster_precision", lambda _: (answers.pop(0), "measured"))
    one = one_stage(images=16, precision="auto").stages["one"]
    run = Run(stages={"one": one, "two": one}, trackers=())
    with pytest.raises(RuntimeError, match="gone"):
        train(tmp_path, run, crashing_at(8))  # no checkpoint yet
    assert train(tmp_path, run)
    for stage in ("one", "two"):
        saved = load(tmp_path / stage / "checkpoints", lambda _: True)
        assert saved is not None and saved.precision == "bf16"
    assert json.loads((tmp_path / "precision.json").read_text()) == {
        "cpu": {"precision": "bf16", "measured": "measured"}
    }


def test_a_full_disk_is_one_line_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.__main__ import WRONG, main

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: no space left on device")

    monkeypatch.setattr("train.run.checkpoint.save_file", full)
    config = tmp_path / "run.yaml"
    config.write_text("trackers: []\nstages: {one: {task: toy, train: {both: 1e-2}, images: 8, batch_size: 8}}")
    assert main([str(config), "--output", str(tmp_path / "run")], {"toy": ToyTask}) == WRONG
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "A file of the run" in line]
    assert "safetensors cannot be written" in sentence and "no space left" in sentence and "it resumes" in sentence
    monkeypatch.undo()
    assert main([str(config), "--output", str(tmp_path / "run")], {"toy": ToyTask}) == 0


@pytest.mark.parametrize("muon", [((), ("first",)), (("first", "second"), ()), (("first",), ("second",))])
def test_another_optimiser_starts_with_an_empty_state(
    tmp_path: Path, muon: tuple[tuple[str, ...], tuple[str, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    before, after = (one_stage(muon=parts, checkpoint_every_seconds=0) for parts in muon)
    with pytest.raises(RuntimeError, match="gone"):
        train(tmp_path, before, crashing_at(80))
    assert train(tmp_path, after, resume=True)
    others = {"first", "second"} if muon == (("first",), ("second",)) else set(muon[0] + muon[1])
    assert f"the optimiser state of {len(others)} of 4 parameters is reset" in caplog.text
    weights = {"first": "body.0.weight", "second": "head.weight"}
    names = state(tmp_path).keys()
    for part, path in weights.items():
        assert (f"optimiser/momentum/{path}" in names) == (part in muon[1])
        assert (f"optimiser/exp_avg/{path}" in names) == (part not in muon[1])
    assert int(state(tmp_path)["optimiser/step/body.0.bias"]) == 20  # AdamW always trains gains and biases
    fresh = "second" if "second" in others else "first"
    if fresh not in muon[1]:
        assert int(state(tmp_path)[f"optimiser/step/{weights[fresh]}"]) == 10
