"""DreamBooth (arXiv 2208.12242): tune the denoiser to a rare word, while it keeps drawing other members of the class.

`dreambooth` tunes all weights; `dreambooth_lora` learns LoRA on the attention layers and, if it learns words too, first
both and then the weights alone ("pivotal tuning"). The loss is the error on the photos plus `prior` times the error on
pictures of the class (equation 2; the paper's weight is 1).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from train.methods.bases.text import TextState
from train.methods.learned.weights import add_lora, lora_layers, remove_lora
from train.methods.learned.words import LearntWords
from train.methods.losses import norm_loss
from train.methods.task import TuningSettings, TuningTask
from train.methods.tuned.textual_inversion import FILE, write_embeddings
from train.task import TaskContext, Weight


class DreamBoothSettings(TuningSettings):
    """Settings of DreamBooth: prior preservation is on, with the paper's weight."""

    prior: Weight = 1.0


class DreamBooth(TuningTask):
    """Tune the denoiser, and the text encoder if the stage trains it."""

    Settings = DreamBoothSettings
    PARTS: ClassVar[tuple[str, ...]] = ("unet", "text_encoder")
    NAME: ClassVar[str] = "dreambooth"

    def build(self) -> None:
        self.modules["unet"] = self.base.unet
        self.trains_text = "text_encoder" in self.context.trains
        if self.trains_text:
            self.modules["text_encoder"] = self.base.readers[0].model

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"text_encoder": [], **super().parts()}

    def text(self, sentences: Sequence[str], times: Tensor | None = None) -> TextState:
        return self.base.text(sentences) if self.trains_text else self.cached_text(sentences)

    def write(self, folder: Path) -> None:
        """Write the denoiser as a component folder, which replaces `unet` in any copy of the base."""
        self.base.unet.save_pretrained(folder / "diffusers" / "unet")


class LoraSettings(TuningSettings):
    """Settings of DreamBooth with LoRA."""

    prior: Weight = 1.0
    rank: Annotated[int, Field(ge=1)] = 8
    vectors: Annotated[int, Field(ge=0)] = 0  # tokens of a learnt word; 0: a rare word, which is not trained
    initial: str | None = None  # what a learnt word starts as; None: the class noun
    word_images: Annotated[int, Field(ge=1)] | None = None  # images after which the word no longer trains; None: never
    word_norm: Weight = 0.0  # weight of the squared distance of a learnt word's norm to 0.4


class DreamBoothLora(TuningTask):
    """Learn LoRA on the denoiser's attention and, with `vectors`, a word."""

    Settings = LoraSettings
    PARTS: ClassVar[tuple[str, ...]] = ("lora", "words")
    NAME: ClassVar[str] = "dreambooth_lora"

    def __init__(self, settings: LoraSettings, context: TaskContext) -> None:
        self._frozen_words = False
        super().__init__(settings, context)

    @property
    def LEARNS_WORDS(self) -> bool:  # type: ignore[override]
        return bool(self.settings.vectors)

    def build(self) -> None:
        settings = self.settings
        self.words: LearntWords | None = None
        if settings.vectors:
            initial = settings.initial or settings.noun or "object"
            self.words = LearntWords(self.base, self.naming.tokens, initial, settings.vectors)
            self.modules["words"] = self.words
        self.modules["lora"] = add_lora(self.base.unet, settings.rank)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"words": [], **super().parts()}

    def text(self, sentences: Sequence[str], times: Tensor | None = None) -> TextState:
        if self.words is None:
            return self.cached_text(sentences)
        return self.words.encode(self.base, sentences, self._frozen_words)

    def loss(self, batch, images_seen):  # type: ignore[no-untyped-def]
        after = self.settings.word_images
        self._frozen_words = after is not None and images_seen >= after
        return super().loss(batch, images_seen)

    def terms(self, text: TextState, images_seen: int, training: bool) -> dict[str, Tensor]:
        if self.words is None or not self.settings.word_norm or self._frozen_words:
            return {}
        rows = [norm_loss(self.words.table_rows(name), 0.4) for name in self.words.rows]
        return {"word_norm": self.settings.word_norm * sum(rows[1:], rows[0])}

    def write(self, folder: Path) -> None:
        """Write the files of diffusers' `load_lora_weights` and, for a word, `load_textual_inversion`."""
        from diffusers import StableDiffusionPipeline

        place = folder / "diffusers"
        place.mkdir(exist_ok=True)
        StableDiffusionPipeline.save_lora_weights(place, unet_lora_layers=lora_layers(self.base.unet))
        if self.words is not None:
            write_embeddings(self.words, place / FILE)

    def detach(self) -> None:
        remove_lora(self.base.unet)
