"""The parts of a photo that public adapters read."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from imagine.people.crops import TEMPLATE, TEMPLATE_SIDE, align, crop_as_trained, square_with
from imagine.people.faces import KnownBoxesFinder, crop_face
from imagine.records import FaceBox

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255))


def marked(scale: float, degrees: float, shift: tuple[float, float]) -> tuple[Image.Image, FaceBox]:
    """Return a picture with a dot of one colour at each landmark of a turned, scaled and moved template."""
    angle = np.deg2rad(degrees)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = TEMPLATE @ turn.T + np.array(shift)
    image = Image.new("RGB", (600, 650), (128, 128, 128))
    for (across, down), colour in zip(points, COLOURS, strict=True):
        ImageDraw.Draw(image).ellipse((across - 9, down - 9, across + 9, down + 9), fill=colour)
    left, top = points.min(0)
    landmarks = tuple((float(x), float(y)) for x, y in points)
    return image, FaceBox(float(left), float(top), 200.0, 200.0, 1.0, landmarks)


@pytest.mark.parametrize(("scale", "degrees"), [(2.0, 0.0), (2.5, 25.0), (1.5, -40.0), (4.0, 10.0)])
def test_landmarks_come_to_the_places_of_the_template(scale: float, degrees: float) -> None:
    image, face = marked(scale, degrees, (150.0, 120.0))
    for size in (112, 224):
        aligned = np.asarray(align(image, face, size))
        for (across, down), colour in zip(TEMPLATE * size / TEMPLATE_SIDE, COLOURS, strict=True):
            assert np.abs(aligned[round(down), round(across)].astype(int) - colour).max() < 40


def test_a_face_without_landmarks_is_aligned_by_its_box() -> None:
    image = Image.new("RGB", (400, 400), (128, 128, 128))
    ImageDraw.Draw(image).rectangle((160, 160, 240, 260), fill=(255, 0, 0))
    aligned = np.asarray(align(image, FaceBox(160, 160, 80, 100, 1.0), 112)).astype(int)
    red = (aligned[..., 0] > 200) & (aligned[..., 1] < 60)
    rows, columns = np.nonzero(red.any(1))[0], np.nonzero(red.any(0))[0]
    assert 78 <= rows[-1] - rows[0] <= 88 and 60 <= columns[-1] - columns[0] <= 72
    assert rows[-1] in range(104, 113)  # the chin is near the lower edge, as in the template


def test_the_square_is_the_centre_unless_the_face_is_elsewhere() -> None:
    image = Image.fromarray(np.arange(100 * 200 * 3, dtype=np.uint32).reshape(100, 200, 3).astype(np.uint8))
    centre = np.asarray(image.crop((50, 0, 150, 100)))
    assert np.array_equal(np.asarray(square_with(image, None, 100)), centre)
    assert np.array_equal(np.asarray(square_with(image, FaceBox(90, 40, 20, 20, 1.0), 100)), centre)
    right = np.asarray(square_with(image, FaceBox(170, 40, 20, 20, 1.0), 100))
    assert np.array_equal(right, np.asarray(image.crop((100, 0, 200, 100))))
    tall = Image.new("RGB", (100, 300))
    tall.paste((255, 0, 0), (40, 20, 60, 40))
    assert (np.asarray(square_with(tall, FaceBox(40, 20, 20, 20, 1.0), 100))[..., 0] == 255).sum() == 400


def test_each_kind_cuts_its_own_part() -> None:
    image, face = marked(2.0, 0.0, (150.0, 120.0))
    crop = crop_face(image, KnownBoxesFinder([face]), 64)
    kinds = {
        kind: crop_as_trained(image, crop, kind, 64) for kind in ("masked", "aligned", "aligned-masked", "picture")
    }
    assert kinds["masked"] is crop
    assert all(each.image.size == (64, 64) and each.box == face for each in kinds.values())
    pixels = {kind: np.asarray(each.image).astype(int) for kind, each in kinds.items()}
    assert (pixels["aligned-masked"][0, 0] == 128).all() and (
        pixels["aligned-masked"][32, 32] == pixels["aligned"][32, 32]
    ).all()
    assert (pixels["aligned"] != pixels["picture"]).any()
    nobody = crop_face(image, KnownBoxesFinder([]), 64, on_no_face="whole")
    assert crop_as_trained(image, nobody, "aligned", 64).image.size == (64, 64)
