"""Confidence intervals: bootstrap and jackknife over people, Wilson's interval of a share."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def bootstrap(values: Tensor, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile confidence interval of the mean of `values` (I,), one per identity.

    The bootstrap draws identities with replacement.
    """
    return bootstrap_ratio(values, torch.ones_like(values), seed, resamples, level)


def bootstrap_ratio(
    counts: Tensor, totals: Tensor, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile confidence interval of sum(counts) / sum(totals), (I,) each, one per group of people.

    The bootstrap draws groups with replacement.
    """
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(counts), (resamples, len(counts)), generator=random)
    shares = counts.double()[rows].sum(1) / totals.double()[rows].sum(1).clamp(min=1e-12)
    tail = (1 - level) / 2
    low, high = torch.quantile(shares, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def jackknife(
    statistic: Callable[[Tensor], float], groups: Sequence[Tensor], level_factor: float = 1.96
) -> tuple[float, float]:
    """Return a 95 % interval of a statistic of rows by the delete-a-group jackknife (Quenouille 1956).

    `groups` are index tensors that partition the rows; `statistic` takes the rows that are kept. It is used for
    distances of distributions, which a bootstrap overestimates because it repeats rows.
    """
    rows = torch.cat(list(groups))
    whole = statistic(rows)
    count = len(groups)
    parts = [statistic(torch.cat([one for other, one in enumerate(groups) if other != left])) for left in range(count)]
    mean = sum(parts) / count
    error = ((count - 1) / count * sum((part - mean) ** 2 for part in parts)) ** 0.5
    return whole - level_factor * error, whole + level_factor * error


def wilson(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval (1927) of a share, from scipy; (0, 1) without any observation."""
    if not total:
        return 0.0, 1.0
    stats: Any = importlib.import_module("scipy.stats")  # not before it is needed: importing it takes a moment
    interval = stats.binomtest(count, total).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)
