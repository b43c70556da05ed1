"""The small evaluation at each validation: real renders reach the ceiling; renders of other people do not."""

from pathlib import Path

import pytest
import torch

from imagine.errors import ConfigError
from imagine.networks.weights import default_folder
from imagine.world import render
from train.run.judging import HeldOutEvaluation


def test_real_renders_reach_the_ceiling_and_strangers_do_not() -> None:
    evaluation = HeldOutEvaluation(default_folder(), people=3, prompts=2, gallery=12)
    assert len(evaluation.sentences) == 6 and evaluation.references(64).shape == (6, 3, 64, 64)
    everybody = evaluation.cases.people[:3].repeat(2)
    real = render(everybody, evaluation.cases.ceilings).images
    numbers = evaluation.scores(real)
    assert numbers["sim_gt"] == pytest.approx(numbers["sim_gt_ceiling"], abs=1e-5)
    assert numbers["prompt"] == pytest.approx(numbers["prompt_ceiling"], abs=1e-5)
    strangers = evaluation.scores(real.roll(2, 0))
    assert strangers["sim_gt"] < numbers["sim_gt"] - 0.2 and strangers["rank1_of_12"] < numbers["rank1_of_12"]
    references = evaluation.references(64)
    assert torch.equal(references[0], references[1])  # one reference for all prompts of a person


def test_a_folder_without_a_judge_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no judge \(judge/\)"):
        HeldOutEvaluation(tmp_path)
