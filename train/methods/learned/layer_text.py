"""A text of its own for every cross-attention layer (P+, arXiv 2303.09522; NeTI, arXiv 2305.15391).

The sentences of all layers are joined to one sequence, in the order of the layers, and the processor of each layer
takes its own part. So they pass through a denoiser as an ordinary text does, and as an argument of the call.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from imagine.adapter.attention import ParallelAttention, attention_layers, processor_of
from imagine.errors import ConfigError
from imagine.records import Conditioning, Tokens
from train.methods.bases.text import TextState


class LayerTextAttention(ParallelAttention):
    """A layer's processor that reads part `number` of `count` equal parts of the text."""

    def __init__(self, before: ParallelAttention, number: int, count: int) -> None:
        super().__init__(before.name, before.stock, before.layers)
        self.number, self.count = number, count

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            length = encoder_hidden_states.shape[1] // self.count
            part = slice(self.number * length, (self.number + 1) * length)
            encoder_hidden_states = encoder_hidden_states[:, part]
            attention_mask = None if attention_mask is None else attention_mask[..., part]
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, conditioning)


def cross_layers(unet: Any) -> dict[str, Attention]:
    """Return the cross-attention layers of a denoiser by module path, in order."""
    return {name: attn for name, attn in attention_layers(unet).items() if attn.is_cross_attention}


def attach_layer_text(unet: Any) -> int:
    """Give every cross-attention layer its own part of the text; return their number."""
    layers = cross_layers(unet)
    for number, (name, attn) in enumerate(layers.items()):
        before = processor_of(attn)
        if isinstance(before, AttnProcessor2_0):
            before = ParallelAttention(name, before)
        if not isinstance(before, ParallelAttention):
            raise ConfigError(f"The layer {name} uses {type(before).__name__}, which cannot read a text of its own.")
        attn.set_processor(cast(Any, LayerTextAttention(before, number, len(layers))))
    return len(layers)


def detach_layer_text(unet: Any) -> None:
    """Undo `attach_layer_text`."""
    for attn in cross_layers(unet).values():
        now = processor_of(attn)
        if isinstance(now, LayerTextAttention):
            plain = ParallelAttention(now.name, now.stock, now.layers) if now.layers else now.stock
            attn.set_processor(cast(Any, plain))


def joined(text: TextState, layers: int) -> TextState:
    """Join the sentences (B * layers) of `LearntWords.encode` to one text per prompt, (B, layers * L, width).

    The vector of the sentence is the mean over the layers; further branches read the first layer's words.
    """
    values, mask = text.clip.values.unflatten(0, (-1, layers)), text.clip.mask
    firsts = torch.arange(0, len(text), layers, device=values.device)
    first = text.take(firsts)
    return replace(
        first,
        clip=Tokens(values.flatten(1, 2), None if mask is None else mask.unflatten(0, (-1, layers)).flatten(1, 2)),
        pooled=None if text.pooled is None else text.pooled.unflatten(0, (-1, layers)).mean(1),
        places=None if text.places is None else text.places.unflatten(0, (-1, layers)).flatten(1, 2),
    )


def for_all_layers(text: TextState, layers: int) -> TextState:
    """Repeat one text for every layer, as the unconditional text of guidance."""
    mask = text.clip.mask
    clip = Tokens(text.clip.values.repeat(1, layers, 1), None if mask is None else mask.repeat(1, layers))
    return replace(text, clip=clip, places=None if text.places is None else text.places.repeat(1, layers))
