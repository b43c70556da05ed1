"""Trackers: W&B receives every row of every stage and of every start of a run; trackers receive the pictures."""

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.toy_training import ToyBatch, ToyTask
from train.config import Run, Stage
from train.stages import run_stages


class Crashing(ToyTask):
    """Raises an error once, in the second stage, as if the machine crashed."""

    crashed = False

    def batch(self, images_seen: int, size: int) -> ToyBatch:
        if self.context.name == "two" and images_seen == 24 and not Crashing.crashed:
            Crashing.crashed = True
            raise RuntimeError("the machine is gone")
        return super().batch(images_seen, size)


class FakeRun:
    """A W&B run as its server stores it: a row whose step is not later than the last one is dropped."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.axes: dict[str, str] = {}
        self.step = -1

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        if step_metric is not None:
            self.axes[name] = step_metric

    def log(self, row: dict[str, Any], step: int | None = None) -> None:
        if step is not None and step <= self.step:
            return
        self.step = self.step + 1 if step is None else step
        self.rows.append(row)

    def finish(self) -> None:
        pass


class FakeWandb(types.ModuleType):
    """A stand-in for the package `wandb`, with one FakeRun per id."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.runs: dict[str, FakeRun] = {}
        self.given: list[dict[str, Any]] = []

    def init(self, **given: Any) -> FakeRun:
        self.given.append(given)
        known = self.runs.get(given["id"]) if given["resume"] == "allow" else None
        return self.runs.setdefault(given["id"], known or FakeRun())

    @staticmethod
    def Image(picture: Any) -> Any:
        return picture


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    monkeypatch.setitem(sys.modules, "wandb", made := FakeWandb())
    return made


def two_stages(tracker: str) -> Run:
    given = {"task": "toy", "train": {"both": 1e-2}, "images": 32, "batch_size": 8, "report_every_seconds": 0}
    stage = Stage.model_validate({**given, "precision": "fp32", "validate_every": 16})
    return Run(stages={"one": stage, "two": stage}, trackers=(tracker,))  # type: ignore[arg-type]


def test_wandb_has_every_row_of_every_stage_and_start_in_one_run(tmp_path: Path, fake_wandb: FakeWandb) -> None:
    Crashing.crashed = False
    run, tasks = two_stages("wandb"), {"toy": Crashing}
    with pytest.raises(RuntimeError, match="gone"):
        run_stages(run, tmp_path, tasks=tasks)
    assert run_stages(run, tmp_path, tasks=tasks)
    (wandb_run,) = fake_wandb.runs.values()
    assert [given["resume"] for given in fake_wandb.given] == ["allow", "allow"]
    assert fake_wandb.given[0]["config"]["stages"]["two"]["images"] == 32 and fake_wandb.given[0]["mode"] == "offline"
    for stage in ("one", "two"):
        assert wandb_run.axes[f"{stage}/*"] == f"{stage}/images_seen"
        written = [json.loads(line) for line in (tmp_path / stage / "metrics.jsonl").read_text().splitlines()]
        logged = [row for row in wandb_run.rows if f"{stage}/loss" in row]
        expected = [(row["images_seen"], row["loss"]) for row in written if "loss" in row]
        assert [(row[f"{stage}/images_seen"], row[f"{stage}/loss"]) for row in logged][-len(expected) :] == expected
        validations = [row for row in wandb_run.rows if f"{stage}/pictures" in row]
        assert [row[f"{stage}/images_seen"] for row in validations][-2:] == [16, 32]
        assert validations[-1][f"{stage}/pictures"][0].getpixel((0, 0)) == (32, 0, 0)


def test_tensorboard_receives_the_pictures_of_every_validation(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_stages(two_stages("tensorboard"), tmp_path, tasks={"toy": ToyTask})
    events = EventAccumulator(str(tmp_path / "tracking" / "imagine"))
    events.Reload()
    for stage in ("one", "two"):
        assert [event.step for event in events.Images(f"{stage}/pictures")] == [16, 32]
        names = sorted(path.name for path in (tmp_path / stage / "samples").iterdir())
        assert names == ["000000016-pictures.png", "000000032-pictures.png"]
