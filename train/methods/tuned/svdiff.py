"""SVDiff (arXiv 2303.11305): learn a shift of every singular value of the denoiser's weights.

With two subjects, some images show both side by side (Cut-Mix), and a loss keeps each subject's word out of the other's
half (section 3.2). Shifts of two people learnt apart are merged by adding them (`added_shifts`).
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from train.methods.bases.text import TextState
from train.methods.learned.weights import add_spectral, remove_spectral
from train.methods.learned.words import LearntWords
from train.methods.task import Sentences, TuningTask
from train.methods.tuned.textual_inversion import WordSettings
from train.task import Weight


class SvdiffSettings(WordSettings):
    """Settings of SVDiff: prior preservation as in DreamBooth."""

    sentences: Sentences = "plain"
    prior: Weight = 1.0


class Svdiff(TuningTask):
    """Learn shifts of singular values, the gains and biases, and words (part `words`, which may be left out)."""

    Settings = SvdiffSettings
    PARTS: ClassVar[tuple[str, ...]] = ("shifts", "small", "words")
    LEARNS_WORDS: ClassVar[bool] = True
    NAME: ClassVar[str] = "svdiff"

    def build(self) -> None:
        settings = self.settings
        shifts, small = add_spectral(self.base.unet)
        self.small = {name: value.detach().clone() for name, value in small.named_parameters()}
        initial = settings.initial or settings.noun or "object"
        self.words = LearntWords(self.base, self.naming.tokens, initial, settings.vectors)
        self.modules |= {"shifts": shifts, "small": small, "words": self.words}

    def text(self, sentences: Sequence[str], times: Tensor | None = None) -> TextState:
        return self.words.encode(self.base, sentences)

    def detach(self) -> None:
        small = self.modules["small"]
        for name, value in small.named_parameters():
            value.data.copy_(self.small[name])
        remove_spectral(self.base.unet)
