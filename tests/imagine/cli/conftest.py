"""Weights and a photo for the tests of the commands."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from skimage import data

from tests import tiny


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def refining(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, with the second pass over small faces as their default."""
    folder = Path(shutil.copytree(weights, tmp_path_factory.mktemp("refining") / "weights"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "default_refine_faces": True}))
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph with one face, which the default detector finds."""
    path = tmp_path_factory.mktemp("photos") / "astronaut.jpg"
    Image.fromarray(data.astronaut()).crop((110, 0, 350, 240)).save(path)
    return path
