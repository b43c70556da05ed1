"""Trained parts: chosen, frozen and grouped by name, with an error for an unknown name."""

import pytest
import torch
from torch import nn

from imagine.errors import ConfigError
from train.run import parts


@pytest.fixture
def modules() -> dict[str, nn.Module]:
    return {"body": nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "head": nn.Linear(4, 2)}


def offered(modules: dict[str, nn.Module]) -> dict[str, list[nn.Parameter]]:
    body, head = list(modules["body"].parameters()), list(modules["head"].parameters())
    return {"body": body, "head": head, "all": body + head, "none": []}


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ({"haed": 1.0}, "no part 'haed' (did you mean head?); valid: all, body, head, none"),
        ({"head": 1.0, "all": 1.0}, "parts head and all share parameters"),
        ({"none": 1.0}, "the part none has no parameters"),
    ],
)
def test_wrong_parts_are_refused(modules: dict[str, nn.Module], rates: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parts.choose(offered(modules), rates, "base")
    assert words in str(error.value) and "stage base" in str(error.value)


def test_everything_else_is_frozen_and_in_eval_mode(modules: dict[str, nn.Module]) -> None:
    chosen = parts.choose(offered(modules), {"head": 1e-3}, "base")
    training = parts.freeze_all_but(modules, chosen)
    parts.train_mode(modules, training)
    assert training == ["head"] and modules["head"].training and not modules["body"].training
    assert [p.requires_grad for p in modules["body"].parameters()] == [False] * 4
    assert list(parts.named(modules, chosen)) == ["head.weight", "head.bias"]
    assert parts.sizes(chosen) == {"head": 10}


def test_each_part_has_its_rate_and_only_matrices_decay(modules: dict[str, nn.Module]) -> None:
    rates = {"head": 1e-3, "body": 1e-4}
    optimiser = parts.optimiser(parts.choose(offered(modules), rates, "base"), rates, (0.9, 0.99), 0.1)
    parts.set_rates(optimiser, 0.5)
    seen = {(g["part"], g["weight_decay"], g["lr"], len(g["params"])) for g in optimiser.param_groups}
    assert seen == {("head", 0.1, 5e-4, 1), ("head", 0.0, 5e-4, 1), ("body", 0.1, 5e-5, 1), ("body", 0.0, 5e-5, 3)}


def test_a_parameter_outside_the_modules_is_an_assertion_error(modules: dict[str, nn.Module]) -> None:
    stray = nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match="no module"):
        parts.named(modules, {"stray": [stray]})
