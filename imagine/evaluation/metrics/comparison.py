"""Compare two systems, or two recognisers, on the same pictures: paired differences, tests and rank correlation."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from imagine.agreement import cohen
from imagine.evaluation.metrics.intervals import bootstrap

RESAMPLES = 9_999  # sign flips of the permutation test; with few people, all of them are tried


@dataclass(frozen=True)
class Difference:
    """The mean difference of two systems over the same people, its 95 % interval, and the p-value of no difference."""

    value: float
    low: float
    high: float
    p: float


def paired_difference(one: Tensor, two: Tensor, seed: int = 0) -> Difference:
    """Compare two systems by one number per person, (I,) each, of the same people in the same order.

    The interval is a bootstrap over people. The p-value is that of the paired permutation test, which flips the sign of
    the differences (Fisher 1935), from scipy: two-sided, exact for up to 13 people.
    """
    differences = (one - two).double()
    low, high = bootstrap(differences, seed)
    return Difference(float(differences.mean()), low, high, _permutation_p(differences.numpy(), seed))


def _permutation_p(differences: Any, seed: int) -> float:
    if not differences.any():
        return 1.0
    stats: Any = importlib.import_module("scipy.stats")  # not before it is needed: importing it takes a moment
    result = stats.permutation_test(
        (differences,), lambda values, axis: values.mean(axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=RESAMPLES, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that are adjusted for their number (Holm 1979): each is the smallest level that rejects it."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def rank_correlation(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, from scipy; None if one side is constant."""
    if len(set(one)) < 2 or len(set(two)) < 2:
        return None
    stats: Any = importlib.import_module("scipy.stats")
    return float(stats.spearmanr(one, two).statistic)


def recogniser_agreement(
    one: Sequence[float], two: Sequence[float], limits: tuple[float, float]
) -> dict[str, float | None]:
    """Return how far two recognisers agree on the same pictures, each given as similarities to the right person.

    correlation: Spearman's. same: share of pictures on which both say "the person" or both say "another", where a
    similarity above a recogniser's limit says "the person". kappa: Cohen's, which corrects for chance.
    """
    verdicts = [
        ["yes" if value > limit else "no" for value in own] for own, limit in zip((one, two), limits, strict=True)
    ]
    same = sum(a == b for a, b in zip(*verdicts, strict=True)) / max(len(verdicts[0]), 1)
    return {"correlation": rank_correlation(one, two), "same": same, "kappa": cohen(*verdicts) if verdicts[0] else None}
