"""Perfusion (arXiv 2305.01644): key-locked rank-one editing of the cross-attention layers.

The subject's word attends where its class attends, because its key is the class's; only its value is learnt, one vector
per layer, and a gate lets it through in the direction of the subject's own text feature. In use, `beta` of the gate
trades likeness against the sentence without further training.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from imagine.errors import ConfigError
from train.methods.bases.text import TextState
from train.methods.learned.weights import Direction, Gate, add_gated, remove_gated
from train.methods.learned.words import LearntWords, position
from train.methods.sentences import NEUTRAL
from train.methods.task import TuningTask
from train.methods.tuned.textual_inversion import WordSettings

# Nouns for the captions whose text features define the covariance; the paper uses 100,000 captions of a data set.
_NOUNS = (
    "person", "man", "woman", "child", "face", "hat", "shirt", "beach", "city", "forest", "room", "dog", "cat", "car",
    "tree", "flower", "balloon", "cup", "house", "mountain", "river", "desert", "crown", "suit", "hoodie", "book",
)  # fmt: skip
_RIDGE = 1e-2


class PerfusionSettings(WordSettings):
    """Settings of the gate, and the captions that it is measured with."""

    captions: Path | None = None  # a file with one caption per line; None: simple sentences about many things
    beta: Annotated[float, Field(gt=0)] = 0.75  # the gate's bias
    tau: Annotated[float, Field(gt=0)] = 0.1  # the gate's temperature
    drawing_beta: Annotated[float, Field(gt=0)] = 0.7  # the gate's bias when drawing
    drawing_tau: Annotated[float, Field(gt=0)] = 0.15


class Perfusion(TuningTask):
    """Learn a word, and one value per cross-attention layer."""

    Settings = PerfusionSettings
    PARTS: ClassVar[tuple[str, ...]] = ("words", "values")
    LEARNS_WORDS: ClassVar[bool] = True
    NAME: ClassVar[str] = "perfusion"

    def build(self) -> None:
        settings = self.settings
        noun = settings.initial or settings.noun or "object"
        feature = self._noun_feature(noun)
        self.direction = Direction(feature.shape[0]).to(feature)
        self.direction.inverse.copy_(self._inverse_covariance())
        self.gate = Gate(settings.beta, settings.tau)
        self.words = LearntWords(self.base, self.naming.tokens, noun, settings.vectors)
        values = add_gated(self.base.unet, self.direction, self.gate, feature.to(self.base.device))
        self.modules |= {"words": self.words, "values": _Values(values, self.direction)}

    def check(self) -> list[str]:
        if len(self.data.photos) > 1:
            raise ConfigError("perfusion learns one subject at a time: give --photos once.")
        return super().check()

    @torch.no_grad()
    def _noun_feature(self, noun: str) -> Tensor:
        """Return the text feature (width,) of the noun's last token."""
        sentence = f"a photo of a {noun}"
        place = len(self.base.readers[0].ids(sentence))  # the start token comes before them
        return self.base.text([sentence]).clip.values[0, place].clone()

    def _captions(self) -> list[str]:
        path = self.settings.captions
        if path is None:
            return [template.format(noun) for template in NEUTRAL for noun in _NOUNS]
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"captions: {path} cannot be read ({error.strerror}): name a text file.") from None
        if not (captions := [line.strip() for line in lines if line.strip()]):
            raise ConfigError(f"captions: {path} holds no caption: write one per line.")
        return captions

    @torch.no_grad()
    def _inverse_covariance(self) -> Tensor:
        """Return C^-1 (width, width) of the text features of many captions."""
        captions = self._captions()
        features = []
        for first in range(0, len(captions), 64):
            text = self.base.text(captions[first : first + 64])
            mask = torch.ones(text.clip.values.shape[:2], dtype=torch.bool, device=text.clip.values.device)
            features.append(text.clip.values[mask if text.clip.mask is None else text.clip.mask])
        found = torch.cat(features).double()
        covariance = found.T @ found / len(found)
        covariance += _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
        return torch.linalg.inv(covariance).float()

    def text(self, sentences: Sequence[str], times: Tensor | None = None) -> TextState:
        return self.words.encode(self.base, sentences)

    def loss(self, batch, images_seen):  # type: ignore[no-untyped-def]
        settings = self.settings
        self.gate.beta, self.gate.tau = settings.beta, settings.tau
        with torch.no_grad():
            seen = position(
                self.text([sentence for sentence in batch.sentences if sentence] or [self.naming.name()]), 1
            )
        self.direction.observe(seen.mean(0))
        return super().loss(batch, images_seen)

    def draw(self, sentences, noise, steps=None, guidance=None):  # type: ignore[no-untyped-def]
        settings = self.settings
        self.gate.beta, self.gate.tau = settings.drawing_beta, settings.drawing_tau
        return super().draw(sentences, noise, steps, guidance)

    def detach(self) -> None:
        remove_gated(self.base.unet)


class _Values(nn.Module):
    """The learnt values with the direction that they belong to, so that both are saved together."""

    def __init__(self, values: nn.Module, direction: Direction) -> None:
        super().__init__()
        self.outputs, self.direction = values, direction
