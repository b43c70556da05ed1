"""Encode a gallery's captions with frozen text encoders once and cache the states, so that training needs no encoder.

`train.cache.sentences` encodes captions of the portrait world on first use, with small encoders. Here all captions of a
stage are encoded before its first step, with one encoder after the other, because these encoders are large.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from imagine.records import Tokens
from train.cache.sentences import STYLES, CaptionedGallery, caption_positions, process_suffix
from train.cache.shortening import CutCaptions
from train.cache.tokens import TokenCache, trim_padding
from train.data.public_base import LoadedEncoder
from train.run.progress import blocks
from train.run.stopping import raise_if_stopping

log = logging.getLogger("train")
_CAPTIONS_AT_ONCE = 32  # captions per batch of the encoder
_EMPTY_SENTENCE = 0  # position of the empty sentence in the cache; captions follow


class FrozenTextEncoder(Protocol):
    """One or more frozen text encoders that encode a sentence in one call."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Name of each output -> the largest number of tokens per sentence, and their width."""
        ...

    @property
    def mark(self) -> str:
        """A fingerprint of everything that the tokens depend on besides their sentence."""
        ...

    @property
    def precision(self) -> torch.dtype:
        """The half precision in which its states are cached: bfloat16 where they may exceed the range of float16."""
        ...

    def load(self) -> LoadedEncoder:
        """Load the encoders."""
        ...


class TextStates:
    """The captions of a gallery as tokens of several encoders, indexed by the row numbers of its pictures."""

    def __init__(self, gallery: CaptionedGallery, text_encoders: Sequence[FrozenTextEncoder], folder: Path) -> None:
        self.gallery, self.text_encoders = gallery, text_encoders
        self.cut = CutCaptions(folder / f"cut_captions{process_suffix()}.json")
        count = 1 + len(gallery) * len(STYLES)
        self.cache = [
            {
                name: TokenCache(
                    folder / f"{name}-{text_encoder.mark}-{gallery.mark}", count, *shape, text_encoder.precision
                )
                for name, shape in text_encoder.shapes.items()
            }
            for text_encoder in text_encoders
        ]

    @torch.no_grad()
    def read(self, rows: Tensor, caption_styles: Sequence[str]) -> None:
        """Encode the captions of these pictures in all of these styles, unless they are cached."""
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
        encoder: LoadedEncoder,
        cache: Mapping[str, TokenCache],
        positions: Sequence[int],
        pictures: Tensor,
        styles: Sequence[str],
        here: Sequence[int],
    ) -> None:
        """Encode and cache the sentences at the indices `here` of `positions`; index 0 is the empty sentence."""
        for numbers in blocks(0, len(here), _CAPTIONS_AT_ONCE, "encoding captions"):
            some = here[numbers.start : numbers.stop]
            captions = [i - 1 for i in some if i]
            texts = self.gallery.captions(pictures[captions], [styles[i] for i in captions])
            fitting = [encoder.shorten(text) for text in texts]
            read = encoder.encode([*([""] if 0 in some else []), *fitting])
            for name, tokens in read.items():
                cache[name].write([positions[i] for i in some], tokens)
            for i, text, cut in zip(captions, texts, fitting, strict=True):
                if cut != text:
                    self.cut.add(next(iter(read)), self.gallery.name(int(pictures[i])))
            self.cut.save()
            raise_if_stopping()

    def take(self, rows: Tensor, caption_styles: Sequence[str], left_out: Mapping[str, Tensor]) -> dict[str, Tokens]:
        """Return name -> cached tokens of these captions; of the empty sentence where `left_out` (B,) of it is True."""
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
        """Return name -> the tokens of `count` empty sentences."""
        return {name: _tokens(one, [_EMPTY_SENTENCE] * count) for cache in self.cache for name, one in cache.items()}


def _tokens(cache: TokenCache, positions: Sequence[int]) -> Tokens:
    """Return the cached tokens; without a mask if all have the full length, as those of a stock text encoder."""
    values, lengths = cache.take(positions)
    assert int(lengths.min()), "all captions are encoded before they are used"
    return Tokens(values) if int(lengths.min()) == values.shape[1] else trim_padding(values, lengths)
