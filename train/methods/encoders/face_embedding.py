"""Methods that read one face embedding: Face0 (arXiv 2306.06638) and the adapter of InstantID (arXiv 2401.07519).

Face0 maps the embedding to three tokens that take the last places of the encoded sentence, and tunes the denoiser.
InstantID maps it to tokens with keys and values of their own; its second part, a ControlNet of facial landmarks, needs
the reference's pose as an input and is left out here.

The embedding is that of a face recogniser (`recogniser`: a folder that the task `recogniser` exports), or the pooled
embedding of the vision encoder. The judge's recogniser must not be used: a method that trained on it would be judged by
its own teacher.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from imagine.adapter.adapter import Adapter, BranchSpec
from imagine.errors import ConfigError
from imagine.networks.recogniser import Recogniser
from imagine.records import VISION, Conditioning
from train.methods.bases.text import TextState
from train.methods.encoders.context_tokens import overwritten
from train.methods.encoding import EncoderSettings, EncoderTask, write_ip_adapter


class EmbeddingSettings(EncoderSettings):
    """Settings of the embedding."""

    recogniser: Path | None = None  # folder of a Recogniser that is not the judge's; None: the vision encoder
    tokens: Annotated[int, Field(ge=1)] = 4


class _EmbeddingTask(EncoderTask):
    """Read crops with a frozen recogniser."""

    def embedding_width(self) -> int:
        """Load the recogniser, if one is named, and return the width of embeddings."""
        path = self.settings.recogniser
        self.recogniser: Recogniser | None = None
        if path is None:
            return int(self.vision.config.embed_width)
        if path.parent.name == "judge":
            raise ConfigError(f"recogniser: {path} is the judge's own; train another one (docs/baselines.md).")
        self.recogniser = Recogniser.load(path).to(self.base.device).requires_grad_(False).eval()
        return int(self.recogniser.config["dimensions"])

    def embed(self, crops: Tensor) -> Tensor:
        """Return unit embeddings (B, 1, E)."""
        if self.recogniser is None:
            return F.normalize(self.vision.embed(crops), dim=-1).unsqueeze(1)
        side = self.recogniser.size
        scaled = crops if crops.shape[-1] == side else F.interpolate(crops, size=(side, side), mode="bilinear")
        found: Tensor = self.recogniser(scaled)
        return found.unsqueeze(1)

    def merge(self, each: Tensor) -> Tensor:
        """Average the photos' numbers."""
        return each.mean(0, keepdim=True)


class Face0Settings(EmbeddingSettings):
    """Settings of Face0, with the paper's three tokens."""

    tokens: Annotated[int, Field(ge=1)] = 3


class Face0(_EmbeddingTask):
    """Learn a four-layer network from the embedding to tokens; the denoiser is tuned too (part `unet`)."""

    Settings = Face0Settings
    PARTS: ClassVar[tuple[str, ...]] = ("projection", "unet")
    NAME: ClassVar[str] = "face0"

    def build(self) -> None:
        width, count = self.width(), self.settings.tokens
        self.projection = nn.Sequential(
            nn.Linear(self.embedding_width(), width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, count * width),
        ).to(self.base.device)  # fmt: skip
        self.modules["projection"] = self.projection
        if "unet" in self.context.trains:
            self.modules["unet"] = self.base.unet

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"unet": [], **super().parts()}

    def represent(self, crops: Tensor) -> Tensor:
        found: Tensor = self.projection(self.embed(crops)[:, 0])
        return found.unflatten(1, (self.settings.tokens, -1))

    def condition(
        self, sentences: Sequence[str], subject: Tensor, strength: Tensor
    ) -> tuple[TextState, Conditioning | None]:
        return overwritten(self.base.text(sentences), subject, strength > 0), None


class InstantID(_EmbeddingTask):
    """Learn keys and values for tokens of the embedding."""

    Settings = EmbeddingSettings
    PARTS: ClassVar[tuple[str, ...]] = ("adapter",)
    NAME: ClassVar[str] = "instantid"

    def build(self) -> None:
        spec = BranchSpec(
            VISION, self.width(), 1.0, False, "linear", self.embedding_width(), tokens=self.settings.tokens
        )  # fmt: skip
        self.adapter = Adapter(self.base.unet, [spec], self.settings.lora_rank)
        self.modules["adapter"] = self.adapter.to(self.base.device)

    def represent(self, crops: Tensor) -> Tensor:
        assert self.adapter is not None
        return self.adapter.tokens(VISION, self.embed(crops)).values

    def write(self, folder: Path) -> None:
        write_ip_adapter(self, folder)
