"""Masks of the parts of portraits: they agree with the pictures and with what the renderer knows."""

import torch
import torch.nn.functional as F

from imagine.world import render, sample_contexts, sample_people
from imagine.world.body import letter_boxes
from imagine.world.parts import PARTS, part_masks
from imagine.world.vocabulary import HEADWEAR

SEEDS = range(40, 64)
PEOPLE, CONTEXTS = sample_people(SEEDS), sample_contexts(SEEDS)
MASKS = part_masks(PEOPLE, CONTEXTS, 64)


def part(name: str) -> torch.Tensor:
    return MASKS[:, PARTS.index(name)]


def test_the_painted_parts_cover_the_person_of_the_render() -> None:
    whole = render(PEOPLE, CONTEXTS, 64).masks
    painted = MASKS[:, : PARTS.index("eyes")].sum(1).clamp(max=1)
    free = CONTEXTS.held == 0  # held objects are part of the person, and of no part
    assert free.any() and MASKS.shape == (len(SEEDS), len(PARTS), 64, 64)
    assert (painted[free] - whole[free]).abs().mean() < 0.006
    assert float(MASKS.min()) >= 0 and float(MASKS.max()) <= 1
    assert (MASKS[:, : PARTS.index("eyes")].sum(1) < 1.6).all()  # parts hide each other


def test_eyes_and_mouth_are_at_the_landmarks() -> None:
    landmarks = render(PEOPLE, CONTEXTS, 64).landmarks
    axis = torch.arange(64) + 0.5
    for name, points in (("eyes", landmarks[:, :2]), ("nose", landmarks[:, 2:3]), ("mouth", landmarks[:, 3:])):
        mask = part(name)
        seen = mask.flatten(1).sum(1) > 1
        x = (mask * axis).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1e-6)
        inside = (points.mean(1)[:, 0] > 4) & (points.mean(1)[:, 0] < 60) & seen
        assert inside.sum() > len(SEEDS) / 2
        assert ((x - points.mean(1)[:, 0]).abs()[inside] < 4).float().mean() > 0.8, name


def test_words_and_hats_are_there_where_the_context_has_them() -> None:
    words = letter_boxes(CONTEXTS, 64)[:, 2] > 0
    assert words.any() and not words.all()
    assert torch.equal(part("word").flatten(1).amax(1) > 0.5, words)
    hats = CONTEXTS.headwear != HEADWEAR.index("nothing") if "nothing" in HEADWEAR else CONTEXTS.headwear > 0
    assert torch.equal(part("headwear").flatten(1).amax(1) > 0.5, hats)


def test_masks_do_not_depend_on_the_batch_or_much_on_the_size() -> None:
    assert torch.equal(part_masks(PEOPLE[3:4], CONTEXTS[3:4], 64)[0], MASKS[3])
    coarse = part_masks(PEOPLE, CONTEXTS, 32)
    assert (coarse - F.avg_pool2d(MASKS, 2)).abs().mean() < 0.01
