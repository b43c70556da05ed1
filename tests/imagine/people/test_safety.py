"""The safety classifier from an image classifier of transformers, at a tiny random size."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from imagine.errors import ConfigError, WeightsError
from imagine.people.safety import ImageClassifier


def classifier(folder: Path, bias: float, labels: tuple[str, str] = ("normal", "nsfw")) -> Path:
    """Save a classifier of two labels whose second one gets this much more than the first."""
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=16,
        id2label=dict(enumerate(labels)), label2id={label: number for number, label in enumerate(labels)},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, bias]))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_labels_that_are_not_harmless_flag_with_a_reason(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 40), "red")
    assert ImageClassifier(classifier(tmp_path / "a", -2)).check_photo(picture) == ""
    reason = ImageClassifier(classifier(tmp_path / "b", 2)).check_picture(picture, "x", 1)
    assert reason == "The classifier b says 'nsfw' with probability 0.88."
    assert ImageClassifier(tmp_path / "b", threshold=0.9).check_photo(picture) == ""


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no folder"):
        ImageClassifier(tmp_path / "none")
    with pytest.raises(WeightsError, match="no image classifier"):
        ImageClassifier(tmp_path)
    with pytest.raises(ConfigError, match="the labels cat, dog: say which are harmless"):
        ImageClassifier(classifier(tmp_path / "a", 0, ("cat", "dog")))
