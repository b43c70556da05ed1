"""`--dry-run`: the plan counts parameters, memory, steps and, once measured, hours; it trains nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from imagine.errors import ConfigError
from tests.root import ROOT
from tests.toy_training import ToyTask
from train.__main__ import main
from train.config import Run, Stage
from train.plan import format_plan, plan
from train.stages import run_stages
from train.task import TaskContext
from train.tasks.base import images_without_effect

TOY = {"toy": ToyTask}  # 3 x 4 + 4 parameters in part "first", 4 x 2 + 2 in "second"


def run(**settings: Any) -> Run:
    given = {"task": "toy", "train": {"first": 1e-2}, "images": 100, "batch_size": 8, "precision": "fp32", **settings}
    return Run(stages={"one": Stage.model_validate(given)})


def test_a_plan_counts_parameters_steps_and_memory(tmp_path: Path) -> None:
    (one,) = plan(run(ema=10), tmp_path / "run", TOY)
    assert one.trained == {"first": 16} and one.frozen == 10 and one.initial_weights == "random weights"
    assert one.steps == 13  # the last step is not full
    assert one.bytes == 4 * (26 + 16 * 4)  # all weights; gradient, two moments and average of trained ones
    (plain,) = plan(run(muon=["first"]), tmp_path / "run", TOY)
    assert plain.bytes == 4 * (26 + 12 * 2 + 4 * 3)  # Muon has one state value for each value of a matrix
    (bytewise,) = plan(run(optimiser="adamw8bit", settings={"width": 2000}), tmp_path / "run", TOY)
    large, small = 3 * 2000, 2000  # the moments of fewer than 4,096 values are stored in floats
    assert (
        bytewise.bytes
        == 4 * (large + small + 2000 * 2 + 2) + 4 * (large + small) + int(large * 2 * (1 + 4 / 256)) + small * 8
    )
    assert one.hours is None and "not known" in format_plan([one])
    assert not (tmp_path / "run").exists()


def test_a_plan_includes_the_progress_and_the_measured_speed(tmp_path: Path) -> None:
    wanted = run(report_every_seconds=0)
    assert run_stages(wanted, tmp_path, tasks=TOY)
    path = tmp_path / "one" / "metrics.jsonl"
    rows = [{"images_seen": 8 * i, "images_per_second": speed} for i, speed in ((1, 1.0), (2, 4.0), (5, 2.0))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"images_se')
    (one,) = plan(wanted, tmp_path, TOY)
    assert (one.images_seen, one.steps, one.speed) == (40, 8, 2.0)
    assert one.hours == pytest.approx(60 / 2 / 3600)
    text = format_plan([one])
    assert "40 of 100 images, 8 steps of 8" in text and "minutes left" in text and "first" in text and "0.01" in text
    assert "all stages: 60 images and 8 steps remaining, 0 minutes left" in text


def test_a_plan_raises_the_errors_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no part 'fist' \(did you mean first\?\)"):
        plan(run(train={"fist": 1e-2}), tmp_path, TOY)
    with pytest.raises(ConfigError, match="share parameters"):
        plan(run(train={"first": 1e-2, "both": 1e-2}), tmp_path, TOY)


def test_a_plan_prints_the_warnings_of_the_task(tmp_path: Path) -> None:
    plans = plan(run(settings={"width": 1}), tmp_path, TOY)
    assert "\n  a width of 1 is odd." in format_plan(plans) and "odd" not in format_plan(plan(run(), tmp_path, TOY))


@pytest.mark.parametrize(
    ("share", "trains", "idle"),
    [(0.1, ("lora", "vision_branch"), True), (0.0, ("lora",), False), (0.1, ("lora", "t5_branch"), False)],
)
def test_images_without_effect_are_a_warning(share: float, trains: tuple[str, ...], idle: bool) -> None:
    context = TaskContext("one", 0, torch.device("cpu"), Path("nowhere"), trains=trains)
    assert [
        sentence.startswith("drop_vision: 0.1 of the images") for sentence in images_without_effect(context, share)
    ] == ([True] if idle else [])


def test_the_command_prints_the_plan_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("stages: {one: {task: toy, train: {both: 1e-2}, images: 16, batch_size: 8}}")
    assert main([str(config), "--output", str(tmp_path / "run"), "--dry-run"], TOY) == 0
    assert "16 images, 2 steps of 8" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


JUDGE = ["recogniser", "reader", "finder"]
FOUR = ["real", "synthetic", "fine_real", "fine_synthetic"]  # the paper's stages


@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        ("weights", ["autoencoder", *JUDGE, "clip", "vision", "likeness", "base", "together", *FOUR]),
        ("continue", ["decoder", "likeness", "together", *FOUR]),
    ],
)
def test_the_shipped_recipes_can_be_planned(
    recipe: str, stages: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "configs" / f"{recipe}.yaml"
    assert main([str(path), "--output", str(tmp_path / "run"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == [*stages, "all stages"]
