"""`--self-test`: a stage that can learn passes; one that cannot says why, and the exit code is not 0."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagine.errors import ConfigError
from tests.toy_training import ToyBatch, ToySettings, ToyTask
from train.__main__ import main
from train.config import Run, Stage
from train.selftest import self_test
from train.task import Loss, Start


class Deaf(ToyTask):
    """Its loss does not depend on the head."""

    def loss(self, batch: ToyBatch, images_seen: int) -> Loss:
        return Loss((self.modules["body"](batch.x).mean(1) - batch.y[:, 0]).square())


class Diverging(ToyTask):
    """Its loss is finite at first and then no more."""

    def loss(self, batch: ToyBatch, images_seen: int) -> Loss:
        self.calls = getattr(self, "calls", 0) + 1
        return Loss(super().loss(batch, images_seen).per_sample * (float("inf") if self.calls > 3 else 1.0))


class Shy(ToyTask):
    """Like a fresh adapter: a gate at zero hides one part from the first gradient, and from the first only."""

    def __init__(self, settings: ToySettings, start: Start) -> None:
        super().__init__(settings, start)
        self.gate = nn.Parameter(torch.zeros(2))
        self.modules["gate"] = nn.Module()
        self.modules["gate"].register_parameter("value", self.gate)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        own = super().parts()
        return {"first": own["first"], "second": [*own["second"], self.gate]}

    def loss(self, batch: ToyBatch, images_seen: int) -> Loss:
        guess: Tensor = self.modules["head"](self.modules["body"](batch.x)) * self.gate
        return Loss((guess - batch.y).square().mean(1))


def run(**settings: Any) -> Run:
    given = {"task": "toy", "train": {"first": 3e-2, "second": 3e-2}, "images": 16, "batch_size": 8, **settings}
    return Run(stages={"one": Stage.model_validate(given)})


@pytest.mark.parametrize("task", [ToyTask, Shy])
def test_a_stage_that_can_learn_passes_and_leaves_nothing(tmp_path: Path, task: type[ToyTask]) -> None:
    (outcome,) = self_test(run(), tmp_path / "run", tasks={"toy": task})
    assert outcome.passed and "learns 8 images by heart" in outcome.sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "settings", "says"),
    [
        (Deaf, {}, "no gradient reaches the part second"),
        (Diverging, {}, "not finite after 3 steps on one batch: lower"),
        (ToyTask, {"settings": {"bad": [0]}}, "very first loss is not finite"),
        (ToyTask, {"train": {"both": 1e-7}}, "hardly falls on one batch"),
        (ToyTask, {"train": {"both": 30.0}}, "rises on one batch"),
    ],
)
def test_a_stage_that_cannot_learn_says_why(tmp_path: Path, task: Any, settings: dict[str, Any], says: str) -> None:
    (outcome,) = self_test(run(**settings), tmp_path, tasks={"toy": task}, steps=30)
    assert not outcome.passed and says in outcome.sentence


def test_a_stage_whose_start_is_missing_is_refused(tmp_path: Path) -> None:
    stages = {name: dict(run().stages["one"]) for name in ("one", "two")}
    stages["two"]["start_from"] = ["one"]
    with pytest.raises(ConfigError, match="starts from one, which is not done"):
        self_test(Run.model_validate({"stages": stages}), tmp_path, only=["two"], tasks={"toy": ToyTask})


def test_the_command_says_how_it_went(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tmp_path / "run.yaml"
    line = "stages: {one: {task: toy, train: {both: RATE}, images: 16, batch_size: 8}}"
    for rate, code, says in (("3e-2", 0, "by heart"), ("1e-7", 1, "hardly falls")):
        config.write_text(line.replace("RATE", rate))
        with caplog.at_level(logging.INFO, "train"):
            assert main([str(config), "--output", str(tmp_path / "run"), "--self-test"], {"toy": ToyTask}) == code
        assert says in caplog.text
