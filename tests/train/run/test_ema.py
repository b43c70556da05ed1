"""The moving average of the weights: half-life in images, ramp-up at the start, and the exact restore after use."""

import pytest
import torch
from torch import nn

from train.run.ema import RAMP_UP, Average


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.zeros(3))


def test_half_of_a_change_is_averaged_in_one_half_life_for_any_batch_size(weight: nn.Parameter) -> None:
    for batch in (1, 10, 50):
        average = Average({"w": weight}, half_life=100)
        average.values["w"].fill_(1.0)
        for step in range(100 // batch):
            average.update(10**6 + step * batch, batch)
        torch.testing.assert_close(average.values["w"], torch.full((3,), 0.5))


def test_the_half_life_is_shorter_at_the_start(weight: nn.Parameter) -> None:
    average = Average({"w": weight}, half_life=10**9)
    with torch.no_grad():
        weight.fill_(1.0)
    average.update(10, 10)
    torch.testing.assert_close(average.values["w"], torch.full((3,), 1 - 0.5 ** (1 / RAMP_UP)))


def test_the_average_is_applied_and_the_weights_are_restored_even_after_an_error(weight: nn.Parameter) -> None:
    average = Average({"w": weight}, half_life=100)
    trained = torch.tensor([0.1, 0.2, 0.3])
    with torch.no_grad():
        weight.copy_(trained)
    with pytest.raises(KeyError), average.applied():
        assert torch.equal(weight, torch.zeros(3))
        raise KeyError
    assert torch.equal(weight, trained)


def test_without_a_half_life_there_is_no_average(weight: nn.Parameter) -> None:
    average = Average({"w": weight}, half_life=0)
    average.update(10, 10)
    with average.applied():
        assert average.values == {}
