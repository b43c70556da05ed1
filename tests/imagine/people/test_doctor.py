"""The doctor's reports name the defects of a photo and what an installation lacks, and convert to JSON."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from imagine.errors import ConfigError, PictureError
from imagine.people.doctor import COMPONENTS, device_for, report_installation, report_photo
from imagine.people.faces import KnownBoxesFinder
from imagine.records import FaceBox
from tests import pictures

NOISE = Image.effect_noise((200, 160), 60).convert("RGB")
FACE = FaceBox(70, 50, 60, 60, 0.9)


def test_a_good_photo_needs_no_advice() -> None:
    report = report_photo(NOISE, KnownBoxesFinder([FACE]))
    assert report.quality == "good" and report.advice == () and report.used == 0 and report.faces == (FACE,)
    assert report.crop.image.size == (64, 64) and 0.4 < report.brightness < 0.6 and report.sharpness > 0


def test_facts_are_those_of_the_stored_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "phone.jpg"
    pictures.gradient(160, 120).convert("CMYK").save(path, exif=exif)
    report = report_photo(path, KnownBoxesFinder([FACE]))
    assert (report.name, report.format, report.mode) == (str(path), "JPEG", "CMYK")
    assert report.size == (160, 120) and report.orientation == 6


@pytest.mark.parametrize(
    ("image", "boxes", "words"),
    [
        (NOISE, [], "No face was found"),
        (NOISE, [FACE, FaceBox(5, 5, 40, 40, 0.5)], "holds 2 faces"),
        (NOISE, [FaceBox(70, 50, 10, 10, 0.9)], "only 10 pixels wide"),
        (NOISE, [FaceBox(-20, 50, 60, 60, 0.9)], "cut off at the picture's edge"),
        (NOISE.filter(ImageFilter.GaussianBlur(6)), [FACE], "blurred"),
        (NOISE.point(lambda value: value // 8), [FACE], "very dark"),
        (NOISE.point(lambda value: 245 + value // 26), [FACE], "overexposed"),
    ],
)
def test_advice_names_the_problem(image: Image.Image, boxes: list[FaceBox], words: str) -> None:
    advice = report_photo(image, KnownBoxesFinder(boxes)).advice
    assert any(words in sentence for sentence in advice)
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in advice)


def test_photo_report_survives_json() -> None:
    plain = report_photo(NOISE, KnownBoxesFinder([FACE])).as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["faces"] == [{"left": 70, "top": 50, "width": 60, "height": 60, "score": 0.9}]


def test_unreadable_photo_is_still_an_error(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="There is no file"):
        report_photo(tmp_path / "nobody.jpg", KnownBoxesFinder([]))


def test_installation_without_weights_says_how_to_get_them() -> None:
    report = report_installation(None)
    assert report.weights is None and report.components == {} and "make weights" in report.advice[0]
    assert report.versions["torch"] and report.finders["cascade"] and not report.finders["learned"]
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()


def test_the_device_is_one_that_torch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, best in ((True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda mps=mps: mps)
        assert device_for("auto") == best and device_for(best) == best and device_for("cpu") == "cpu"
    with pytest.raises(ConfigError, match=r"no device cuda here: choose cpu, or leave --device out\.$"):
        device_for("cuda")
    assert report_installation(None).device == "cpu"


def test_installation_names_the_missing_components(tmp_path: Path) -> None:
    for name in COMPONENTS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"12345")
    complete = report_installation(tmp_path)
    assert complete.components == dict.fromkeys(COMPONENTS, 5) and complete.finders["learned"]
    assert not any("weights" in sentence for sentence in complete.advice)
    (tmp_path / "unet" / "model.safetensors").unlink()
    assert any("lacks unet:" in sentence for sentence in report_installation(tmp_path).advice)
