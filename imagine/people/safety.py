"""A hook for safety classifiers: it checks prompts and photos before a call draws, and pictures after.

No classifier is on by default, and none comes with this project. A flagged prompt or photo is refused with the reason;
a flagged picture is returned as it is, with the reason beside it, and never replaced by a black one. What then happens
is for the caller to decide: `imagine generate` does not write it.
"""

import json
import os
from collections.abc import Collection, Iterable
from typing import Any, Protocol

import torch
from PIL import Image

from imagine.errors import ConfigError, SafetyError, WeightsError
from imagine.paths import as_path, kind_of, shorten_path

HARMLESS = ("normal", "sfw", "safe", "neutral", "drawings", "drawing")  # labels of common classifiers that flag nothing
THRESHOLD = 0.5  # of the sum of the probabilities of all other labels


class SafetyClassifier(Protocol):
    """Each method returns one sentence that says why its input is flagged, or "" for one that is not."""

    name: str  # recorded in pictures

    def check_prompt(self, prompt: str, people: int) -> str:
        """Check the sentence of a picture that is to show this many people."""
        ...

    def check_photo(self, image: Image.Image) -> str:
        """Check a reference, an upright RGB picture."""
        ...

    def check_picture(self, image: Image.Image, prompt: str, people: int) -> str:
        """Check a picture that was drawn."""
        ...


class ImageClassifier:
    """A safety classifier from an image classifier of transformers, such as Falconsai/nsfw_image_detection.

    It checks photos and pictures, and no prompts.
    """

    def __init__(
        self, folder: "str | os.PathLike[str]", harmless: Collection[str] = HARMLESS, threshold: float = THRESHOLD
    ) -> None:
        """Load the classifier from a folder. Raises WeightsError if it does not fit, ConfigError for its labels."""
        path = as_path(folder)
        if kind_of(path, WeightsError) != "folder":
            raise WeightsError(f"There is no folder {shorten_path(folder)}: name the folder of an image classifier.")
        try:
            from transformers import AutoImageProcessor, AutoModelForImageClassification

            self._processor: Any = AutoImageProcessor.from_pretrained(path, local_files_only=True)
            self._model: Any = AutoModelForImageClassification.from_pretrained(
                path, local_files_only=True, use_safetensors=True
            ).eval()
        except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
            reason = str(error).strip().split("\n")[0][:200].rstrip(".")
            raise WeightsError(f"{path} is no image classifier that can be loaded ({reason}).") from error
        labels = {int(number): str(label) for number, label in self._model.config.id2label.items()}
        self.name, self._threshold = path.name, threshold
        self._flagging = {number: label for number, label in labels.items() if label.lower() not in harmless}
        if len(self._flagging) in (0, len(labels)):
            raise ConfigError(
                f"The classifier {path} has the labels {', '.join(labels.values())}: say which are harmless, as in "
                "ImageClassifier(FOLDER, harmless=[...])."
            )

    def check_prompt(self, prompt: str, people: int) -> str:
        """Flag nothing, since this classifier reads pictures only."""
        return ""

    @torch.inference_mode()
    def check_photo(self, image: Image.Image) -> str:
        """Return the likeliest label that is not harmless, if all of these together reach the threshold."""
        inputs = self._processor(images=image.convert("RGB"), return_tensors="pt")
        shares = self._model(**inputs).logits[0].softmax(0)
        total = float(sum(shares[number] for number in self._flagging))
        if total < self._threshold:
            return ""
        label = self._flagging[max(self._flagging, key=lambda number: float(shares[number]))]
        return f"The classifier {self.name} says {label!r} with probability {total:.2f}."

    def check_picture(self, image: Image.Image, prompt: str, people: int) -> str:
        """Check a picture as a photo is checked."""
        return self.check_photo(image)


def refuse_flagged(reason: str, what: str) -> None:
    """Raise SafetyError if there is a reason; `what` names what was checked, such as "The prompt"."""
    if reason:
        raise SafetyError(f"{what} is refused by the safety classifier: {reason.rstrip('.')}; choose another one.")


def check_prompts(classifier: SafetyClassifier | None, prompts: Iterable[tuple[str, int]]) -> None:
    """Raise SafetyError if one of these prompts, each with its number of people, is flagged."""
    for prompt, people in prompts if classifier is not None else ():
        assert classifier is not None
        refuse_flagged(classifier.check_prompt(prompt, people), "The prompt")
