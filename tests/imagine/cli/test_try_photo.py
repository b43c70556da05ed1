"""`imagine try`: one page with five pictures, which needs no other file and names no photo."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from tests.commands import Run, assert_refused, generate


def test_the_page_holds_the_face_and_five_pictures(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    page = tmp_path / "me.html"
    usual = ["try", photo, "--weights", weights, "--output", page, "--seed", "7", "--steps", "2"]
    code, out, _ = run(*usual, "--prompt", "<b>smiling</b> on a beach", "--json")
    result = json.loads(out)
    assert code == 0 and result["seed"] == 7 and result["page"] == str(page)
    text = page.read_text()
    assert "&lt;b&gt;smiling" in text and "<b>" not in text and str(photo) not in text
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    pictures = [base64.b64decode(each) for each in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    assert len(pictures) == 2  # the face, and one picture
    assert b"&lt;" not in pictures[1] and b"Seed: 7" in pictures[1] and b"c2pa" in pictures[1]

    again = generate(weights, photo, tmp_path / "again.png", "--prompt", "<b>smiling</b> on a beach")
    assert run(*again)[0] == 0
    both = [np.asarray(Image.open(each)) for each in (io.BytesIO(pictures[1]), tmp_path / "again.png")]
    assert (both[0] == both[1]).all()

    assert run(*usual)[0] == 0
    assert len(re.findall("<figure>", page.read_text())) == 6


def test_mistakes_are_sentences(run: Run, photo: Path, tmp_path: Path) -> None:
    assert_refused(*run("try", "nobody.jpg", "--output", tmp_path / "x.html"))
    assert_refused(*run("try", photo, "--output", tmp_path / "x.png"))
