"""PhotoMaker (arXiv 2312.04461): the person's embedding is merged with the encoded class noun, one token per photo.

Two small networks fuse each photo's embedding with the state of the noun ("person") in the encoded sentence. The first
photo's token takes the noun's place; those of further photos follow the sentence. Attention does not depend on the
order of the tokens, so this equals the paper's stack of tokens in the noun's place. LoRA on the attention layers learns
to read them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from imagine.records import Conditioning, Tokens
from train.methods.bases.text import TextState
from train.methods.encoders.context_tokens import appended
from train.methods.encoding import EncoderSettings, EncoderTask
from train.methods.learned.weights import add_lora
from train.methods.learned.words import position


class PhotoMakerSettings(EncoderSettings):
    """Settings of the merge, and of the LoRA."""

    lora_rank: Annotated[int, Field(ge=1)] = 16
    noun: str = "person"


class Fusion(nn.Module):
    """Two residual MLPs that merge an embedding (B, n, E) with the noun's state (B, width) to tokens (B, n, width)."""

    def __init__(self, embedding: int, width: int) -> None:
        super().__init__()
        self.first = _block(embedding + width, width)
        self.second = _block(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, embeddings: Tensor, noun: Tensor) -> Tensor:
        state = noun[:, None].expand(-1, embeddings.shape[1], -1)
        mixed = self.first(torch.cat((state, embeddings), -1)) + state
        out: Tensor = self.norm(self.second(mixed) + mixed)
        return out


def _block(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width_in), nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width))


class PhotoMaker(EncoderTask):
    """Learn the merge, the vision encoder if the stage trains it, and LoRA."""

    Settings = PhotoMakerSettings
    PARTS: ClassVar[tuple[str, ...]] = ("fusion", "lora", "vision_encoder")
    NAME: ClassVar[str] = "photomaker"

    def build(self) -> None:
        self.mark_noun(self.settings.noun)
        self.fusion = Fusion(int(self.vision.config.embed_width), self.width()).to(self.base.device)
        self.modules |= {"fusion": self.fusion, "lora": add_lora(self.base.unet, self.settings.lora_rank)}
        if "vision_encoder" in self.context.trains:
            self.modules["vision_encoder"] = self.vision

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"vision_encoder": [], **super().parts()}

    def represent(self, crops: Tensor) -> Tensor:
        return self.vision.embed(crops).unsqueeze(1)

    def condition(
        self, sentences: Sequence[str], subject: Tensor, strength: Tensor
    ) -> tuple[TextState, Conditioning | None]:
        text = self.places_text(sentences, strength > 0)
        assert text.places is not None
        there = (text.places == 1).any(1)  # a sentence without the noun has no place for a person
        tokens = self.fusion(subject, position(text, 1))
        here = ((text.places == 1) & there[:, None]).unsqueeze(2)
        values = torch.where(here, tokens[:, :1].to(text.clip.values.dtype), text.clip.values)
        text = replace(text, clip=Tokens(values, text.clip.mask))
        return appended(text, tokens[:, 1:], there), None
