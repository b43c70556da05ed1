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
from train.cache.sentences import STYLES, caption_places
from train.cache.tokens import KeptTokens, cut
from train.data.public_base import Encode
from train.run.stopping import stop_here

log = logging.getLogger("train")
_AT_ONCE = 32  # captions
_NOTHING = 0  # the place of the empty sentence; captions follow


class Reader(Protocol):
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

    def __init__(self, gallery: AnyGallery, readers: Sequence[Reader], folder: Path) -> None:
        self.gallery, self.readers = gallery, readers
        count = 1 + len(gallery) * len(STYLES)
        self.kept = [
            {
                name: KeptTokens(folder / f"{name}-{reader.mark}-{gallery.mark}", count, *shape)
                for name, shape in reader.shapes.items()
            }
            for reader in readers
        ]

    @torch.no_grad()
    def read(self, rows: Tensor, manners: Sequence[str]) -> None:
        """Have the captions of these pictures read in these manners, each in all of them, unless they were before."""
        each = [(row, manner) for row in rows.tolist() for manner in manners]
        pictures, styles = torch.tensor([row for row, _ in each]), [manner for _, manner in each]
        places = [_NOTHING, *(1 + place for place in caption_places(pictures, styles))]
        for reader, kept in zip(self.readers, self.kept, strict=True):
            missing = {place for one in kept.values() for place in one.missing(places)}
            if missing:
                here = [i for i, place in enumerate(places) if place in missing]
                self._encode(reader.load(), kept, places, pictures, styles, here)

    def _encode(
        self,
        encode: Encode,
        kept: Mapping[str, KeptTokens],
        places: Sequence[int],
        pictures: Tensor,
        styles: Sequence[str],
        here: Sequence[int],
    ) -> None:
        """Read and keep the sentences whose places stand at these positions of `places`; the first is the empty one."""
        for start in track(range(0, len(here), _AT_ONCE), "reading captions"):
            some = here[start : start + _AT_ONCE]
            captions = [i - 1 for i in some if i]
            texts = self.gallery.captions(pictures[captions], [styles[i] for i in captions])
            read = encode([*([""] if 0 in some else []), *texts])
            for name, tokens in read.items():
                kept[name].write([places[i] for i in some], tokens)
            stop_here()

    def take(self, rows: Tensor, manners: Sequence[str], left_out: Mapping[str, Tensor]) -> dict[str, Tokens]:
        """Name -> tokens of these captions, which were read; of the empty sentence where `left_out` (B,) says so."""
        places = [1 + place for place in caption_places(rows, manners)]
        return {
            name: _tokens(one, [_NOTHING if gone else place for place, gone in zip(places, silent, strict=True)])
            for kept in self.kept
            for name, one in kept.items()
            for silent in [left_out[name].tolist()]
        }

    def nothing(self, count: int) -> dict[str, Tokens]:
        """Name -> the tokens of so many empty sentences."""
        return {name: _tokens(one, [_NOTHING] * count) for kept in self.kept for name, one in kept.items()}


def _tokens(kept: KeptTokens, places: Sequence[int]) -> Tokens:
    """Tokens without a mask where every place is full, as a stock text encoder's are."""
    values, lengths = kept.take(places)
    assert int(lengths.min()), "all captions are read before they are asked for"
    return Tokens(values) if int(lengths.min()) == values.shape[1] else cut(values, lengths)
