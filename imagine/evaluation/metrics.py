"""The formulas of the evaluation, as pure functions of embeddings and words.

Embeddings are unit vectors from the judge's recogniser. Identity is measured against *another* picture of the person
(the ground truth, which shows the person as the prompt describes), because similarity to the reference also rewards
copying the reference (WithAnyone, arXiv 2510.14975).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

ABSENT = ("", "none")
SMALLEST_ANGLE = 1e-2  # radians; keeps the copy-paste score finite where ground truth and reference are nearly equal


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of unit vectors, row by row: (N, D), (N, D) -> (N,)."""
    return (a * b).sum(-1)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Return the angle between unit vectors in radians, row by row: (N, D), (N, D) -> (N,)."""
    return similarity(a, b).clamp(-1, 1).arccos()


def copy_paste(output: Tensor, truth: Tensor, reference: Tensor, smallest: float = SMALLEST_ANGLE) -> Tensor:
    """M_CP of WithAnyone (arXiv 2510.14975): (angle(out, gt) - angle(out, ref)) / max(angle(gt, ref), eps), (N,).

    1: the output equals the reference. 0: it is as far from the reference as from the truth. -1: it equals the truth.
    """
    return (angle(output, truth) - angle(output, reference)) / angle(truth, reference).clamp(min=smallest)


def rank1(output: Tensor, gallery: Tensor, person: Tensor) -> Tensor:
    """Return 1 where the nearest row of the gallery (G, D), one row per person, is the right person, else 0.

    output (N, D), person (N,) -> (N,).
    """
    return ((output @ gallery.T).argmax(-1) == person).float()


def found(asked: Mapping[str, str], read: Mapping[str, str]) -> dict[str, bool]:
    """Return, for each attribute in the prompt, whether the reader found it; letters must agree in every character."""
    return {name: read.get(name) == word for name, word in asked.items()}


def leaked(asked: Mapping[str, str], reference: Mapping[str, str], read: Mapping[str, str]) -> dict[str, bool]:
    """Return whether the picture shows the reference's word, for each attribute where the prompt asked for another.

    An attribute that the reference lacks cannot leak: a missing hat counts as a prompt error, not as leakage.
    """
    return {
        name: read.get(name) == reference[name]
        for name, word in asked.items()
        if reference.get(name, word) not in (word, *ABSENT)
    }


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
    shares = counts.double()[rows].sum(1) / totals.double()[rows].sum(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(shares, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
