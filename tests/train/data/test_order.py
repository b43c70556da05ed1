"""Random numbers and orders by image number: independent of how batches are split, and sufficiently random."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from train.data import order as data


def test_parts_of_a_batch_have_the_numbers_of_the_whole_batch() -> None:
    for draw in (data.uniforms, data.normals):
        whole = draw(3, "noise", 100, 8, (2, 5))
        pieces = torch.cat([draw(3, "noise", 100, 3, (2, 5)), draw(3, "noise", 103, 5, (2, 5))])
        assert whole.shape == (8, 2, 5)
        torch.testing.assert_close(whole, pieces, rtol=0, atol=1e-6)
        for other in (draw(4, "noise", 100, 8, (2, 5)), draw(3, "time", 100, 8, (2, 5))):
            assert (other != whole).float().mean() > 0.9


def test_numbers_have_the_right_distribution_and_no_correlation() -> None:
    uniform = data.uniforms(0, "a", 0, 20_000, (5,)).double()
    assert uniform.min() >= 0 and uniform.max() < 1
    assert (uniform.flatten().histc(20, 0, 1) / 5000 - 1).abs().max() < 0.06
    normal = data.normals(0, "a", 10**9, 20_000, (5,)).double()
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01 and abs((normal**4).mean() - 3) < 0.1
    for values in (uniform, normal):
        assert (torch.corrcoef(values.T) - torch.eye(5)).abs().max() < 0.03
        assert abs(torch.corrcoef(torch.stack((values[1:, 0], values[:-1, 0])))[0, 1]) < 0.03


def test_scalars_chances_and_choices() -> None:
    assert data.uniforms(0, "a", 0, 4).shape == data.normals(0, "a", 0, 4).shape == (4,)
    assert data.chance(0, "drop", 0, 20_000, 0.1).float().mean() == pytest.approx(0.1, abs=0.01)
    assert not data.chance(0, "drop", 0, 1000, 0.0).any() and data.chance(0, "drop", 0, 1000, 1.0).all()
    shares = data.choices(0, "source", 0, 20_000, [1, 0, 3]).bincount(minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.25, 0, 0.75]), rtol=0, atol=0.015)


def test_every_epoch_visits_every_item_once_in_a_new_order() -> None:
    order = data.shuffled(1, "items", 0, 30, 10).view(3, 10)
    assert all(sorted(turn.tolist()) == list(range(10)) for turn in order)
    assert not torch.equal(order[0], order[1])
    assert torch.equal(data.shuffled(1, "items", 7, 9, 10), order.flatten()[7:16])


@pytest.mark.parametrize("depth", [0, 1, 3, 20])
def test_prefetched_batches_come_in_order(depth: int) -> None:
    calls = [(start, 2) for start in range(0, 12, 2)]
    assert list(data.prefetched(lambda start, size: start * size, calls, depth)) == [(s, s * 2) for s, _ in calls]


def test_an_error_in_the_prefetch_thread_is_raised_and_closing_ends_the_thread() -> None:
    def make(start: int, size: int) -> float:
        return 1 / (start - 4)

    with pytest.raises(ZeroDivisionError):
        list(data.prefetched(make, [(start, 1) for start in range(9)], 2))
    batches = data.prefetched(make, ((start, 1) for start in range(5, 10**9)), 2)
    assert next(batches) == (5, 1.0)
    batches.close()


def test_to_device_moves_all_tensors_of_a_record() -> None:
    @dataclass(frozen=True)
    class Record:
        x: Tensor
        more: dict[str, tuple[Tensor, str]]

    moved = data.to_device(Record(torch.ones(2), {"a": (torch.ones(1), "b")}), torch.device("meta"))
    assert moved.x.device.type == moved.more["a"][0].device.type == "meta" and moved.more["a"][1] == "b"
