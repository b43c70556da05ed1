"""What frozen text encoders say of a gallery's captions, read once and kept, so that training needs no encoder.

Where `train.cache` reads captions of the portrait world when they are first asked for, by encoders that are small,
here all that a stage will ask for is read before its first step, by one encoder after the other.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from rich.progress import track
from torch import Tensor

from imagine.records import Tokens
from train.cache.pictures import AnyGallery
from train.cache.sentences import STYLES, caption_positions
from train.cache.tokens import TokenCache, trim_padding
from train.data.public_base import Encode
from train.run.stopping import raise_if_stopping

log = logging.getLogger("train")
_CAPTIONS_AT_ONCE = 32  # captions
_EMPTY_SENTENCE = 0  # the place of the empty sentence; captions follow


class FrozenTextEncoder(Protocol):
    """Frozen text encoders that read a sentence together."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Of each thing that a sentence becomes: how many tokens at most, and how wide."""
        ...

    @property
    def mark(self) -> str:
        """Digits for what tokens depend on besides their sentence."""
        ...

    def load(self) -> Encode:
        """The encoders in memory, behind a function from sentences to tokens by name."""
        ...


class TextStates:
    """The captions of a gallery as tokens of several encoders, behind the row numbers of its pictures."""

    def __init__(self, gallery: AnyGallery, text_encoders: Sequence[FrozenTextEncoder], folder: Path) -> None:
        self.gallery, self.text_encoders = gallery, text_encoders
        count = 1 + len(gallery) * len(STYLES)
        self.cache = [
            {
                name: TokenCache(folder / f"{name}-{text_encoder.mark}-{gallery.mark}", count, *shape)
                for name, shape in text_encoder.shapes.items()
            }
            for text_encoder in text_encoders
        ]

    @torch.no_grad()
    def read(self, rows: Tensor, caption_styles: Sequence[str]) -> None:
        """Have the captions of these pictures read in these manners, each in all of them, unless they were before."""
        each = [(row, caption_style) for row in rows.tolist() for caption_style in caption_styles]
        pictures, styles = torch.tensor([row for row, _ in each]), [caption_style for _, caption_style in each]
        positions = [_EMPTY_SENTENCE, *(1 + position for position in caption_positions(pictures, styles))]
        for text_encoder, cache in zip(self.text_encoders, self.cache, strict=True):
            missing = {position for one in cache.values() for position in one.missing(positions)}
            if missing:
                here = [i for i, position in enumerate(positions) if position in missing]
                self._encode(text_encoder.load(), cache, positions, pictures, styles, here)

    def _encode(
        self,
        encode: Encode,
        cache: Mapping[str, TokenCache],
        positions: Sequence[int],
        pictures: Tensor,
        styles: Sequence[str],
        here: Sequence[int],
    ) -> None:
        """Read and keep the sentences at these entries of `positions`; the first is the empty one."""
        for start in track(range(0, len(here), _CAPTIONS_AT_ONCE), "reading captions"):
            some = here[start : start + _CAPTIONS_AT_ONCE]
            captions = [i - 1 for i in some if i]
            texts = self.gallery.captions(pictures[captions], [styles[i] for i in captions])
            read = encode([*([""] if 0 in some else []), *texts])
            for name, tokens in read.items():
                cache[name].write([positions[i] for i in some], tokens)
            raise_if_stopping()

    def take(self, rows: Tensor, caption_styles: Sequence[str], left_out: Mapping[str, Tensor]) -> dict[str, Tokens]:
        """Name -> tokens of these captions, which were read; of the empty sentence where `left_out` (B,) says so."""
        positions = [1 + position for position in caption_positions(rows, caption_styles)]
        return {
            name: _tokens(
                one,
                [
                    _EMPTY_SENTENCE if is_empty else position
                    for position, is_empty in zip(positions, dropped, strict=True)
                ],
            )
            for cache in self.cache
            for name, one in cache.items()
            for dropped in [left_out[name].tolist()]
        }

    def empty_sentences(self, count: int) -> dict[str, Tokens]:
        """Name -> the tokens of so many empty sentences."""
        return {name: _tokens(one, [_EMPTY_SENTENCE] * count) for cache in self.cache for name, one in cache.items()}


def _tokens(cache: TokenCache, positions: Sequence[int]) -> Tokens:
    """Tokens without a mask where every place is full, as a stock text encoder's are."""
    values, lengths = cache.take(positions)
    assert int(lengths.min()), "all captions are read before they are asked for"
    return Tokens(values) if int(lengths.min()) == values.shape[1] else trim_padding(values, lengths)
