"""P+ (arXiv 2303.09522): a word with an embedding of its own for every cross-attention layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from train.methods.bases.text import TextState
from train.methods.learned.layer_text import attach_layer_text, detach_layer_text, for_all_layers, joined
from train.methods.learned.words import LearntWords
from train.methods.task import TuningTask
from train.methods.tuned.textual_inversion import WordSettings


class PromptPlus(TuningTask):
    """Learn one row per layer; every layer reads its own encoding of the sentence."""

    Settings = WordSettings
    PARTS: ClassVar[tuple[str, ...]] = ("words",)
    LEARNS_WORDS: ClassVar[bool] = True
    NAME: ClassVar[str] = "prompt_plus"

    def build(self) -> None:
        settings = self.settings
        self.layers = attach_layer_text(self.base.unet)
        initial = settings.initial or settings.noun or "object"
        self.words = LearntWords(self.base, self.naming.tokens, initial, settings.vectors, self.layers)
        self.modules["words"] = self.words

    def text(self, sentences: Sequence[str], times: Tensor | None = None) -> TextState:
        return joined(self.words.encode(self.base, sentences), self.layers)

    def empty_text(self, count: int) -> TextState:
        return for_all_layers(self.base.text([""]).repeat(count), self.layers)

    def write(self, folder: Path) -> None:
        """Write nothing: no common format has an embedding per layer."""

    def detach(self) -> None:
        detach_layer_text(self.base.unet)
