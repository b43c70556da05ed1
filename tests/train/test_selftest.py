"""`--self-test`: a stage that can overfit one batch passes; for one that cannot, the outcome says why."""

import json
import logging
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.toy_training import ToyBatch, ToySettings, ToyTask
from tests.train.tasks.test_tasks import ADAPTER_PARTS, SETTINGS, SMALL
from train.__main__ import main
from train.config import Run, Stage
from train.data.language import make_tokenizers
from train.run.checkpoint import read_tensors
from train.selftest import self_test
from train.stages import run_stages
from train.task import Loss, TaskContext


class HeadWithoutGradient(ToyTask):
    """Its loss does not depend on the head."""

    def loss(self, batch: ToyBatch, images_seen: int) -> Loss:
        return Loss((self.modules["body"](batch.x).mean(1) - batch.y[:, 0]).square())


class Diverging(ToyTask):
    """Its loss is finite in the first steps only."""

    def loss(self, batch: ToyBatch, images_seen: int) -> Loss:
        self.calls = getattr(self, "calls", 0) + 1
        return Loss(super().loss(batch, images_seen).per_sample * (float("inf") if self.calls > 3 else 1.0))


class GatedPart(ToyTask):
    """Like a new adapter: because of a gate at zero, one part gets no gradient in the first step."""

    def __init__(self, settings: ToySettings, context: TaskContext) -> None:
        super().__init__(settings, context)
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
    """Return a run of one stage, in fp32, because measuring the faster precision would take longer than the test."""
    given: dict[str, Any] = {"task": "toy", "train": {"first": 3e-2, "second": 3e-2}, "images": 16, "batch_size": 8}
    given |= {"precision": "fp32", **settings}
    return Run(stages={"one": Stage.model_validate(given)})


@pytest.mark.parametrize("task", [ToyTask, GatedPart])
def test_a_stage_that_can_learn_passes_and_leaves_no_files(tmp_path: Path, task: type[ToyTask]) -> None:
    settings = {"careful": True}  # it writes files while it is built and prepared
    (outcome,) = self_test(run(settings=settings), tmp_path / "run", tasks={"toy": task})
    assert outcome.passed and "overfits 8 images" in outcome.sentence
    assert not (tmp_path / "run").exists()
    assert run_stages(run(settings=settings), tmp_path / "run", tasks={"toy": task})  # the folder can be used for a run


@pytest.mark.parametrize(
    ("task", "settings", "expected"),
    [
        (HeadWithoutGradient, {}, "no gradient reaches the part second"),
        (Diverging, {}, "not finite after 3 steps on one batch: lower"),
        (ToyTask, {"settings": {"bad": [0]}}, "the first loss is not finite"),
        (ToyTask, {"train": {"both": 1e-7}}, "hardly falls on one batch"),
        (ToyTask, {"train": {"both": 30.0}}, "rises on one batch"),
    ],
)
def test_a_stage_that_cannot_learn_says_why(tmp_path: Path, task: Any, settings: dict[str, Any], expected: str) -> None:
    (outcome,) = self_test(run(**settings), tmp_path, tasks={"toy": task}, steps=30)
    assert not outcome.passed and expected in outcome.sentence


class Reading(ToyTask):
    """Records the export of an earlier stage, and its own initial weights."""

    heads: ClassVar[list[Any]] = []
    initial: ClassVar[list[Tensor]] = []

    def prepare(self) -> None:
        super().prepare()
        self.initial.append(self.modules["head"].get_parameter("weight").detach().clone())
        if "one" in self.context.earlier:
            self.heads.append(json.loads((self.context.earlier["one"] / "head.json").read_text()))


def test_a_stage_starts_from_trained_weights_if_there_are_any(tmp_path: Path) -> None:
    one = run().stages["one"]
    both = Run(stages={"one": one, "two": one.model_copy(update={"start_from": ("one",), "seed": 5})}, trackers=())
    tasks = {"toy": Reading}
    Reading.heads.clear()
    assert [each.passed for each in self_test(both, tmp_path, tasks=tasks)] == [True, True]  # no stage is trained yet
    (outcome,) = self_test(both, tmp_path, only=["two"], tasks=tasks)
    assert outcome.passed and len(Reading.heads) == 2 and list(tmp_path.iterdir()) == []
    run_stages(both, tmp_path, only=["one"], tasks=tasks)
    Reading.initial.clear()
    self_test(both, tmp_path, only=["two"], tasks=tasks)
    trained = read_tensors(tmp_path / "one" / "weights.safetensors")[0]["head.weight"]
    assert torch.equal(Reading.initial[-1], trained) and Reading.heads[-1] == trained.tolist()


def test_all_stages_share_one_time_limit(tmp_path: Path) -> None:
    """With no time left, each stage still takes 30 steps."""
    slow = run(train={"both": 1e-7}).stages["one"]
    outcomes = self_test(Run(stages={"a": slow, "b": slow}), tmp_path, tasks={"toy": ToyTask}, steps=10**9, seconds=0)
    assert [each.stage for each in outcomes] == ["a", "b"] and all("in 30 steps" in each.sentence for each in outcomes)


def test_a_stage_is_tested_with_its_own_micro_batch_and_precision_on_few_people(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, Any]] = []

    class Watched(ToyTask):
        def batch(self, images_seen: int, size: int) -> ToyBatch:
            calls.append((size, self.context.data["most"]))
            return super().batch(images_seen, size)

        def loss(self, batch: ToyBatch, images_seen: int) -> Loss:
            assert torch.is_autocast_enabled("cpu")
            return super().loss(batch, images_seen)

    monkeypatch.setattr("train.selftest.faster_precision", lambda _: ("bf16", "as measured"))
    (outcome,) = self_test(run(accumulation=4, precision="auto"), tmp_path, tasks={"toy": Watched})
    assert calls == [(2, 32)] and "2 images" in outcome.sentence and "in bf16" in outcome.sentence


def test_an_unreadable_first_record_is_a_failed_outcome(tmp_path: Path) -> None:
    (outcome,) = self_test(run(settings={"broken": [3]}), tmp_path, tasks={"toy": ToyTask})
    assert not outcome.passed and "Record 3 cannot be used" in outcome.sentence


def test_every_task_of_the_world_passes_without_a_trained_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user can test a recipe before any training: without a run, pictures, or trained networks of earlier stages."""
    for module in ("train.tasks.base", "train.tasks.clip"):
        few = lambda folder: make_tokenizers(folder, sentences=150)  # noqa: E731
        monkeypatch.setattr(f"{module}.make_tokenizers", few)
    monkeypatch.setattr("train.selftest._PEOPLE", 4)
    starts = {"likeness": ["autoencoder"], "base": ["autoencoder", "clip"], "adapter": ["autoencoder", "clip", "base"]}
    trains = {name: dict.fromkeys(ADAPTER_PARTS if name == "adapter" else SMALL[name].PARTS, 1e-3) for name in SMALL}
    shared = {"images": 100_000, "batch_size": 4, "precision": "fp32"}
    stages = {
        name: Stage.model_validate({
            "task": name, "train": trains[name], "start_from": starts.get(name, ()), "settings": SETTINGS[name],
            **shared,
        })
        for name in SMALL
    }  # fmt: skip
    data = {"folder": str(tmp_path / "data"), "identities": 100_000, "judge_identities": 50_000}
    outcomes = self_test(Run(data=data, stages=stages), tmp_path / "run", tasks=SMALL, steps=40)
    assert [(each.stage, each.sentence) for each in outcomes if not each.passed] == []
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_outcome(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tmp_path / "run.yaml"
    line = "stages: {one: {task: toy, train: {both: RATE}, images: 16, batch_size: 8, precision: fp32}}"
    for rate, code, expected in (("3e-2", 0, "overfits"), ("1e-7", 1, "hardly falls")):
        config.write_text(line.replace("RATE", rate))
        with caplog.at_level(logging.INFO, "train"):
            assert main([str(config), "--output", str(tmp_path / "run"), "--self-test"], {"toy": ToyTask}) == code
        assert expected in caplog.text
