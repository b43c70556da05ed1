"""ELITE (arXiv 2302.13848): the reference becomes a word (global) and keys and values of its patches (local).

The global mapping turns the encoder's global token and the mean of its patches into the embedding of a word, which the
text encoder reads before the class noun; keys and values of the text are tuned with it. The local mapping gives patches
keys and values of their own. Both outputs are kept small: 0.01 mean |word| and 1e-4 mean |local token| are part of the
loss. The paper learns the two mappings one after the other, from five layers of the encoder, and uses the deepest
layer's word in the end; here both are learnt together, from the penultimate layer.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from imagine.adapter.adapter import Adapter, BranchSpec
from imagine.errors import ConfigError
from imagine.records import VISION, Conditioning, Tokens
from train.methods.bases.text import TextState, inserting
from train.methods.encoding import EncoderSettings, EncoderTask
from train.methods.learned.weights import Collected, cross_keys_values
from train.methods.sentences import Naming
from train.task import Weight

_WORD = "<subject-1>"


class EliteSettings(EncoderSettings):
    """Settings of the two mappings."""

    sources: dict[str, float] = {"real": 1.0}  # noqa: RUF012  (pydantic copies it)
    noun: str = "person"
    word_norm: Weight = 0.01
    local_norm: Weight = 1e-4
    local: bool = True  # whether there is a local mapping
    local_strength: float = 0.8  # when drawing


class GlobalMapping(nn.Module):
    """Map features (B, 1 + patches, width) to one row per text encoder; at the start the class noun's own row."""

    def __init__(self, width: int, rows: dict[str, Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2 * width, width), nn.LayerNorm(width), nn.LeakyReLU())
        self.heads = nn.ModuleDict()
        for name, row in rows.items():
            head = nn.Linear(width, len(row))
            nn.init.normal_(head.weight, std=1e-3)
            head.bias.data.copy_(row)
            self.heads[name] = head

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return rows (B, 1, width) by text encoder."""
        pooled = torch.cat((features[:, 0], features[:, 1:].mean(1)), 1)
        hidden = self.body(pooled)
        return {name: head(hidden)[:, None] for name, head in self.heads.items()}


class Elite(EncoderTask):
    """Learn both mappings, and the keys and values of the text."""

    Settings = EliteSettings
    PARTS: ClassVar[tuple[str, ...]] = ("words", "local", "keys_values")
    NAME: ClassVar[str] = "elite"

    def build(self) -> None:
        width, noun = int(self.vision.config.width), self.settings.noun
        if not noun:
            raise ConfigError("elite writes its word before a class noun: give a noun.")
        rows = {reader.name: reader.mean_row(noun).cpu() for reader in self.base.readers}
        for reader in self.base.readers:
            reader.add_words([_WORD])
        self.words = GlobalMapping(width, rows).to(self.base.device)
        self.naming = Naming((_WORD,), noun)
        self.modules |= {"words": self.words, "keys_values": Collected(cross_keys_values(self.base.unet))}
        if self.settings.local:
            spec = BranchSpec(VISION, self.width(), 1.0, False, "full", width)
            self.adapter = Adapter(self.base.unet, [spec])
            self.modules["local"] = self.adapter.to(self.base.device)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"local": [], **super().parts()}

    def represent(self, crops: Tensor) -> Tensor:
        found: Tensor = self.vision(crops)
        return found

    def merge(self, each: Tensor) -> Tensor:
        """Average the photos' features."""
        return each.mean(0, keepdim=True)

    def condition(
        self, sentences: Sequence[str], subject: Tensor, strength: Tensor
    ) -> tuple[TextState, Conditioning | None]:
        there = (strength > 0).tolist()
        named = [
            self.naming.personal(sentence, self.settings.noun) if use else sentence
            for sentence, use in zip(sentences, there, strict=True)
        ]
        with inserting(self.words(subject)):
            text = self.base.text(named)
        if self.adapter is None:
            return text, None
        local = self.adapter.tokens(VISION, subject).values
        scale = strength if torch.is_grad_enabled() else strength * self.settings.local_strength
        return text, Conditioning({VISION: Tokens(local)}, {VISION: scale})

    def terms(self, subject: Tensor) -> dict[str, Tensor]:
        settings = self.settings
        rows = list(self.words(subject).values())
        found = {"word_norm": settings.word_norm * torch.stack([row.abs().mean() for row in rows]).mean()}
        if self.adapter is not None:
            local = self.adapter.tokens(VISION, subject).values
            found["local_norm"] = settings.local_norm * local.abs().mean()
        return found
