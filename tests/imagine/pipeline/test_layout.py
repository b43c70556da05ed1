"""Layouts of several people, and the size of their pictures."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagine.errors import ConfigError
from imagine.pipeline.layout import (
    LEFT_TO_RIGHT,
    call_regions,
    canvas_shape,
    layout_regions,
    trained_people,
)
from imagine.pipeline.sampling import Inputs
from imagine.records import VISION, Tokens
from imagine.request import Person, Request

HALVES = {"a": (0, 0, 0.5, 1), "b": (0.5, 0, 1, 1)}


def request(*names: str) -> Request:
    """Return a request that shows these people, of whom "a" is the first reference, "b" the second, and so on."""
    return Request("-", tuple(Person(name, ("x.jpg",), "abcd".index(name)) for name in names))


def test_left_to_right_follows_the_references_whatever_the_sentence_says() -> None:
    regions = call_regions(LEFT_TO_RIGHT, [request("b", "a")], (2, 4))
    assert regions is not None and regions.tolist() == [[[[0, 0, 1, 1]] * 2, [[1, 1, 0, 0]] * 2]]
    three = layout_regions(LEFT_TO_RIGHT, ["a", "b", "c"], (1, 6))
    assert three[:, 0].tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]


def test_boxes_cover_cells_by_their_share() -> None:
    regions = layout_regions({"a": (0, 0.5, 0.375, 1), "b": [0.625, 0, 1, 0.25]}, ["b", "a"], (2, 4))
    torch.testing.assert_close(regions[1], torch.tensor([[0, 0, 0, 0], [1, 0.5, 0, 0]]))
    torch.testing.assert_close(regions[0], torch.tensor([[0, 0, 0.25, 0.5], [0, 0, 0, 0]]))


def test_masks_are_averaged_over_cells_and_take_any_form() -> None:
    mask = np.zeros((4, 8), np.uint8)
    mask[:2, :3] = 255
    wanted = torch.tensor([[1, 0.5, 0, 0], [0, 0, 0, 0]])
    for given in (mask, Image.fromarray(mask), mask > 0, mask / 255, torch.from_numpy(mask)):
        torch.testing.assert_close(layout_regions({"a": given}, ["a"], (2, 4))[0], wanted)
    larger = layout_regions({"a": mask[::2, ::2]}, ["a"], (4, 8))[0]
    assert larger.shape == (4, 8) and larger[0, 0] == 1 and larger[3, 7] == 0


def test_a_person_without_a_place_may_be_anywhere_outside_the_others() -> None:
    regions = layout_regions({"a": (0, 0, 0.25, 1)}, ["a", "b", "c"], (1, 4))
    assert regions[:, 0].tolist() == [[1, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]]


def test_a_tenth_of_the_smaller_box_may_overlap() -> None:
    layout_regions({"a": (0, 0, 0.5, 1), "b": (0.45, 0, 0.95, 1)}, ["a", "b"], (4, 4))
    with pytest.raises(ConfigError, match=r"places of 'a' and 'b' overlap by 33% of the smaller one"):
        layout_regions({"a": (0, 0, 0.8, 1), "b": (0.7, 0, 1, 0.3), "c": (0.78, 0, 0.88, 1)}, ["a", "c", "b"], (4, 4))
    with pytest.raises(ConfigError, match=r"'a' and 'b' overlap by 100%"):
        layout_regions({"a": (0, 0, 1, 1), "b": (0.4, 0.4, 0.5, 0.5)}, ["a", "b"], (4, 4))
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 2:4] = 255
    with pytest.raises(ConfigError, match=r"'a' and 'b' overlap by 50%"):
        layout_regions({"b": mask, "a": (0, 0, 0.375, 1)}, ["a", "b"], (4, 4))
    with pytest.raises(ConfigError, match=r"'a' and 'b' overlap by 100%"):
        layout_regions({"a": mask, "b": mask}, ["a", "b"], (4, 4))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("right to left", "layout='right to left' is unknown: give 'left to right'"),
        ({}, "is unknown"),
        (3, "layout=3 is unknown"),
        ({"e": (0, 0, 1, 1)}, "names 'e', but the references are for 'a' and 'b'"),
        ({"a": (0, 0, 1.5, 1)}, r"box \(0, 0, 1.5, 1\) of 'a' is outside the picture"),
        ({"a": (-0.1, 0, 1, 1)}, "outside the picture"),
        ({"a": (0.5, 0, 0.5, 1)}, "is empty: left must be below right"),
        ({"a": (0, 0, 1)}, "must be a box of four numbers"),
        ({"a": "left"}, "must be a box of four numbers"),
        ({"a": (0, 0, float("nan"), 1)}, "must be a box of four numbers"),
        ({"a": None}, "must be a box of four numbers"),
        ({"a": np.ones((4, 4))}, r"mask of 'a' has the shape \(4, 4\), but .* are as 4 to 8"),
        ({"a": np.ones((4, 8, 3), np.uint8)}, "has the shape"),
        ({"a": np.zeros((4, 8))}, "mask of 'a' is empty"),
        ({"a": np.full((4, 8), 2.0)}, "numbers from 0 to 1"),
        ({"a": np.full((4, 8), np.nan)}, "numbers from 0 to 1"),
    ],
)  # fmt: skip
def test_layouts_that_cannot_be_used_raise_one_sentence(layout: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        call_regions(layout, [request("a", "b")], (4, 8))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_pictures_of_a_batch_have_their_own_people() -> None:
    requests = [request("b", "a"), request("a"), request()]
    regions = call_regions(HALVES, requests, (1, 2), copies=2)
    assert regions is not None
    assert regions[:, :, 0].tolist() == [[[0, 1], [1, 0]]] * 2 + [[[1, 0], [0, 0]]] * 2 + [[[0, 0], [0, 0]]] * 2
    assert call_regions(None, requests, (1, 2)) is None and call_regions(LEFT_TO_RIGHT, [request()], (1, 2)) is None
    assert call_regions(LEFT_TO_RIGHT, [request("a"), request("b")], (1, 2)) is None  # everywhere, as without a layout
    with pytest.raises(ConfigError, match="the references have no names"):
        call_regions(HALVES, [Request("-", (Person("", ("x.jpg",)),))], (1, 2))


def test_canvases_keep_heads_as_large_as_in_portraits() -> None:
    assert [canvas_shape(people, 128) for people in range(5)] == [
        (128, 128), (128, 128), (128, 192), (128, 256), (192, 256),
    ]  # fmt: skip
    assert canvas_shape(2, 6, 4) == (8, 8)
    assert trained_people({}) == 1 and trained_people({"people": "4"}) == 4
    for wrong in ("four", "0", "-1", ""):
        with pytest.raises(ConfigError, match="which is no number"):
            trained_people({"people": wrong})


def test_inputs_pass_the_regions_on_in_all_passes_and_select_pictures() -> None:
    rows = torch.arange(6.0).view(2, 3, 1)
    text = (Tokens(rows), {"t5": Tokens(rows + 10)})
    regions = torch.tensor([[[[1.0]], [[0.0]]], [[[0.0]], [[1.0]]]])
    inputs = Inputs(text, text, Tokens(rows, torch.ones(2, 3, dtype=torch.bool)), {"layer": 0.5}, regions=regions)
    _, conditioning = inputs.stacked([(False, False), (True, True)], torch.ones(2))
    assert torch.equal(conditioning.regions[VISION], torch.cat([regions, regions]))
    second = inputs.pictures(torch.tensor([1]))
    assert second.vision is not None and second.vision.mask is not None
    assert torch.equal(second.text[1]["t5"].values, rows[1:] + 10) and torch.equal(second.vision.values, rows[1:])
    assert second.regions is not None and torch.equal(second.regions, regions[1:]) and second.factors == {"layer": 0.5}
    assert inputs.stacked([(True, False)], torch.ones(2))[1].regions == {}
    assert inputs.rows(torch.tensor([0]), None).stacked([(True, True)], torch.ones(1))[1].regions == {}
