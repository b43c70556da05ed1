"""The auxiliary losses of the denoiser's stages in the portrait world: their settings, networks and sum.

All are off by default, and none changes what a stage exports. `BaseTask` and `AdapterTask` add them to their own loss
for pictures of one person.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from imagine.adapter.attention import attention_layers
from imagine.errors import ConfigError
from imagine.evaluation.judge import Reader
from imagine.records import attention_to
from imagine.world.vocabulary import ATTRIBUTES, TRAITS
from train.cache.latents import WorldCodec
from train.data.denoiser_inputs import Truth
from train.data.language import parameters
from train.data.words import Words
from train.task import Share, TaskContext, Weight
from train.tasks.letter_losses import (
    GlyphHead,
    glyph_loss,
    knows_word,
    letter_attention_loss,
    letter_boxes_of,
    readable,
    reader_loss,
)
from train.tasks.part_loss import PartHead, part_loss

CHARACTERS = "byt5"  # the branch of characters
READER = "word_reader"  # the stage and the module of the reader loss
_READER_ONLY = ("reader_items", "reader_start", "reader_time")
Watch = dict[str, dict[str, Any]]
TextBranch = Literal["t5", "byt5"]


class AuxiliarySettings(BaseModel):
    """Weights of the auxiliary losses, and how many pictures carry a word; none of them is in the paper."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    words: Words | None = None  # share of the images that carry a word; None: as the pictures come
    glyph: Weight = 0.0  # each letter's values must contain the letter's glyph
    letter_attention: Weight = 0.0  # each letter's attention must lie in the cells of the letter
    reader_loss: Weight = 0.0  # a reader, trained by a stage `word_reader`, must read the word in the prediction
    reader_items: Annotated[int, Field(ge=1)] = 4  # most pictures that are decoded for it, in each micro-batch
    reader_start: Annotated[int, Field(ge=0)] = 0  # image from which it counts
    reader_time: Share = 0.3  # noise level up to which it counts: above it no letter can be predicted
    part_loss: Weight = 0.0  # the denoiser's middle must contain the masks of head, hair, eyes, mouth, word ...
    part_loss_end: Annotated[int, Field(ge=1)] | None = None  # image up to which it counts; None: to the end


def check_auxiliary(settings: AuxiliarySettings, text_branches: Sequence[str], fusion: str) -> None:
    """Raise ValueError for auxiliary losses that cannot work with these text branches, or settings without effect."""
    for name in ("glyph", "letter_attention", "reader_loss"):
        if getattr(settings, name) and CHARACTERS not in text_branches:
            raise ValueError(f"{name} needs the characters of {CHARACTERS}, which text_branches does not name: add it")
    for name in ("glyph", "letter_attention"):
        if getattr(settings, name) and fusion != "parallel":
            raise ValueError(f"{name} reads a branch of characters of its own: set it to 0, or fusion to parallel")
    given = settings.model_fields_set
    changed = [name for name in _READER_ONLY if name in given and getattr(settings, name) != _default(name)]
    if changed and not settings.reader_loss:
        raise ValueError(f"{changed[0]} has no effect without reader_loss: give reader_loss a weight, or leave it out")
    if settings.part_loss_end is not None and not settings.part_loss:
        raise ValueError("part_loss_end has no effect without part_loss: give part_loss a weight, or leave it out")


def _default(name: str) -> Any:
    return AuxiliarySettings.model_fields[name].default


class AuxiliaryLosses:
    """The auxiliary losses of one stage. `modules` are the networks that only they need.

    The heads that train belong to the parts whose outputs they read, so a stage that trains these parts trains them:
    the glyph head to `text_adapter`, the part head to `unet`.
    """

    def __init__(self, settings: AuxiliarySettings, context: TaskContext, unet: nn.Module) -> None:
        self.settings, self.context = settings, context
        self.modules: dict[str, nn.Module] = {}
        self.layer = _middle_layer(unet)
        width = attention_layers(unet)[self.layer].inner_dim
        if settings.glyph:
            first = next(attn for attn in attention_layers(unet).values() if attn.is_cross_attention)
            self.modules["glyph_head"] = GlyphHead(first.inner_dim)
        if settings.part_loss:
            self.modules["part_head"] = PartHead(width)
        if settings.reader_loss:
            self.modules[READER] = self._reader()

    def _reader(self) -> Reader:
        if READER not in self.context.earlier:
            raise ConfigError(
                f"Stage {self.context.name} has a reader loss, which needs a trained reader: name a stage `{READER}` "
                "(task reader, people: train) in its start_from, or set reader_loss to 0."
            )
        return Reader({**ATTRIBUTES, "letters": ()}, TRAITS)

    def parameters_of(self, part: str) -> list[nn.Parameter]:
        """Return the parameters that train with a part of the task."""
        head = {"text_adapter": "glyph_head", "unet": "part_head"}.get(part, "")
        return parameters(self.modules[head]) if head in self.modules else []

    def check(self, recorded: Mapping[str, bool]) -> None:
        """Raise ConfigError if a loss cannot act. `recorded` says for each source whether it reads records."""
        for name, needed in (
            ("glyph", {"text_adapter"}), ("part_loss", {"unet"}), ("letter_attention", {"unet", "text_adapter", "byt5"})
        ):  # fmt: skip
            if getattr(self.settings, name) and self.context.trains and not needed & set(self.context.trains):
                raise ConfigError(
                    f"Stage {self.context.name}: {name} has no effect, because the stage does not train "
                    f"{' or '.join(sorted(needed))}; set {name} to 0."
                )
        of_records = [source for source, is_recorded in recorded.items() if is_recorded]
        if self.settings.part_loss and of_records:
            raise ConfigError(
                f"Stage {self.context.name}: part_loss needs masks, which the records of the source {of_records[0]} do "
                "not have; set part_loss to 0, or leave the source out."
            )
        names = ("words", "letter_attention", "reader_loss")
        wanted = [name for name in names if getattr(self.settings, name)]
        if wanted and all(recorded.values()):
            raise ConfigError(
                f"Stage {self.context.name}: {wanted[0]} has no effect, because records do not say which words they "
                f"show; leave {wanted[0]} out."
            )

    @property
    def needs_truth(self) -> bool:
        """Whether batches must hold what the world knows of their pictures."""
        settings = self.settings
        return bool(settings.words or settings.letter_attention or settings.reader_loss or settings.part_loss)

    def _parts_count(self, images_seen: int) -> bool:
        end = self.settings.part_loss_end
        return bool(self.settings.part_loss) and (end is None or images_seen < end)

    def watch(self, images_seen: int) -> Watch:
        """Return what the denoiser's layers must show for these losses (`Conditioning.watch`)."""
        watch: Watch = {}
        if self.settings.glyph or self.settings.letter_attention:
            watch[attention_to(CHARACTERS)] = {}
        if self._parts_count(images_seen):
            watch["states"] = {}
        return watch

    def terms(
        self, truth: Truth | None, texts: Sequence[str], watch: Watch, clean: Tensor, t: Tensor, images_seen: int,
        codec: WorldCodec, picture: int,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return the losses (B,) by the names of their settings, not yet weighted.

        texts: what ByT5 read. watch: what the layers showed. clean: the predicted clean latents (B, C, h, w) at the
        noise levels t (B,). picture: side in pixels of the pictures that `truth` describes.
        """
        terms: dict[str, Tensor] = {}
        cells = (clean.shape[2], clean.shape[3])
        shown = watch.get(attention_to(CHARACTERS), {})
        if self.settings.glyph:
            head = self.modules["glyph_head"]
            assert isinstance(head, GlyphHead)
            terms["glyph"] = glyph_loss(shown, head, texts)
        if truth is None:
            return terms
        if self.settings.letter_attention:
            boxes, known = letter_boxes_of(truth.boxes, truth.letters), knows_word(truth.letters, texts)
            terms["letter_attention"] = letter_attention_loss(shown, boxes, known, picture, cells)
        if self.settings.reader_loss and images_seen >= self.settings.reader_start:
            terms["reader_loss"] = self._read(truth, texts, clean, t, codec, picture)
        if self._parts_count(images_seen):
            terms["part_loss"] = part_loss(self.modules["part_head"](watch["states"][self.layer], cells), truth.parts)
        return terms

    def _read(
        self, truth: Truth, texts: Sequence[str], clean: Tensor, t: Tensor, codec: WorldCodec, picture: int
    ) -> Tensor:
        """Return the reader's loss (B,) of the first few pictures that have a word and little noise, 0 elsewhere."""
        known = knows_word(truth.letters, texts) & readable(truth.boxes, picture) & (t <= self.settings.reader_time)
        rows, zeros = known.nonzero().squeeze(1)[: self.settings.reader_items], torch.zeros(len(t), device=t.device)
        if not len(rows):
            return zeros
        reader = self.modules[READER]
        assert isinstance(reader, Reader)
        return zeros.index_add(
            0, rows, reader_loss(reader, codec.decode_with_gradients(clean[rows]), truth.letters[rows])
        )

    def weighted(self, terms: Mapping[str, Tensor]) -> Tensor | float:
        """Return the weighted sum (B,) of the terms; 0 without any."""
        return sum((getattr(self.settings, name) * term for name, term in terms.items()), 0.0)

    def metrics(self, terms: Mapping[str, Tensor], truth: Truth | None) -> dict[str, Tensor]:
        """Return the terms' means for the metrics and, where it is chosen, the share of pictures with a word."""
        numbers = {name: term.mean() for name, term in terms.items()}
        if self.settings.words is not None and truth is not None:
            numbers["words"] = (truth.letters[:, 0] > 0).float().mean()
        return numbers


def _middle_layer(unet: nn.Module) -> str:
    """Return the cross-attention layer whose states must contain the parts.

    It is the first one behind the middle of the U-Net at its full resolution.
    """
    layers = [name for name, attn in attention_layers(unet).items() if attn.is_cross_attention]
    last = max((name for name in layers if name.startswith("up_blocks")), key=lambda name: name.split(".")[1])
    block = ".".join(last.split(".")[:2])
    return next(name for name in layers if name.startswith(f"{block}."))
