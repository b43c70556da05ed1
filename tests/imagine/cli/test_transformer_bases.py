"""`imagine generate --base` with diffusion transformers, from folders as their publishers save them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import tiny_transformer_folders
from tests.commands import Run

NAMES = tuple(tiny_transformer_folders.SHORT_NAMES.values())
SIDES = {"qwen": 16, "sana": 512}  # pixels; 8 elsewhere


@pytest.mark.parametrize("name", NAMES)
def test_a_person_is_drawn_from_a_folder(run: Run, name: str, photo: Path, tmp_path: Path) -> None:
    base = tiny_transformer_folders.save_base(tmp_path / "base", name)
    adapter = tiny_transformer_folders.save_adapter(tmp_path / "adapter", name)
    side = SIDES.get(name, 8)

    def draw(file: str, *more: Any) -> "np.ndarray[Any, Any]":
        code, out, err = run(
            "generate", "--base", base, "--adapter", adapter, "--reference", photo, "--prompt", "a person on a beach",
            "--output", tmp_path / file, "--seed", "7", "--steps", "1", "--width", side, "--height", side,
            "--device", "cpu", "--no-watermark", "--json", *more,
        )  # fmt: skip
        assert code == 0, err
        found = json.loads(out)
        assert found["base"] == str(base) and found["faces"][0]["found"] == 1
        return np.asarray(Image.open(found["images"][-1]))

    shown = draw("a.png")
    assert shown.shape == (side, side, 3)
    assert (draw("b.png", "--identity-scale", "0") != shown).any()
    if name == "z_image":  # what each switch does is the same elsewhere
        assert (draw("c.png", "--num-images", "2", "--batch", "1", "--offload", "model") != shown).any()
        assert (np.asarray(Image.open(tmp_path / "c-1.png")) == shown).all()
