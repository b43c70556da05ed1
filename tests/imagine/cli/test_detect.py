"""`imagine detect`, and what `imagine generate` writes by default and with its switches."""

import json
from pathlib import Path

from PIL import Image

from tests.commands import Run, assert_refused, generate


def test_generate_marks_and_detect_reads(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x8825] = "CanaryCamera", {1: "N", 2: (52.0, 31.0, 12.0), 29: "CanaryDate"}
    with Image.open(photo) as plain:
        plain.save(tmp_path / "located.jpg", quality=95, exif=exif)
    (tmp_path / "out").mkdir()
    picture, crop = tmp_path / "out" / "a.jpg", tmp_path / "out" / "crop.jpg"
    code, out, err = run(*generate(weights, tmp_path / "located.jpg", picture, "--save-crop", crop))
    assert code == 0 and "Canary" not in out + err
    for file in (picture, crop):
        assert b"Canary" not in file.read_bytes() and b"located" not in file.read_bytes()
        with Image.open(file) as saved:
            assert 0x8825 not in saved.getexif()
    code, out, _ = run("detect", picture)
    assert code == 0 and out.startswith("The content credentials are intact") and "smiling on a beach" in out

    switches = ["--no-metadata", "--no-credentials", "--no-watermark"]
    assert run(*generate(weights, photo, tmp_path / "b.png", *switches))[0] == 0
    found = json.loads(run("detect", tmp_path / "b.png", "--json")[1])
    assert found["record"] is None and found["credentials"] is None and found["parameters"] is None
    assert_refused(*run("detect", tmp_path / "none.png"))
    assert_refused(*run("detect", weights / "model_index.json"))
