"""`imagine enroll`: what it refuses; test_generate.py draws with what it writes."""

from pathlib import Path

import pytest
from PIL import Image
from skimage import data

from tests.commands import Run, assert_refused, terminal


def test_enroll_checks_the_photos_before_it_loads_anything(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")  # loading this file would fail next
    code, out, err = run("enroll", "nobody.jpg", "--weights", tmp_path, "--output", tmp_path / "me.safetensors")
    assert_refused(code, out, err)
    assert "There is no file nobody.jpg" in err


def test_progress_appears_on_a_terminal(
    run: Run, weights: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(monkeypatch) as progress:
        assert run("enroll", photo, photo, "--weights", weights, "--output", tmp_path / "me.safetensors")[0] == 0
    assert "loading the model" in progress[0] and "encoding the photos" in progress[0]


def test_a_photo_of_another_person_is_refused_unless_the_check_is_off(
    run: Run, weights: Path, photo: Path, tmp_path: Path
) -> None:
    Image.fromarray(data.camera()).convert("RGB").save(tmp_path / "other.png")
    arguments = ["enroll", photo, tmp_path / "other.png", "--weights", weights, "--output", tmp_path / "me.safetensors"]
    code, out, err = run(*arguments)
    assert_refused(code, out, err)
    assert "other.png shows another person than the other photos" in err and not (tmp_path / "me.safetensors").exists()
    assert run(*arguments, "--no-identity-check", "--save-crop", tmp_path / "crop.png")[0] == 0
    assert sorted(path.name for path in tmp_path.glob("crop*")) == ["crop-1.png", "crop-2.png"]
