"""The finder's training pictures: boxes lie on faces, and negatives hold no face."""

import pytest
import torch

from imagine.people import finder
from imagine.world import render, sample_contexts, sample_people
from train.tasks.finder_pictures import groups, no_faces, sheets

SEEDS = range(7_610_000, 7_610_008)


def spread_inside(image: torch.Tensor, box: torch.Tensor) -> float:
    left, top, width, height = (round(value) for value in box.tolist())
    return float(image[:, max(0, top) : top + height, max(0, left) : left + width].std())


def test_a_sheet_shows_four_portraits_with_their_boxes() -> None:
    drawn = render(sample_people(SEEDS), sample_contexts(SEEDS), size=128)
    made = sheets(drawn.images, drawn.boxes)
    assert made.images.shape == (2, 3, 128, 128) and made.valid.all()
    quarter = torch.nn.functional.avg_pool2d(drawn.images[5], 2)
    assert torch.equal(made.images[1, :, :64, 64:], quarter)
    assert torch.allclose(made.boxes[1, 1], drawn.boxes[5] / 2 + torch.tensor([64.0, 0, 0, 0]))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_wide_groups_are_letterboxed_with_their_boxes(count: int) -> None:
    square, wide = 0, 1
    made = groups(SEEDS.start, count, 2, 128)
    assert made.images.shape == (2, 3, 128, 128) and made.valid.sum(1).tolist() == [count, count]
    if count > 1:
        assert (made.images[wide, :, 0] == 0.5).all() and not (made.images[square, :, 0] == 0.5).all()
    for image, boxes, valid in zip(*made, strict=True):
        inside = boxes[valid]
        assert (inside[:, :2] > -20).all() and (inside[:, :2] + inside[:, 2:] < 148).all()
        assert all(spread_inside(image, box) > 0.02 for box in inside)


def test_negatives_are_deterministic_and_differ() -> None:
    made = no_faces(SEEDS, 128)
    assert made.shape == (8, 3, 128, 128) and made.min() >= 0 and made.max() <= 1
    assert torch.equal(made[:3], no_faces(SEEDS[:3], 128))
    assert all(not torch.equal(made[i], made[j]) for i in range(8) for j in range(i))


def test_boxes_beyond_the_people_are_no_targets() -> None:
    made = groups(SEEDS.start, 2, 2, 128)
    target = finder.targets(made.boxes, made.valid, 128)
    assert (target.heat >= 1 - 1e-4).sum(dim=(1, 2, 3)).tolist() == [2, 2]
