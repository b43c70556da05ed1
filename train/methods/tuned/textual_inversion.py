"""Textual Inversion (arXiv 2208.01618): learn the embedding of one new word; the model stays as it is.

The word starts as the class noun. Only its own rows are trained, without weight decay.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from train.methods.bases.text import TextState
from train.methods.learned.words import LearntWords
from train.methods.task import Sentences, TuningSettings, TuningTask
from train.run.checkpoint import write_tensors

FILE = "learned_embeds.safetensors"  # the name that diffusers' load_textual_inversion looks for
_SDXL = {"clip": "clip_l", "clip_2": "clip_g"}  # the keys of SDXL files, as in the scripts of diffusers


class WordSettings(TuningSettings):
    """Settings of methods that learn words."""

    sentences: Sentences = "neutral"
    vectors: Annotated[int, Field(ge=1)] = 1  # tokens per word
    initial: str | None = None  # the word that the new one starts as; None: the class noun


class TextualInversion(TuningTask):
    """Learn the rows of the subject's word."""

    Settings = WordSettings
    PARTS: ClassVar[tuple[str, ...]] = ("words",)
    LEARNS_WORDS: ClassVar[bool] = True
    NAME: ClassVar[str] = "textual_inversion"

    def build(self) -> None:
        settings = self.settings
        initial = settings.initial or settings.noun or "object"
        self.words = LearntWords(self.base, self.naming.tokens, initial, settings.vectors)
        self.modules["words"] = self.words

    def text(self, sentences: Sequence[str], times: Tensor | None = None) -> TextState:
        return self.words.encode(self.base, sentences)

    def write(self, folder: Path) -> None:
        write_embeddings(self.words, folder / "diffusers" / FILE)


def write_embeddings(words: LearntWords, path: Path) -> None:
    """Write the rows as `load_textual_inversion` of diffusers reads them.

    With one text encoder that is word -> (vectors, width). SDXL files hold the rows of one word by encoder; with
    several words, each has a file of its own.
    """
    rows = words.files()
    if len(words.rows) == 1:
        write_tensors(path, {key.split("/")[0]: value for key, value in rows.items()}, {})
        return
    for name in words.names:
        own = {_SDXL.get(reader, reader): rows[f"{name}/{reader}"] for reader in words.rows}
        place = path if len(words.names) == 1 else path.with_stem(f"{path.stem}-{name.strip('<>')}")
        write_tensors(place, own, {"token": name})
