"""Which network compares drawings, its limit, and that a saved pipeline keeps it."""

import shutil
from pathlib import Path

import pytest
import torch

from imagine.errors import WeightsError
from imagine.networks.recogniser import AnyRecogniser, Recogniser, TransformerRecogniser
from imagine.people.drawing_recogniser import SAME_PERSON, DrawingRecogniser
from imagine.pipeline.pipeline import ImaginePipeline
from tests import tiny
from tests.root import ROOT


def tiny_recogniser(limit: "float | None" = None) -> AnyRecogniser:
    torch.manual_seed(0)
    return TransformerRecogniser(
        size=32, width=16, depth=1, heads=2, feedforward=16, thin=4, dimensions=6, limit=limit
    )  # fmt: skip


def loaded(weights: Path) -> DrawingRecogniser:
    recogniser = DrawingRecogniser.from_weights(weights)
    assert recogniser is not None
    return recogniser


def test_pictures_are_checked_by_another_network_than_the_judges(tmp_path: Path) -> None:
    assert DrawingRecogniser.from_weights(tmp_path) is None
    Recogniser(size=32, widths=(8, 8, 8, 16), dimensions=6).save(tmp_path / "judge" / "recogniser")
    older = loaded(tmp_path)  # weights without a network of their own for it
    assert isinstance(older.network, Recogniser) and older.same == SAME_PERSON
    tiny_recogniser(limit=0.625).save(tmp_path / "recogniser")
    assert isinstance(loaded(tmp_path).network, TransformerRecogniser) and loaded(tmp_path).same == 0.625
    (tmp_path / "recogniser" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="is missing; train it"):  # never the judge's instead
        DrawingRecogniser.from_weights(tmp_path)


def test_a_saved_pipeline_keeps_the_recogniser_of_its_weights(tmp_path: Path) -> None:
    home = tmp_path / "weights"
    shutil.copytree(ROOT / "weights" / "finder", home / "finder")
    tiny_recogniser(limit=0.5).save(home / "recogniser")
    pipe = tiny.pipeline()
    pipe._finder_folder = home / "finder"
    pipe.save_pretrained(tmp_path / "saved")
    again = ImaginePipeline.from_pretrained(tmp_path / "saved")
    recogniser = again._picture_recogniser()
    assert isinstance(recogniser, DrawingRecogniser) and recogniser.same == 0.5
