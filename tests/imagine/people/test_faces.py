"""Training and inference share one crop geometry, and finders find only faces."""

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from imagine.errors import FaceError, WeightsError
from imagine.people import photo_finder
from imagine.people.faces import (
    AutoFinder,
    CascadeFinder,
    CombinedFinder,
    InsightFaceFinder,
    KnownBoxesFinder,
    LearnedFinder,
    crop_face,
    crop_faces,
    crop_unmasked,
    default_finder,
    ellipse,
    non_maximum_suppression,
    sharpness,
)
from imagine.people.finder import Finder, save_finder
from imagine.people.photo_finder import YuNetFinder
from imagine.people.photos import open_photo
from imagine.records import FaceBox
from tests.tiny_insightface import tiny_detector, tiny_recogniser


# --- crop geometry ----------------------------------------------------------------------------------------------------
def ramp(width: int, height: int) -> Tensor:
    """Return (1, 3, H, W): red is x and green is y, in pixels / 256, at pixel centres; blue is 1."""
    x, y = (torch.arange(width) + 0.5) / 256, (torch.arange(height) + 0.5) / 256
    return torch.stack((x.expand(height, -1), y[:, None].expand(-1, width), torch.ones(height, width)))[None]


@pytest.mark.parametrize(("box", "size"), [((90.0, 110.0, 40.0, 30.0), 80), ((101.5, 97.25, 20.0, 33.0), 16)])
def test_crop_shows_the_square_that_the_contract_names(box: tuple[float, ...], size: int) -> None:
    left, top, width, height = box
    side = 1.75 * max(width, height)  # the shipped weights are trained with this number
    first_x = left + width / 2 - side / 2
    first_y = top + height / 2 - 0.15 * height - side / 2
    square = crop_unmasked(ramp(256, 256), torch.tensor([box]), size)[0]
    places = (torch.arange(size) + 0.5) * side / size
    assert torch.allclose(square[0], ((first_x + places) / 256).expand(size, -1), atol=1e-4)
    assert torch.allclose(square[1], ((first_y + places) / 256)[:, None].expand(-1, size), atol=1e-4)


def test_background_and_outside_are_grey() -> None:
    crop = crop_faces(torch.ones(1, 3, 64, 64), torch.tensor([[16.0, 20.0, 32.0, 32.0]]), 64)[0]
    assert torch.all(crop[:, :, 0] == 0.5) and torch.all(crop[:, 0, :16] == 0.5)
    assert torch.equal(crop[:, 32, 32], torch.ones(3))
    beyond = crop_unmasked(torch.ones(1, 3, 64, 64), torch.tensor([[-16.0, 20.0, 32.0, 32.0]]), 64)[0]
    assert torch.all(beyond[:, :, :31] == 0.5) and torch.all(beyond[:, 20:40, 34:] == 1)


def test_mask_is_the_ellipse() -> None:
    mask = ellipse(200)
    wide, high = int((mask[100] > 0).sum()), int((mask[:, 100] > 0).sum())
    assert abs(wide - 0.92 * 200) <= 2 and abs(high - 200) <= 2
    assert mask.max() == 1 and (mask - mask.flip(0)).abs().max() < 1e-5 and (mask - mask.flip(1)).abs().max() < 1e-5


def test_shrinking_does_not_alias() -> None:
    stripes = (torch.arange(512) % 2).float().expand(1, 3, 512, 512)
    square = crop_unmasked(stripes, torch.tensor([[100.0, 110.0, 200.0, 200.0]]), 32)
    assert (square - 0.5).abs().max() < 0.06  # a plain bilinear sample is 0.5 off


def test_rows_are_independent() -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 3, 96, 96)
    boxes = torch.tensor([[30.0, 30.0, 20.0, 22.0], [10.0, 20.0, 70.0, 60.0], [40.0, 40.0, 8.0, 8.0]])
    together = crop_faces(images, boxes, 24)
    for row in range(3):
        assert torch.equal(together[row : row + 1], crop_faces(images[row : row + 1], boxes[row : row + 1], 24))


def test_crop_passes_gradients() -> None:
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    crop_faces(images, torch.tensor([[16.0, 16.0, 30.0, 30.0]]), 16).sum().backward()
    assert images.grad is not None and images.grad[0, :, 30, 30].min() > 0 and images.grad[0, :, 0, 0].abs().max() == 0


def test_boxes_must_fit_the_pictures() -> None:
    with pytest.raises(FaceError, match="one box for each picture"):
        crop_faces(torch.zeros(2, 3, 8, 8), torch.zeros(1, 4), 8)


# --- choosing ---------------------------------------------------------------------------------------------------------
PICTURE = Image.effect_noise((200, 100), 60).convert("RGB")
LARGE, MIDDLE, SMALL = (
    FaceBox(5, 20, 50, 50, 0.9),
    FaceBox(85, 40, 30, 30, 0.8),
    FaceBox(170, 10, 8, 8, 0.7),
)
THREE = KnownBoxesFinder([SMALL, LARGE, MIDDLE])


@pytest.mark.parametrize(("face", "box"), [("largest", LARGE), ("centre", MIDDLE), (0, LARGE), (1, MIDDLE), (2, SMALL)])
def test_the_chosen_face(face: Any, box: FaceBox) -> None:
    crop = crop_face(PICTURE, THREE, 32, face)
    assert crop.box == box and crop.found == (LARGE, MIDDLE, SMALL) and crop.found[crop.index] == box
    assert crop.image.size == (32, 32)


def test_crop_face_is_crop_faces() -> None:
    tensor = torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None] / 255
    expected = crop_faces(tensor, torch.tensor([[85.0, 40.0, 30.0, 30.0]]), 32)[0]
    shown = torch.from_numpy(np.array(crop_face(PICTURE, THREE, 32, 1).image)).permute(2, 0, 1) / 255
    assert (shown - expected).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("face", "words"),
    [(3, r"holds 3 faces, so there is no face=3: choose 0 \(the largest\) to 2"), (-1, "unknown"), ("left", "unknown")],
)
def test_wrong_choices(face: Any, words: str) -> None:
    with pytest.raises(FaceError, match=words):
        crop_face(PICTURE, THREE, 32, face)


def test_no_face() -> None:
    nobody = KnownBoxesFinder([])
    with pytest.raises(FaceError, match="No face was found"):
        crop_face(PICTURE, nobody, 32)
    whole = crop_face(PICTURE, nobody, 32, on_no_face="whole")
    assert whole.box is None and whole.index == -1 and whole.image.size == (32, 32) and "whole" in whole.quality
    assert whole.image.getpixel((16, 0)) == (128, 128, 128)  # letterboxed, not stretched


def test_quality_says_what_is_poor() -> None:
    assert "holds 3 faces and the largest was used" in crop_face(PICTURE, THREE, 32).quality
    assert "3 faces" not in crop_face(PICTURE, THREE, 32, 1).quality  # an explicit choice needs no reminder
    assert "only 8 pixels wide" in crop_face(PICTURE, THREE, 64, 2).quality
    assert crop_face(PICTURE, KnownBoxesFinder([LARGE]), 64).quality == "good"
    blurred = PICTURE.filter(ImageFilter.GaussianBlur(5))
    assert "blurred" in crop_face(blurred, KnownBoxesFinder([LARGE]), 64).quality


def test_sharpness_falls_with_blur() -> None:
    def measured(radius: float) -> float:
        return crop_face(PICTURE.filter(ImageFilter.GaussianBlur(radius)), KnownBoxesFinder([LARGE]), 64).sharpness

    assert measured(0) > measured(1) > measured(2) > measured(4)
    assert sharpness(torch.full((3, 64, 64), 0.7)) < 1e-9


# --- finding ----------------------------------------------------------------------------------------------------------
def test_merging_keeps_the_higher_score_of_two_and_both_neighbours() -> None:
    sure, double, inner = FaceBox(10, 10, 20, 20, 0.9), FaceBox(12, 11, 22, 20, 0.6), FaceBox(12, 12, 10, 10, 0.5)
    neighbour = FaceBox(28, 10, 21, 21, 0.4)
    assert non_maximum_suppression([double, inner, sure, neighbour]) == (neighbour, sure)


@pytest.fixture(scope="module")
def friends() -> Image.Image:
    """Return a picture of six people at a table: four face the camera, two are turned half aside."""
    data = importlib.import_module("insightface.data")
    return open_photo(np.ascontiguousarray(data.get_image("t1", to_rgb=True)))


@pytest.fixture(scope="module")
def cascade() -> CascadeFinder:
    return CascadeFinder()


FRONTAL = [(110, 335), (515, 350), (790, 420), (1175, 340)]  # centres, estimated by eye


def test_cascade_finds_the_frontal_faces_of_a_group_and_no_fist_or_poker_chip(
    friends: Image.Image, cascade: CascadeFinder
) -> None:
    found = cascade.find(friends)
    assert len(found) == 4
    for seen, box in zip(FRONTAL, sorted(found, key=lambda box: box.left), strict=True):
        assert math.dist(seen, box.centre) < 0.25 * box.width and 90 < box.width < 170


def test_cascade_finds_a_face_that_fills_the_picture_and_a_mirrored_one(
    friends: Image.Image, cascade: CascadeFinder
) -> None:
    tight = friends.crop((1095, 250, 1255, 410))
    (box,) = cascade.find(tight)
    assert math.dist(box.centre, (80, 90)) < 25
    (mirrored,) = cascade.find(tight.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert abs(mirrored.centre[0] - (160 - box.centre[0])) < 8


@pytest.mark.parametrize("name", ["text", "chelsea"])
def test_cascade_finds_no_face_in_a_picture_without_people(name: str, cascade: CascadeFinder) -> None:
    picture = getattr(importlib.import_module("skimage.data"), name)()
    assert cascade.find(open_photo(picture)) == ()


def test_rotated_photo_gives_the_same_crop(friends: Image.Image, cascade: CascadeFinder, tmp_path: Path) -> None:
    part = friends.crop((1020, 180, 1280, 480))
    exif = Image.Exif()
    exif[0x0112] = 6
    part.rotate(90, expand=True).save(tmp_path / "phone.png", exif=exif)
    upright = crop_face(open_photo(part), cascade, 64)
    turned = crop_face(open_photo(tmp_path / "phone.png"), cascade, 64)
    assert turned.box == upright.box and np.array_equal(np.array(turned.image), np.array(upright.image))


def test_learned_finder_returns_boxes_in_the_pictures_own_pixels() -> None:
    # An untrained network finds "faces" anywhere; only the positions matter. The wide picture, its letterboxed square
    # and the picture ten times as large must have the same positions.
    torch.manual_seed(0)
    finder = LearnedFinder(Finder(side=64, width=8), threshold=1e-6)
    wide = Image.new("RGB", (64, 32), (200, 30, 90))
    square = Image.new("RGB", (64, 64), (128, 128, 128))
    square.paste(wide, (0, 16))
    found = finder.find(wide)
    assert found
    inside = [box for box in finder.find(square) if 16 <= box.centre[1] < 48]
    larger = finder.find(wide.resize((640, 320)))
    for box, seen in zip(found, inside, strict=True):
        assert (box.left, box.top + 16, box.width, box.height) == pytest.approx(corners(seen))
    for box, seen in zip(found, larger, strict=True):
        assert [10 * value for value in corners(box)] == pytest.approx(corners(seen))
    assert LearnedFinder(finder.network, threshold=0.99).find(wide) == ()


def corners(box: FaceBox) -> tuple[float, float, float, float]:
    return box.left, box.top, box.width, box.height


def test_combined_finder_merges() -> None:
    twice = CombinedFinder([KnownBoxesFinder([LARGE, MIDDLE]), KnownBoxesFinder([FaceBox(6, 21, 50, 50, 0.5), SMALL])])
    assert twice.find(PICTURE) == (LARGE, MIDDLE, SMALL)


def test_the_default_finder_is_yunet_for_photographs_and_our_network_for_drawings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_finder(Finder(side=64, width=8), tmp_path)
    auto = default_finder(tmp_path)
    assert isinstance(auto, AutoFinder) and isinstance(auto.photos, YuNetFinder)
    assert isinstance(default_finder(None), YuNetFinder)
    monkeypatch.setattr(photo_finder, "is_installed", lambda: False)
    assert isinstance(default_finder(None), CascadeFinder)


# --- insightface, through its own classes -----------------------------------------------------------------------------
def bright_quarter() -> Image.Image:
    """Return 128 x 128 pixels, black with a white lower right quarter: a cell of the tiny detector at half size."""
    image = Image.new("RGB", (128, 128))
    image.paste("white", (64, 64, 128, 128))
    return image


def test_insightface_detectors_return_our_kind_of_box(tmp_path: Path) -> None:
    (box,) = InsightFaceFinder(tiny_detector(tmp_path / "det.onnx")).find(bright_quarter())
    # The detector's box is (40, 40) to (56, 56) of 64 pixels, so (80, 80) to (112, 112) here; ours begins lower.
    assert (box.left, box.width) == pytest.approx((80, 32))
    assert box.top == pytest.approx(80 + 0.12 * 32) and box.top + box.height == pytest.approx(112)
    assert box.score > 0.99
    assert InsightFaceFinder(tmp_path / "det.onnx").find(Image.new("RGB", (128, 128))) == ()


def test_insightface_packs_by_name_by_folder_and_one_folder_too_deep(tmp_path: Path) -> None:
    pack = tmp_path / "models" / "tiny_pack" / "tiny_pack"
    tiny_detector(pack / "det.onnx")
    tiny_recogniser(pack / "recogniser.onnx")
    by_name = InsightFaceFinder("tiny_pack", root=tmp_path)
    by_folder = InsightFaceFinder(pack)
    assert by_name.find(bright_quarter()) == by_folder.find(bright_quarter()) != ()


def test_insightface_never_downloads(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no InsightFace model pack buffalo_l"):
        InsightFaceFinder("buffalo_l", root=tmp_path)
    assert not list(tmp_path.iterdir())
    recogniser = tiny_recogniser(tmp_path / "pack" / "recogniser.onnx")
    with pytest.raises(WeightsError, match="not a face detector"):
        InsightFaceFinder(recogniser)
    with pytest.raises(WeightsError, match="holds no face detector"):
        InsightFaceFinder(recogniser.parent)
