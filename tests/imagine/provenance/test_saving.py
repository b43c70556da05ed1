"""Saved pictures: marks on by default, each with a switch, pixels as drawn, and nothing else in the file."""

import io
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagine.errors import ConfigError, PictureError
from imagine.paths import data_folder
from imagine.provenance import credentials, saving, watermark
from imagine.provenance.detection import detect
from imagine.provenance.marks import Marks
from imagine.provenance.record import PictureRecord, ShownPerson
from imagine.provenance.saving import encode_picture, numbered_paths, save_picture, write_unmarked

RECORD = PictureRecord("a person on a beach", 7, 20, 5.0, "Euler", "base", "w", "", (ShownPerson("p", "agreed"),))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    smooth = Image.effect_noise((8, 8), 60).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
    return smooth


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp"])
def test_the_marks_of_a_saved_picture_are_detected(picture: Image.Image, tmp_path: Path, ending: str) -> None:
    made = save_picture(picture, tmp_path / f"x{ending}", RECORD)
    assert made.notes == () and made.applied["credentials"] == "on" and made.applied["watermark"].startswith("off")
    found = detect(tmp_path / f"x{ending}")
    assert found.record["seed"] == 7 and found.record["marks"] == made.applied and "Seed: 7" in found.text
    assert found.credentials["state"] == "Valid" and not found.credentials["trusted"]
    assert found.credentials["ai_generated"] and found.credentials["record"]["consent"] == "recorded"
    assert found.verdict.startswith("The content credentials are intact") and not found.watermark["found"]
    assert list(tmp_path.iterdir()) == [tmp_path / f"x{ending}"]


def test_pixels_are_those_that_were_drawn_unless_the_watermark_is_on(picture: Image.Image) -> None:
    large = picture.resize((128, 128), Image.Resampling.BICUBIC)
    for marks, same in ((Marks(), True), (Marks.none(), True), (Marks(watermark=True), False)):
        made = encode_picture(large, "PNG", RECORD, marks)
        saved = np.asarray(Image.open(io.BytesIO(made.data)))
        assert (saved == np.asarray(large)).all() == same or made.applied["watermark"] == "failed"
    plain = io.BytesIO()
    large.save(plain, "PNG", quality=95)
    assert encode_picture(large, "PNG", RECORD, Marks.none()).data == plain.getvalue()


def test_every_switch_is_recorded(picture: Image.Image, tmp_path: Path) -> None:
    save_picture(picture, tmp_path / "x.png", RECORD, Marks(prompt=False, credentials=False, watermark=False))
    found = detect(tmp_path / "x.png")
    assert found.record["marks"] == {"settings": "on", "prompt": "off", "credentials": "off", "watermark": "off"}
    assert found.credentials is None and "beach" not in (tmp_path / "x.png").read_bytes().decode("latin-1")
    assert found.verdict == "The settings in the file say that imagine generated the picture; they are not signed."
    save_picture(picture, tmp_path / "y.png", RECORD, Marks.none())
    found = detect(tmp_path / "y.png")
    assert found.record is None and found.text == "" and found.verdict.startswith("No mark was found")


def test_missing_packages_are_one_note_each_and_no_error(
    picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "is_installed", lambda: False)
    monkeypatch.setattr(watermark, "is_installed", lambda: False)
    made = save_picture(picture.resize((256, 256)), tmp_path / "x.png", RECORD)
    assert [note.split(":")[0] for note in made.notes] == [
        "The picture has no watermark", "The picture has no content credentials",
    ]  # fmt: skip
    found = detect(tmp_path / "x.png")
    assert found.record["marks"]["credentials"] == found.record["marks"]["watermark"] == "not installed"
    assert len(found.notes) == 2 and all("not looked for" in note for note in found.notes)


def test_a_changed_file_is_noticed(picture: Image.Image, tmp_path: Path) -> None:
    data = bytearray(encode_picture(picture, "JPEG", RECORD).data)
    data[-40] ^= 1
    (tmp_path / "x.jpg").write_bytes(bytes(data))
    found = detect(tmp_path / "x.jpg")
    assert found.credentials["state"] == "Invalid" and "broken" in found.verdict and found.credentials["problems"]


def test_metadata_of_a_photo_never_reach_a_saved_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x8825] = "CanaryCamera", {1: "N", 2: (52.0, 31.0, 12.0)}
    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.jpg", exif=exif, comment=b"CanaryComment")
    with Image.open(tmp_path / "in.jpg") as photo:
        assert photo.getexif()[0x010F] == "CanaryCamera"
        for number, ending in enumerate((".jpg", ".png", ".webp")):
            save_picture(photo, tmp_path / f"out{ending}", RECORD, Marks(settings=number == 0))
            write_unmarked(photo, tmp_path / f"crop{ending}")
            for name in (f"out{ending}", f"crop{ending}"):
                assert b"Canary" not in (tmp_path / name).read_bytes()
                with Image.open(tmp_path / name) as saved:
                    assert 0x8825 not in saved.getexif() and 0x010F not in saved.getexif()


def test_the_certificate_is_made_once_and_its_key_is_private(picture: Image.Image) -> None:
    encode_picture(picture, "PNG", RECORD)
    folder = data_folder() / "credentials"
    before = (folder / "certificate.pem").read_bytes()
    encode_picture(picture, "PNG", RECORD)
    assert (folder / "certificate.pem").read_bytes() == before
    assert os.name == "nt" or stat.S_IMODE((folder / "private_key.pem").stat().st_mode) == 0o600


def test_a_certificate_that_cannot_be_used_is_a_note(
    picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGINE_CREDENTIALS", str(tmp_path / "none"))
    made = encode_picture(picture, "PNG", RECORD)
    assert made.applied["credentials"] == "failed" and "IMAGINE_CREDENTIALS" in made.notes[0]


def test_names_and_refusals(picture: Image.Image, tmp_path: Path) -> None:
    assert [path.name for path in numbered_paths(Path("a.png"), 2)] == ["a-1.png", "a-2.png"]
    with pytest.raises(ConfigError, match="must end in"):
        save_picture(picture, tmp_path / "x.gif", RECORD)
    with pytest.raises(ConfigError, match="cannot be written"):
        saving.write_whole(b"", tmp_path / "none" / "x.png")
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(PictureError):
        detect(tmp_path / "x.png")
