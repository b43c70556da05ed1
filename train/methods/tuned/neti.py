"""NeTI (arXiv 2305.15391): a small network gives the word's embedding for every noise level and layer.

Its inputs are Fourier features of time and layer. It returns the word's row, scaled to the norm of the class noun's
row, and a second vector that is added to the encoded word (the textual bypass). Nested dropout orders the hidden units
by importance, so that fewer of them give a picture that follows the sentence more (section 4.3).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from imagine.errors import ConfigError
from imagine.records import Tokens
from train.data.order import chance, uniforms
from train.methods.bases.contract import AnyBase
from train.methods.bases.text import TextState, inserting
from train.methods.learned.layer_text import attach_layer_text, detach_layer_text, for_all_layers, joined
from train.methods.task import TuningTask
from train.methods.tuned.textual_inversion import WordSettings
from train.task import Share, TaskContext

_TIME_ANCHORS, _SIGMA_TIME, _SIGMA_LAYER = 10, 0.03, 2.0  # as in the paper's code, for times of 0 to 1,000
_STEPS = 1000
_BYPASS = 0.2  # the norm of the bypass, as a share of the encoded word's norm


class NetiSettings(WordSettings):
    """Settings of the mapper."""

    hidden: Annotated[int, Field(ge=1)] = 128
    nested_dropout: Share = 0.5  # share of steps in which the last hidden units are zero, from a random one on
    keep: Annotated[int, Field(ge=1)] | None = None  # hidden units in use when drawing; None: all


class Mapper(nn.Module):
    """Map (time, layer) to a row for each text encoder and to a bypass for the denoiser's text."""

    def __init__(self, base: AnyBase, layers: int, hidden: int, noun: str) -> None:
        super().__init__()
        self.layers, self.hidden = layers, hidden
        features = _TIME_ANCHORS * layers
        self.body = nn.Sequential(
            nn.Linear(features, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(),
            nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({reader.name: nn.Linear(hidden, reader.width) for reader in base.readers})
        self.bypass = nn.Linear(hidden, int(base.unet.config.cross_attention_dim))
        nn.init.zeros_(self.bypass.weight)
        nn.init.zeros_(self.bypass.bias)
        for reader in base.readers:  # the first row is the class noun's own
            row = reader.mean_row(noun).cpu()
            self.register_buffer(f"norm_{reader.name}", row.norm())
            head = self.heads[reader.name]
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=1e-3)
            head.bias.data.copy_(row)
        frequencies = torch.randn(2, features // 2 + features % 2, generator=torch.Generator().manual_seed(0))
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies)

    def forward(self, times: Tensor, keep: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Return rows (B * layers, 1, width) by text encoder, and bypasses (B * layers, width), for times (B,)."""
        count = len(times)
        step = times.repeat_interleave(self.layers)[:, None] * _STEPS * _SIGMA_TIME
        layer = torch.arange(self.layers, device=times.device).repeat(count)[:, None] * _SIGMA_LAYER
        angle = step * self.frequencies[0] + layer * self.frequencies[1]
        found = self.body(torch.cat((angle.sin(), angle.cos()), 1)[:, : _TIME_ANCHORS * self.layers])
        if keep is not None:
            units = torch.arange(self.hidden, device=found.device)
            found = found * (units < keep.repeat_interleave(self.layers)[:, None])
        rows = {}
        for name, head in self.heads.items():
            row = head(found)
            wanted = self.get_buffer(f"norm_{name}")
            rows[name] = (row / row.norm(dim=-1, keepdim=True).clamp(min=1e-8) * wanted)[:, None]
        return rows, self.bypass(found)


class Neti(TuningTask):
    """Learn the mapper."""

    Settings = NetiSettings
    PARTS: ClassVar[tuple[str, ...]] = ("mapper",)
    LEARNS_WORDS: ClassVar[bool] = True
    NAME: ClassVar[str] = "neti"

    def __init__(self, settings: NetiSettings, context: TaskContext) -> None:
        super().__init__(settings, context)
        self._step: int | None = None

    def build(self) -> None:
        settings = self.settings
        self.layers = attach_layer_text(self.base.unet)
        for reader in self.base.readers:
            reader.add_words(list(self.naming.tokens[:1]))
        self.mapper = Mapper(self.base, self.layers, settings.hidden, settings.initial or settings.noun or "object")
        self.modules["mapper"] = self.mapper

    def check(self) -> list[str]:
        if len(self.data.photos) > 1 or self.settings.vectors > 1:
            raise ConfigError("neti learns one subject with one word: give --photos once, and leave out vectors.")
        return super().check()

    def loss(self, batch, images_seen):  # type: ignore[no-untyped-def]
        self._step = images_seen
        try:
            return super().loss(batch, images_seen)
        finally:
            self._step = None

    def text(self, sentences: Sequence[str], times: Tensor | None = None) -> TextState:
        device = self.base.device
        times = torch.zeros(len(sentences), device=device) if times is None else times.to(device)
        rows, bypass = self.mapper(times, self._kept(len(sentences)))
        with inserting(rows):
            found = self.base.text([sentence for sentence in sentences for _ in range(self.layers)])
        if found.places is not None:
            here = (found.places == 1).to(found.clip.values).unsqueeze(2)
            norm = found.clip.values.norm(dim=-1, keepdim=True)
            added = bypass[:, None] / bypass.norm(dim=-1)[:, None, None].clamp(min=1.0) * norm * _BYPASS
            found = replace(found, clip=Tokens(found.clip.values + here * added, found.clip.mask))
        return joined(found, self.layers)

    def _kept(self, count: int) -> Tensor | None:
        """Return how many hidden units each sample uses, (count,); None for all."""
        settings, device = self.settings, self.base.device
        if self._step is None:
            return None if settings.keep is None else torch.full((count,), settings.keep, device=device)
        seed = self.context.seed
        share = uniforms(seed, "nested", self._step, count, device=device)
        cut = chance(seed, "nested dropout", self._step, count, settings.nested_dropout, device)
        return torch.where(cut, (share * settings.hidden).floor() + 1, float(settings.hidden))

    def empty_text(self, count: int) -> TextState:
        return for_all_layers(self.base.text([""]).repeat(count), self.layers)

    def detach(self) -> None:
        detach_layer_text(self.base.unet)
