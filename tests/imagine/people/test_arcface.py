"""Embeddings of faces through insightface's own classes, with a network that averages each colour."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagine.errors import WeightsError
from imagine.people.arcface import InsightFaceEmbedder
from imagine.records import FaceBox
from tests.tiny_insightface import tiny_detector, tiny_recogniser


def test_a_pack_embeds_the_aligned_face_and_gives_its_name(tmp_path: Path) -> None:
    pack = tmp_path / "models" / "tiny_pack"
    tiny_detector(pack / "det.onnx")
    tiny_recogniser(pack / "recogniser.onnx")
    embedder = InsightFaceEmbedder("tiny_pack", root=tmp_path)
    image = Image.new("RGB", (200, 200), (0, 0, 255))
    image.paste((255, 0, 0), (100, 0, 200, 200))  # the right half is red
    left, right = (embedder.embed(image, FaceBox(across, 80, 30, 30, 1.0)) for across in (35, 135))
    assert embedder.name == "tiny_pack" and left.shape == (3,) and left.dtype == np.float32
    assert left == pytest.approx([-1, -1, 1], abs=0.01) and right == pytest.approx([1, -1, -1], abs=0.01)


def test_a_pack_that_is_missing_or_has_no_recogniser_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no InsightFace model pack buffalo_l"):
        InsightFaceEmbedder(root=tmp_path)
    detector = tiny_detector(tmp_path / "pack" / "det.onnx")
    with pytest.raises(WeightsError, match="holds no recognition network"):
        InsightFaceEmbedder(detector.parent)
