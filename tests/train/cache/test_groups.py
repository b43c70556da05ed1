"""Tests of the cached pictures of several people: functions of the row number, in the order of the references."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from imagine.networks.models import build_autoencoder
from imagine.world.group_captions import ORDINALS, PLACES
from train.cache.groups import MASK_CELL, GroupGallery, GroupPictures
from train.cache.latents import box_mask
from train.cache.pictures import Gallery

PORTRAITS = Gallery("train", 9, 2, size=32)
PAIRS = GroupGallery(PORTRAITS, 2, 6)
ROWS = torch.arange(6)


class HalfSize:
    """A codec whose latents are the pictures at an eighth of their size."""

    mark = "eighth"

    def shape(self, side: int) -> tuple[int, int, int]:
        return 3, side // 8, side // 8

    def encode(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 8)

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def test_rows_are_functions_of_their_numbers_and_people_differ() -> None:
    members = PAIRS.members(ROWS)
    assert members.shape == (6, 2) and (members[:, 0] != members[:, 1]).all() and members.max() < 9
    assert torch.equal(members[3:5], PAIRS.members(torch.tensor([3, 4])))
    assert len({tuple(row) for row in GroupGallery(PORTRAITS, 3, 50).order(torch.arange(50)).tolist()}) == 6
    assert PAIRS.shape == (32, 48)
    assert PAIRS.mark != GroupGallery(PORTRAITS, 3, 6).mark


def test_references_are_portraits_of_the_people_in_the_order_of_the_references() -> None:
    references, order, members = PAIRS.references(ROWS), PAIRS.order(ROWS), PAIRS.members(ROWS)
    for row in range(6):
        for number in range(2):
            assert references[row, number] // 2 == members[row, order[row, number]]


def test_captions_mention_places_that_agree_with_the_order() -> None:
    texts, order = PAIRS.captions(ROWS, ["rewritten", "dense"] * 3), PAIRS.order(ROWS)
    assert texts == [PAIRS.captions(ROWS[[i]], [style])[0] for i, style in enumerate(["rewritten", "dense"] * 3)]
    mentioned = 0
    for row, text in enumerate(texts):
        for number in range(2):
            for place, words in enumerate(PLACES[2]):
                if f"the {ORDINALS[number]} person {words}" in text:
                    mentioned += 1
                    assert order[row, number] == place
    assert mentioned > 4


def test_pictures_are_cached_with_boxes_and_masks_in_the_order_of_the_references(tmp_path: Path) -> None:
    pictures = GroupPictures(PAIRS, HalfSize(), tmp_path)
    rows = pictures.take(ROWS)
    assert rows.latents.shape == (6, 3, 4, 6) and rows.boxes.shape == (6, 2, 4) and rows.masks.shape == (6, 2, 4, 6)
    centre = rows.boxes[..., 0] + rows.boxes[..., 2] / 2
    across = (rows.masks * (torch.arange(6) + 0.5)).sum((2, 3)) / rows.masks.sum((2, 3)) * MASK_CELL
    right_first = PAIRS.order(ROWS)[:, 0] == 1
    assert right_first.any() and not right_first.all()
    for values in (centre, across):
        assert torch.equal(values[:, 0] > values[:, 1], right_first)
    images = torch.from_numpy(pictures.images[:]).float() / 127.5 - 1
    assert torch.allclose(rows.latents, torch.nn.functional.avg_pool2d(images, 8), atol=1e-3)
    again = GroupPictures(PAIRS, HalfSize(), tmp_path)
    assert torch.equal(again.take(ROWS).masks, rows.masks)


def test_a_mask_of_boxes_covers_the_touched_cells_of_a_wide_picture() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 9.0, 9.0], [40.0, 16.0, 8.0, 8.0]]])
    mask = box_mask(boxes, (32, 48), (4, 6))[0, 0]
    wanted = torch.zeros(4, 6)
    wanted[:2, :2] = 1
    wanted[2, 5] = 1
    assert torch.equal(mask, wanted)


@pytest.mark.parametrize("people", [2, 3, 4])
def test_an_autoencoder_encodes_wide_pictures(people: int) -> None:
    height, width = GroupGallery(PORTRAITS, people, 1).shape
    vae = build_autoencoder(4, (8, 8, 16))
    with torch.no_grad():
        assert vae.encode(torch.zeros(1, 3, height, width)).latent.shape == (1, 4, height // 8, width // 8)
