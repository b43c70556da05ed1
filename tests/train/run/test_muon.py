"""Muon with AdamW: orthogonal updates for matrices, PyTorch's AdamW for the rest, and a state that can be resumed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train.run import checkpoint, parts
from train.run.checkpoint import Progress, State
from train.run.ema import Average
from train.run.muon import MuonAdamW, _iterate_on_matrix, orthogonal, owners_of

BETAS = (0.9, 0.99)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def step(model: nn.Module, optimiser: torch.optim.Optimizer, number: int) -> float:
    """Take one step on batch `number` of a fixed non-linear map; return the loss before it."""
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(number))
    loss = (model(x) - torch.stack((x[:, 0] * x[:, 1], x[:, 2], x[:, 3].abs()), 1)).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return float(loss.detach())


@pytest.mark.parametrize("shape", [(12, 12), (8, 40), (40, 8), (1, 9)])
def test_orthogonal_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape) * 7
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.shape == (min(shape),)
    # The five iterations of Jordan et al. give about 0.7 to 1.2; tiny singular values stay below.
    assert values.max() < 1.3
    assert values[: max(1, len(values) * 3 // 4)].min() > 0.6


def test_orthogonal_keeps_the_singular_vectors_and_ignores_the_scale() -> None:
    matrix = torch.randn(6, 9)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.T @ orthogonal(matrix) @ v.T
    assert torch.allclose(turned, torch.diag(turned.diag()), atol=1e-4)
    assert (turned.diag() > 0.3).all()
    assert torch.allclose(orthogonal(matrix), orthogonal(1000 * matrix), atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 24), (16, 144), (5, 400), (144, 16)])
def test_long_matrices_are_made_orthogonal_through_their_gram_matrix(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(0, -3, shape[1]))  # singular values over decades
    lying = matrix if shape[0] < shape[1] else matrix.T
    wanted = _iterate_on_matrix(lying / lying.norm())
    found = orthogonal(matrix)
    torch.testing.assert_close(found if shape[0] < shape[1] else found.T, wanted, atol=1e-4, rtol=1e-3)


def test_groups_without_muon_take_the_steps_of_the_stock_adamw() -> None:
    ours, stock = network(), network()
    stock.load_state_dict(ours.state_dict())
    one = MuonAdamW([{"params": list(ours.parameters()), "lr": 3e-3, "weight_decay": 0.1}], BETAS)
    two = torch.optim.AdamW(stock.parameters(), lr=3e-3, betas=BETAS, weight_decay=0.1)
    for number in range(20):
        step(ours, one, number)
        step(stock, two, number)
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_first_muon_step_is_orthogonal_and_scaled_by_the_longer_side() -> None:
    weight = nn.Parameter(torch.zeros(4, 3, 3, 3))  # a convolution: a matrix of 4 by 27
    weight.grad = torch.randn(4, 3, 3, 3)
    MuonAdamW([{"params": [weight], "lr": 0.1, "muon": True}], BETAS).step()
    expected = -0.1 * 0.2 * 27**0.5 * orthogonal(weight.grad.flatten(1)).view(4, 3, 3, 3)
    assert torch.allclose(weight, expected, atol=1e-4)


def test_weights_decay_apart_from_the_gradient() -> None:
    for muon in (True, False):
        weight = nn.Parameter(torch.ones(3, 3))
        weight.grad = torch.zeros(3, 3)
        MuonAdamW([{"params": [weight], "lr": 0.1, "weight_decay": 0.5, "muon": muon}], BETAS).step()
        assert torch.allclose(weight, torch.full((3, 3), 0.95))


def test_a_parameter_without_a_gradient_does_not_change() -> None:
    still, moving = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    moving.grad = torch.randn(2, 2)
    optimiser = MuonAdamW([{"params": [still, moving], "lr": 0.1, "weight_decay": 0.5, "muon": True}], BETAS)
    optimiser.step()
    assert torch.equal(still, torch.ones(2, 2))
    assert not torch.equal(moving, torch.ones(2, 2))
    assert still not in optimiser.state


def test_muon_trains_only_the_matrices_of_the_named_parts() -> None:
    body, head = nn.Linear(3, 4), nn.Linear(4, 2)
    chosen = {"body": list(body.parameters()), "head": list(head.parameters())}
    made = parts.optimiser(chosen, {"body": 1e-2, "head": 1e-3}, BETAS, 0.1, muon=["body"])
    kinds = {(g["part"], g["params"][0].ndim): g["muon"] for g in made.param_groups}
    assert kinds == {("body", 2): True, ("body", 1): False, ("head", 2): False, ("head", 1): False}
    assert isinstance(made, MuonAdamW)
    assert isinstance(parts.optimiser(chosen, {"body": 1e-2, "head": 1e-3}, BETAS, 0.1), torch.optim.AdamW)


def state_of(model: nn.Module) -> State:
    chosen = {"all": list(model.parameters())}
    modules: Mapping[str, nn.Module] = {"net": model}
    trained = parts.named(modules, chosen)
    optimiser = parts.optimiser(chosen, {"all": 0.02}, BETAS, 0.01, muon=["all"])
    return State(dict(modules), trained, optimiser, Average(trained, 10), Progress(), {}, "fp32")


def test_loss_falls() -> None:
    model = network()
    state = state_of(model)
    losses = [step(model, state.optimiser, number) for number in range(150)]
    assert sum(losses[-10:]) < 0.25 * sum(losses[:10])


def tensors(optimiser: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return [optimiser.state[p] for group in optimiser.param_groups for p in group["params"]]


def test_a_run_resumed_from_a_checkpoint_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    straight = network()
    state = state_of(straight)
    for number in range(4):
        step(straight, state.optimiser, number)
    state.progress = Progress(images_seen=4)
    checkpoint.save(tmp_path, state, keep=1)
    resumed = network()
    again = state_of(resumed)
    saved = checkpoint.load(tmp_path, lambda _: True)
    assert saved is not None
    checkpoint.restore(again, saved, "the test")
    kept: list[Any] = tensors(again.optimiser)
    assert [set(k) for k in kept] == [set(k) for k in tensors(state.optimiser)]
    assert {"momentum"} in [set(k) for k in kept]
    for number in range(4, 8):
        step(straight, state.optimiser, number)
        step(resumed, again.optimiser, number)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_work_is_divided_among_processes_about_equally() -> None:
    costs = [9.0, 1.0, 5.0, 4.0, 3.0, 2.0]
    owners = owners_of(costs, 2)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == process) for process in (0, 1)]
    assert sorted(loads) == [12.0, 12.0]
