"""Faces in photographs: YuNet, the choice of a finder per picture, turned photos, crops and doubtful faces."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagine.errors import FaceError, ImagineError, WeightsError
from imagine.networks.weights import default_folder
from imagine.people import photo_finder
from imagine.people.faces import (
    AutoFinder,
    LearnedFinder,
    crop_face,
    default_finder,
    find_upright,
)
from imagine.people.photo_finder import YuNetFinder
from imagine.people.photos import open_photo
from imagine.records import FaceBox
from imagine.world import render, render_groups, sample_contexts, sample_people
from tests.photographs import astronaut, portraits

FACE = (171, 69, 103, 103)  # left, top, width, height of the astronaut's face
TEXTURES = ("coffee", "rocket", "brick", "grass", "clock", "moon", "chelsea")


@pytest.fixture(scope="module")
def finder() -> AutoFinder:
    auto = default_finder(default_folder() / "finder")
    assert isinstance(auto, AutoFinder)
    return auto


def pictures(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((each * 255).round().byte().permute(1, 2, 0).numpy()) for each in images]


def near(face: FaceBox, box: "tuple[float, ...] | list[float]") -> bool:
    left, top, width, height = box
    return (
        abs(face.centre[0] - left - width / 2) < 0.3 * width and abs(face.centre[1] - top - height / 2) < 0.3 * height
    )


def test_the_face_of_the_astronaut_wins_over_the_suit(finder: AutoFinder) -> None:
    crop = crop_face(astronaut(), finder, 64)
    assert crop.box is not None and near(crop.box, FACE) and crop.box.finder == "yunet" and crop.box.score > 0.9
    assert len(crop.found) == 1 and len(crop.box.landmarks) == 5 and abs(crop.box.roll) < 0.1
    assert crop.quality == "good" and crop.turned == 0


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_photo_that_lies_on_its_side_gives_the_upright_crop_and_a_note(turn: int, finder: AutoFinder) -> None:
    upright = crop_face(astronaut(), finder, 64)
    crop = crop_face(astronaut().rotate(turn, expand=True), finder, 64)
    assert (crop.turned + turn) % 360 == 0 and "so it was turned by" in crop.quality
    assert np.array_equal(np.array(crop.image), np.array(upright.image))


def test_small_faces_and_close_ups_are_found(finder: AutoFinder) -> None:
    face = astronaut().crop((120, 20, 330, 230))
    scale = 40 / FACE[2]
    small = face.resize((round(210 * scale), round(210 * scale)), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (2048, 1536), (90, 120, 60))
    canvas.paste(small, (700, 300))
    (found,) = finder.find(canvas)
    assert near(found, (700 + 51 * scale, 300 + 49 * scale, 40, 40))
    close_up = astronaut().crop((FACE[0], FACE[1], FACE[0] + FACE[2], FACE[1] + FACE[3]))
    assert near(finder.find(close_up)[0], (0, 0, FACE[2], FACE[3]))


@pytest.mark.parametrize("name", TEXTURES)
def test_no_face_is_found_in_a_picture_without_people(name: str, finder: AutoFinder) -> None:
    picture = open_photo(getattr(importlib.import_module("skimage.data"), name)())
    assert find_upright(picture, finder)[1] == ()


@pytest.mark.parametrize("side", [64, 128, 256])
def test_no_face_is_found_in_noise(side: int, finder: AutoFinder) -> None:
    noise = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    with pytest.raises(FaceError, match="No face was found"):
        crop_face(Image.fromarray(noise), finder, 64)


def test_our_own_network_decides_in_drawings(finder: AutoFinder) -> None:
    seeds = range(7_600_000, 7_600_024)
    drawn = render(sample_people(seeds), sample_contexts(seeds), size=128)
    found = [finder.find(picture) for picture in pictures(drawn.images)]
    assert sum(bool(faces) and faces[0].finder == "learned" for faces in found) >= 20
    hits = [any(near(face, box) for face in faces) for faces, box in zip(found, drawn.boxes.tolist(), strict=True)]
    assert sum(hits) >= 23


def test_all_people_of_a_sheet_and_of_a_group_are_found(finder: AutoFinder) -> None:
    seeds = range(7_600_000, 7_600_016)
    drawn = render(sample_people(seeds), sample_contexts(seeds), size=128)
    sheets, hits = pictures(drawn.images), 0
    for first in range(0, 16, 4):
        sheet = Image.new("RGB", (256, 256))
        for place in range(4):
            sheet.paste(sheets[first + place], (place % 2 * 128, place // 2 * 128))
        faces = finder.find(sheet)
        for place in range(4):
            left, top, width, height = drawn.boxes[first + place].tolist()
            box = (left + place % 2 * 128, top + place // 2 * 128, width, height)
            hits += any(near(face, box) for face in faces)
    assert hits == 16
    groups = render_groups(sample_people(seeds), sample_contexts(seeds), 2, size=192)
    counts = [len(finder.find(picture)) for picture in pictures(groups.images)]
    assert counts == [2] * 8


def test_a_sure_face_elsewhere_makes_the_picture_a_photograph() -> None:
    class Drawn:
        def find(self, image: Image.Image) -> tuple[FaceBox, ...]:
            return (FaceBox(300, 300, 100, 100, 0.9),)

        def find_in_tiles(self, image: Image.Image) -> list[tuple[FaceBox, ...]]:
            return [(), (), (), ()]

    drawings: LearnedFinder = Drawn()  # type: ignore[assignment]
    (face,) = AutoFinder(drawings, YuNetFinder()).find(astronaut())
    assert near(face, FACE)


@pytest.mark.parametrize("width", [1.3, 2.0, 3.0])
def test_a_portrait_photograph_is_no_drawing(width: float, finder: AutoFinder) -> None:
    left, top, side, _ = FACE
    half = width * side / 2
    centre = left + side / 2, top + side / 2
    portrait = astronaut().crop(
        (round(centre[0] - half), round(centre[1] - half), round(centre[0] + half), round(centre[1] + half))
    )
    assert [face.finder for face in finder.find(portrait)] == ["yunet"]


def test_a_much_lower_score_is_never_chosen_by_size() -> None:
    class Known:
        def find(self, image: Image.Image) -> tuple[FaceBox, ...]:
            return FaceBox(0, 0, 300, 300, 0.45), FaceBox(171, 69, 103, 103, 0.9), FaceBox(20, 20, 40, 40, 0.8)

    assert crop_face(astronaut(), Known(), 64).index == 1
    doubtful = crop_face(astronaut(), Known(), 64, face=0)
    assert doubtful.index == 0 and "doubtful that this is a face (score 0.45)" in doubtful.quality


def test_the_crop_is_turned_until_the_eyes_are_level() -> None:
    angle = np.radians(20)  # the picture is turned counter-clockwise around its centre

    def turned(x: float, y: float) -> tuple[float, float]:
        right, down = x - 256, y - 256
        return 256 + np.cos(angle) * right + np.sin(angle) * down, 256 - np.sin(angle) * right + np.cos(angle) * down

    class Known:
        def __init__(self, points: list[tuple[float, float]], centre: tuple[float, float]) -> None:
            self.face = FaceBox(centre[0] - 50, centre[1] - 50, 100, 100, 0.95, tuple(points), "yunet")

        def find(self, image: Image.Image) -> tuple[FaceBox, ...]:
            return (self.face,)

    points = [(200.0, 110.0), (240.0, 110.0), (220.0, 130.0), (205.0, 150.0), (235.0, 150.0)]
    level = crop_face(astronaut(), Known(points, (220, 125)), 64)
    tilted = astronaut().rotate(20, Image.Resampling.BICUBIC)
    aligned = crop_face(tilted, Known([turned(*point) for point in points], turned(220, 125)), 64)
    plain = crop_face(tilted, Known([], turned(220, 125)), 64)
    assert aligned.box is not None and np.isclose(np.degrees(aligned.box.roll), -20)
    differences = [
        np.abs(np.array(crop.image, dtype=np.float64) - np.array(level.image, dtype=np.float64)).mean()
        for crop in (aligned, plain)
    ]
    assert differences[0] < 3 and differences[1] > 4 * differences[0]


def test_another_file_than_the_tested_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    photo_finder.model_file.cache_clear()
    monkeypatch.setattr(photo_finder, "SHA256", "0" * 64)
    with pytest.raises(WeightsError, match="not the file that was tested"):
        YuNetFinder()
    monkeypatch.setattr(photo_finder, "is_installed", lambda: False)
    with pytest.raises(ImagineError, match=r"\[photos\]"):
        YuNetFinder()
    photo_finder.model_file.cache_clear()


@pytest.mark.skipif(not portraits(), reason="IMAGINE_TEST_PORTRAITS names no folder with portraits")
def test_every_published_portrait_gives_one_sure_face(finder: AutoFinder) -> None:
    for name, path in portraits().items():
        crop = crop_face(open_photo(Path(path)), finder, 224)
        assert crop.box is not None and crop.box.score > 0.9 and len(crop.found) == 1, name
