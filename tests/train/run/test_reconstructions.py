"""Tests of the judge of reconstructions: perfect ones keep everything, and damage shows where it was done."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from imagine.evaluation.judge import Judge, Reader
from imagine.networks.recogniser import Recogniser
from imagine.world.vocabulary import ATTRIBUTES, TRAITS
from tests.root import ROOT
from train.run.reconstructions import ReconstructionJudge


@pytest.fixture(scope="module")
def judge() -> ReconstructionJudge:
    return ReconstructionJudge(Judge.from_pretrained(ROOT / "weights" / "judge"), people=24, words=24)


def test_perfect_reconstructions_keep_everything(judge: ReconstructionJudge) -> None:
    scores = judge.scores(lambda images: images)
    assert scores == pytest.approx({"likeness_kept": 1, "words_kept": 1, "expression_kept": 1})


def test_blurred_reconstructions_lose_likeness_and_words(judge: ReconstructionJudge) -> None:
    def blur(images: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(images, 8)
        return torch.nn.functional.interpolate(small, scale_factor=8, mode="bilinear").clamp(0, 1)

    scores = judge.scores(blur)
    assert scores["likeness_kept"] < 0.9 and scores["words_kept"] < 0.3


def test_it_is_made_from_the_stages_of_a_run(tmp_path: Path) -> None:
    assert ReconstructionJudge.from_stages({"recogniser": tmp_path / "recogniser"}) is None
    Recogniser().save(tmp_path / "recogniser" / "recogniser")
    Reader({**ATTRIBUTES, "letters": ()}, TRAITS).save(tmp_path / "reader" / "reader")
    earlier = {name: tmp_path / name for name in ("recogniser", "reader")}
    assert ReconstructionJudge.from_stages(earlier) is not None
