"""The metrics agree with scipy and torchmetrics, and tell constructed cases apart."""

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.nominal import fleiss_kappa
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from imagine.agreement import fleiss
from imagine.evaluation import metrics
from imagine.evaluation.metrics.comparison import holm, paired_difference, rank_correlation, recogniser_agreement
from imagine.evaluation.metrics.distributions import diversity, frechet_distance, kernel_distance
from imagine.evaluation.metrics.intervals import jackknife, wilson
from imagine.evaluation.metrics.several import confusion, patterns, tolerance

stats: Any = importlib.import_module("scipy.stats")


def noise(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


class Channels(nn.Module):
    """A feature extractor for torchmetrics: pictures of one pixel are their own features."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def as_pictures(features: Tensor) -> Tensor:
    return features.view(len(features), -1, 1, 1)


def test_the_frechet_distance_is_that_of_torchmetrics() -> None:
    one, two = noise(80, 6, 0), noise(70, 6, 1, shift=0.3) * 1.4
    theirs = FrechetInceptionDistance(feature=Channels(), input_img_size=(6, 1, 1), normalize=True)
    theirs.set_dtype(torch.float64)
    theirs.update(as_pictures(one).double(), real=True)
    theirs.update(as_pictures(two).double(), real=False)
    assert frechet_distance(one, two) == pytest.approx(float(theirs.compute()), rel=1e-4)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-8)


@pytest.mark.filterwarnings("ignore:Metric `Kernel")  # it keeps all features, which are few here
def test_the_kernel_distance_is_that_of_torchmetrics() -> None:
    one, two = noise(60, 6, 0), noise(60, 6, 1, shift=0.5)
    theirs = KernelInceptionDistance(feature=Channels(), subsets=1, subset_size=60, normalize=True)
    theirs.update(as_pictures(one), real=True)
    theirs.update(as_pictures(two), real=False)
    assert kernel_distance(one, two) == pytest.approx(float(theirs.compute()[0]), rel=1e-4)
    assert abs(kernel_distance(noise(400, 6, 2), noise(400, 6, 3))) < 0.05


def test_the_bootstrap_is_that_of_scipy() -> None:
    values = noise(60, 1, 4)[:, 0].double()
    theirs = stats.bootstrap((values.numpy(),), np.mean, method="percentile", rng=0).confidence_interval
    assert metrics.bootstrap(values) == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_wilsons_interval_is_known_and_total() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(0, 20)
    assert low == pytest.approx(0, abs=1e-9) and 0.1 < high < 0.2


def test_the_jackknife_of_a_mean_is_its_normal_interval() -> None:
    values = noise(200, 1, 5)[:, 0]
    groups = list(torch.arange(200).chunk(200))
    low, high = jackknife(lambda rows: float(values[rows].mean()), groups)
    error = float(values.std()) / math.sqrt(200)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=1e-3)


def test_the_paired_test_is_exact_and_finds_what_an_unpaired_one_misses() -> None:
    two = noise(10, 1, 6)[:, 0]
    shifted = paired_difference(two + 0.1, two)
    assert shifted.value == pytest.approx(0.1) and shifted.p == pytest.approx(2 / 2**10)
    assert shifted.low == pytest.approx(0.1) and shifted.high == pytest.approx(0.1)
    assert paired_difference(two, two).p == 1.0
    assert paired_difference(two, two + 0.1).value == pytest.approx(-0.1)
    theirs = stats.wilcoxon(two + 0.1, two).pvalue
    assert shifted.p == pytest.approx(theirs, abs=1e-3)  # all differences have one sign, so both count sign flips
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_recognisers_agree_with_themselves_and_not_with_noise() -> None:
    one = noise(300, 1, 7)[:, 0].tolist()
    same = recogniser_agreement(one, [2 * value + 1 for value in one], (0.0, 1.0))
    assert same == {"correlation": pytest.approx(1.0), "same": 1.0, "kappa": 1.0}
    other = recogniser_agreement(one, noise(300, 1, 8)[:, 0].tolist(), (0.0, 0.0))
    assert abs(other["correlation"] or 1) < 0.2 and abs(other["kappa"] or 1) < 0.2
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) is None


def test_fleiss_kappa_is_that_of_torchmetrics() -> None:
    ratings = [["a", "a", "b"], ["b", "b", "b"], ["a", "b", "c"], ["c", "c", "a"], ["a", "a", "a"]]
    counts = torch.tensor([[item.count(name) for name in "abc"] for item in ratings])
    assert fleiss(ratings) == pytest.approx(float(fleiss_kappa(counts, mode="counts")), abs=1e-4)  # which adds 1e-5


def test_diversity_is_the_mean_distance_of_all_pairs() -> None:
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]])
    assert diversity(features).tolist() == pytest.approx([0.0, 1 + 1 / 3])


def test_an_unreadable_picture_is_never_the_first_person() -> None:
    gallery = torch.eye(3)
    assert metrics.rank1(torch.zeros(1, 3), gallery, torch.tensor([0])).tolist() == [0.0]


REAL = torch.tensor([[0.8, 0.1], [0.1, 0.8]])


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ([[0.8, 0.1], [0.1, 0.8]], ["kept", "kept"]),
        ([[0.2, 0.1], [0.1, 0.8]], ["drift", "kept"]),
        ([[0.1, 0.8], [0.8, 0.1]], ["swap", "swap"]),
        ([[0.8, 0.1], [0.8, 0.1]], ["kept", "dominance"]),
        ([[0.7, 0.7], [0.1, 0.8]], ["blending", "kept"]),
        ([[math.nan, math.nan], [0.1, 0.8]], ["missing", "kept"]),
    ],
    ids=["right", "drift", "swap", "dominance", "blending", "missing"],
)
def test_the_confusion_matrix_tells_the_failures_of_several_people_apart(
    generated: list[list[float]], expected: list[str]
) -> None:
    limit = tolerance(REAL.unsqueeze(0))
    assert limit == pytest.approx(0.35)
    delta = confusion(torch.tensor(generated), REAL)
    assert patterns(delta, limit) == expected
    if expected == ["kept", "kept"]:
        assert delta.abs().max() == 0
