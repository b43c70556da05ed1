"""Distances between sets of pictures, and the spread within one, as functions of feature vectors."""

import torch
from torch import Tensor


def frechet_distance(one: Tensor, two: Tensor) -> float:
    """Return the Frechet distance of two sets of features (N, D), (M, D) as Gaussians (FID, arXiv 1706.08500, eq. 6).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). It falls with the number of pictures, so only values of equal numbers
    are comparable.
    """
    one, two = one.double(), two.double()
    means = (one.mean(0) - two.mean(0)).square().sum()
    first, second = _covariance(one), _covariance(two)
    roots = torch.linalg.eigvals(first @ second).sqrt().real.sum()
    return max(0.0, float(means + first.trace() + second.trace() - 2 * roots))


def kernel_distance(one: Tensor, two: Tensor) -> float:
    """Return the unbiased squared maximum mean discrepancy with the kernel (x y / D + 1)^3 (KID, arXiv 1801.01401).

    It may be slightly negative for two samples of one distribution.
    """
    one, two = one.double(), two.double()
    n, m = len(one), len(two)
    within_one, within_two, between = _kernel(one, one), _kernel(two, two), _kernel(one, two)
    return float(
        (within_one.sum() - within_one.diagonal().sum()) / (n * (n - 1))
        + (within_two.sum() - within_two.diagonal().sum()) / (m * (m - 1))
        - 2 * between.mean()
    )


def diversity(features: Tensor) -> Tensor:
    """Return 1 minus the mean cosine of all pairs of pictures that differ in their seed only: (N, S, D) -> (N,)."""
    count = features.shape[1]
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    cosines = unit @ unit.transpose(1, 2)
    off = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)
    return (1 - off / (count * (count - 1))).float()


def _covariance(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _kernel(one: Tensor, two: Tensor) -> Tensor:
    return (one @ two.T / one.shape[1] + 1) ** 3
