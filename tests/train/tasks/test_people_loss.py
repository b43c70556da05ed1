"""The routers' loss and measure on cases that can be computed by hand."""

import math

import pytest
import torch
from torch import Tensor

from imagine.adapter.router import Router, log_shares
from imagine.records import Tokens
from train.tasks.people_loss import router_iou, router_loss

INF = torch.inf


def quarters(height: int = 4, width: int = 4) -> Tensor:
    """Return masks (1, 2, height, width): the first person in the left quarter, the second one in the right half."""
    masks = torch.zeros(1, 2, height, width)
    masks[0, 0, :, : width // 4], masks[0, 1, :, width // 2 :] = 1, 1
    return masks


def log_of(choices: list[list[int]], sure: float = 1.0, classes: int = 3) -> Tensor:
    """Return log-probabilities (1, classes, positions): `sure` for the chosen ones, the rest for the others alike."""
    chosen = torch.nn.functional.one_hot(torch.tensor(choices).flatten(), classes).T[None].float()
    return torch.log(chosen * sure + (1 - chosen) * (1 - sure) / (classes - 1))


RIGHT = [[0, 2, 1, 1]] * 4


def test_the_loss_is_the_cross_entropy_against_the_masks() -> None:
    assert router_loss({"a": [log_of(RIGHT, 0.8)]}, quarters()).item() == pytest.approx(-math.log(0.8), abs=1e-6)
    uniform = log_of(RIGHT, 1 / 3)
    assert router_loss({"a": [uniform]}, quarters()).item() == pytest.approx(math.log(3), abs=1e-6)
    wrong = log_of([[1, 2, 0, 0]] * 4, 0.8)  # the people are exchanged
    expected = (3 * -math.log(0.1) - math.log(0.8)) / 4
    assert router_loss({"a": [wrong]}, quarters()).item() == pytest.approx(expected, abs=1e-6)


def test_masks_are_averaged_over_each_positions_area() -> None:
    # At 2 x 2 the left positions are half the first person's and half nobody's, the right ones the second person's.
    probabilities = torch.tensor([[[0.5, 0.2, 0.5, 0.2], [0.1, 0.7, 0.1, 0.7], [0.4, 0.1, 0.4, 0.1]]])
    expected = (-(math.log(0.5) + math.log(0.4)) / 2 - math.log(0.7)) / 2
    assert router_loss({"a": [probabilities.log()]}, quarters()).item() == pytest.approx(expected, abs=1e-6)


def test_layers_have_equal_weight_and_wide_canvases_their_shape() -> None:
    masks = torch.zeros(1, 2, 8, 12)
    masks[0, 0, :, :6], masks[0, 1, :, 6:] = 1, 1
    fine, coarse = [[0] * 3 + [1] * 3] * 4, [[0, 0, 1, 1, 0, 1]]  # 4 x 6; 2 x 3 has its middle column in both halves
    losses = {"fine": [log_of(fine, 0.9)], "coarse": [log_of(coarse, 0.9)]}
    alone = [router_loss({name: losses[name]}, masks) for name in losses]
    assert router_loss(losses, masks) == pytest.approx(float(sum(alone)) / 2)
    assert alone[0].item() == pytest.approx(-math.log(0.9), abs=1e-6)


def test_overlapping_masks_share_a_position() -> None:
    probabilities = torch.tensor([0.6, 0.3, 0.1])[None, :, None].expand(1, 3, 4)
    expected = -(math.log(0.6) + math.log(0.3)) / 2
    found = router_loss({"a": [probabilities.log()]}, torch.ones(1, 2, 4, 4))
    assert found.item() == pytest.approx(expected, abs=1e-6)


def one_person(choices: list[list[int]]) -> Tensor:
    """Return what a layer records for an item whose second person is absent."""
    positions = len(choices) * len(choices[0])
    return torch.tensor([0.0, -INF, -INF])[None, :, None].expand(1, 3, positions)


def test_rows_without_a_choice_count_for_nothing() -> None:
    nobody = torch.tensor([-INF, -INF, 0.0])[None, :, None].expand(1, 3, 16)
    record = torch.cat((log_of(RIGHT, 0.8), one_person(RIGHT), nobody)).requires_grad_()
    masks = torch.cat((quarters(), quarters() * torch.tensor([1.0, 0.0])[None, :, None, None], torch.zeros(1, 2, 4, 4)))
    loss = router_loss({"a": [record]}, masks)
    assert loss.item() == pytest.approx(-math.log(0.8), abs=1e-6)
    loss.backward()
    assert record.grad is not None and record.grad.isfinite().all() and not record.grad[1:].any()
    assert router_iou({"a": [record]}, masks) == 1.0
    assert router_loss({"a": [record[1:]]}, masks[1:]).item() == 0 and math.isnan(
        router_iou({"a": [record[1:]]}, masks[1:])
    )
    assert router_loss({}, masks).item() == 0 and math.isnan(router_iou({}, masks))


def test_an_absent_third_person_leaves_two_to_choose_from() -> None:
    two = torch.tensor([0.8, 0.1, 0.0, 0.1])[None, :, None].expand(1, 4, 16).log()
    masks = torch.zeros(1, 3, 4, 4)
    masks[0, 0] = 1
    loss = router_loss({"a": [two]}, masks)
    assert loss.item() == pytest.approx(-math.log(0.8), abs=1e-6)
    assert router_iou({"a": [two]}, masks) == 1.0


def test_the_iou_counts_people_and_not_nobody() -> None:
    assert router_iou({"a": [log_of(RIGHT, 0.9)]}, quarters()) == 1.0
    assert router_iou({"a": [log_of([[1, 2, 0, 0]] * 4, 0.9)]}, quarters()) == 0.0
    # The first person has a column too many, the second one too few: 1/2 and 1/2.
    assert router_iou({"a": [log_of([[0, 0, 2, 1]] * 4, 0.9)]}, quarters()) == pytest.approx(0.5)
    # The first person is right, the second one takes everything else: 1 and 2/3.
    found = router_iou({"a": [log_of(RIGHT, 0.9)], "b": [log_of([[0, 1, 1, 1]] * 4, 0.9)]}, quarters())
    assert found == pytest.approx((1 + 1 + 1 + 2 / 3) / 4)


@pytest.mark.parametrize(
    ("masks", "sentence"),
    [
        (torch.zeros(1, 3, 4, 4), r"masks \[1, 3, 4, 4\] do not fit the record \[1, 3, 16\]"),
        (torch.zeros(1, 2, 4, 8), "16 positions does not fit masks of 4 x 8"),
    ],
)
def test_masks_of_another_shape_are_refused(masks: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        router_loss({"a": [log_of(RIGHT)]}, masks)


def test_a_router_learns_the_masks() -> None:
    torch.manual_seed(0)
    router, present = Router(16, 6), torch.tensor([[True, True], [True, False]])
    tokens, places = torch.randn(2, 2 * 3, 6), torch.eye(16).expand(2, -1, -1)
    masks = torch.cat((quarters(), torch.zeros(1, 2, 4, 4)))
    masks[1, 0] = 1
    optimiser = torch.optim.Adam(router.parameters(), lr=3e-3)
    ious = []
    for _ in range(150):
        record = {"a": [log_shares(router(places, router.keys(Tokens(tokens), 2)), present)]}
        ious.append(router_iou(record, masks))
        optimiser.zero_grad()
        router_loss(record, masks).backward()
        optimiser.step()
    assert ious[0] < 0.5 and ious[-1] == 1.0


def test_only_known_positions_count() -> None:
    masks = torch.zeros(1, 2, 4, 4)
    masks[0, 0, 0, 0], masks[0, 1, 0, 3] = 1, 1  # two boxes of one position
    known = masks.sum(1)
    nobody = log_of([[0, 2, 2, 1]] + [[2] * 4] * 3, 0.8)
    first = log_of([[0, 0, 0, 1]] + [[0] * 4] * 3, 0.8)  # the same inside the boxes
    for recorded in (nobody, first):
        assert router_loss({"a": [recorded]}, masks, known).item() == pytest.approx(-math.log(0.8), abs=1e-6)
        assert router_iou({"a": [recorded]}, masks, known) == 1
    assert router_iou({"a": [first]}, masks) < 0.6
    exchanged = router_loss({"a": [nobody]}, masks.flip(1), known)
    assert exchanged.item() == pytest.approx(-math.log(0.1), abs=1e-6)
    # At 2 x 2 a quarter of two positions is known, and all of that is one person's.
    coarse = log_of([[0, 1, 2, 2]], 0.8)
    assert router_loss({"a": [coarse]}, masks, known).item() == pytest.approx(-math.log(0.8), abs=1e-6)


def test_knowing_everything_is_the_default() -> None:
    masks, recorded = quarters(), {"a": [log_of(RIGHT, 0.8), log_of([[0, 2, 1, 0]] * 4, 0.7)]}
    everywhere = torch.ones(1, 4, 4)
    wanted = router_loss(recorded, masks).item()
    assert router_loss(recorded, masks, everywhere).item() == pytest.approx(wanted, abs=1e-6)
    assert router_iou(recorded, masks, everywhere) == router_iou(recorded, masks)
    assert router_loss(recorded, masks, torch.zeros(1, 4, 4)).item() == 0
