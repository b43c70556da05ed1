"""The Muon optimiser, combined with AdamW: Muon orthogonalises the momentum of matrices.

It needs fewer images than Adam for the same loss. K. Jordan et al., 2024 (https://kellerjordan.github.io/posts/muon/);
updates are scaled by 0.2 * sqrt(longer side), as in arXiv 2502.16982 (section 2.2), so that learning rates are
comparable to AdamW's. Convolutions are treated as matrices (outputs, inputs * kernel). AdamW trains the parameters with
fewer than two axes and the groups without `muon`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from Jordan et al.
_ITERATIONS = 5
_GRAM_ASPECT_RATIO = 3  # width / height from which iterating on the Gram matrix is cheaper


class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups with `muon` true, AdamW for the others; both with decoupled weight decay."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], momentum: float = 0.95, eps: float = 1e-8
    ) -> None:
        super().__init__(list(groups), {"lr": 1e-3, "weight_decay": 0.0, "muon": False})
        self.betas, self.momentum, self.eps = betas, momentum, eps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            updates = self._muon(trained) if group["muon"] else map(self._adam, trained)
            for parameter, update in zip(trained, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])

    def _muon(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the updates of these matrices or kernels, of their shapes."""
        return self.orthogonalised([self._lookahead(parameter) for parameter in parameters])

    def orthogonalised(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Return `update_of` of each of these matrices or kernels. Subclasses may divide the work."""
        return [update_of(matrix) for matrix in matrices]

    def _lookahead(self, parameter: Tensor) -> Tensor:
        """Return the gradient with Nesterov momentum."""
        gradient, state = gradient_of(parameter), self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(momentum, self.momentum)

    def _adam(self, parameter: Tensor) -> Tensor:
        gradient, state = gradient_of(parameter), self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        first, second = self.betas
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].lerp_(gradient.square(), 1 - second)
        count = float(state["step"])
        spread = (state["exp_avg_sq"] / (1 - second**count)).sqrt_().add_(self.eps)
        return (state["exp_avg"] / (1 - first**count)) / spread


def gradient_of(parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter that has one."""
    assert parameter.grad is not None, "parameters without a gradient are left out"
    return parameter.grad


def update_of(matrix: Tensor) -> Tensor:
    """Return the orthogonal matrix, scaled as in arXiv 2502.16982; (m, ...) to the same shape, kernels as (m, n)."""
    flat = matrix.flatten(1)
    return (orthogonal(flat) * 0.2 * max(flat.shape) ** 0.5).view_as(matrix)


def updates_of(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return `update_of` of each matrix. Each process computes a share and sends it to the others.

    All processes must enter with the same matrices, and get the same updates.
    """
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if count == 1 or not matrices:
        return [update_of(matrix) for matrix in matrices]
    owners = owners_of([float(m.numel() * min(m.flatten(1).shape)) for m in matrices], count)
    sizes = [matrix.numel() for matrix in matrices]
    updates = matrices[0].new_zeros(sum(sizes))
    places = updates.split(sizes)
    for matrix, place, owner in zip(matrices, places, owners, strict=True):
        if owner == dist.get_rank():
            place.copy_(update_of(matrix).flatten())
    dist.all_reduce(updates)  # each update plus zeros
    return [place.view(matrix.shape) for matrix, place in zip(matrices, places, strict=True)]


def owners_of(costs: Sequence[float], count: int) -> list[int]:
    """Return which of `count` processes does each task, so that their sums of costs are about equal."""
    loads, owners = [0.0] * count, [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        owners[task] = loads.index(min(loads))
        loads[owners[task]] += costs[task]
    return owners


def orthogonal(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with singular values of about 1, by Newton-Schulz iterations; (m, n) to (m, n)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    x = _iterate_on_gram(x) if x.shape[1] >= _GRAM_ASPECT_RATIO * x.shape[0] else _iterate_on_matrix(x)
    return x.T if tall else x


def _iterate_on_matrix(x: Tensor) -> Tensor:
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _iterate_on_gram(x: Tensor) -> Tensor:
    """Run the same iterations on x @ x.T and multiply by x once at the end: 2.5 times less work for 3x3 kernels.

    Every factor is a polynomial of that Gram matrix, so all factors commute and their product can be accumulated.
    """
    a, b, c = _COEFFICIENTS
    gram = x @ x.T
    factor: Tensor | None = None
    for _ in range(_ITERATIONS):
        step = torch.addmm(b * gram, gram, gram, alpha=c)
        step.diagonal().add_(a)
        factor = step if factor is None else step @ factor
        gram = step @ gram @ step
    assert factor is not None
    return factor @ x
