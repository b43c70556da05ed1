"""Captions of the training pictures as tokens: written and read once each, kept on disk, as latents are.

Each picture has one caption in each manner. The frozen encoders' tokens (CLIP, T5) are kept in half precision and made
when first asked for; what stands between quotes is handed on as text, because ByT5 trains.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from imagine.encoders import TextEncoders, quoted
from imagine.records import Tokens
from imagine.sampling import join
from imagine.weights import fingerprint
from train.pictures import AnyGallery

STYLES = ("terse", "dense", "rewritten")
Encode = Callable[[Sequence[str]], Tokens]
_T5_TOKENS = 128  # the longest dense captions take about 110
_STEP = 16  # tokens are cut to the longest caption of a batch, rounded up to this


@dataclass(frozen=True)
class Sentences:
    """A batch of captions: tokens of the frozen encoders, and the letters asked for, "" where there are none."""

    clip: Tokens
    t5: Tokens
    letters: list[str]

    def __getitem__(self, rows: Tensor) -> "Sentences":
        return Sentences(_rows(self.clip, rows), _rows(self.t5, rows), [self.letters[i] for i in rows.tolist()])

    @staticmethod
    def join(pieces: "Sequence[Sentences]") -> "Sentences":
        """One batch of several, the shorter captions padded."""
        if len(pieces) == 1:
            return pieces[0]
        clip, t5 = join([piece.clip for piece in pieces]), join([piece.t5 for piece in pieces])
        return Sentences(clip, t5, [letters for piece in pieces for letters in piece.letters])

    def shifted(self) -> "Sentences":
        """The same captions, each given to the next picture."""
        return Sentences(_shifted(self.clip), _shifted(self.t5), self.letters[-1:] + self.letters[:-1])


class SentenceStore:
    """The captions of a gallery, in three manners, behind the row numbers of its pictures."""

    def __init__(self, gallery: AnyGallery, text: TextEncoders, folder: Path) -> None:
        self.gallery, self.text = gallery, text
        window = int(text.clip.config.max_position_embeddings)
        count, mark = len(gallery) * len(STYLES), f"{fingerprint(text.clip)}-{fingerprint(text.t5)}-{gallery.mark}"
        folder.mkdir(parents=True, exist_ok=True)
        self.clip = _map(folder / f"clip-{mark}.f16", (count, window, text.clip.config.hidden_size))
        self.t5 = _map(folder / f"t5-{mark}.f16", (count, _T5_TOKENS, text.t5.config.d_model))
        # How many tokens count; written after the tokens, so that 0 means that they are not there yet.
        self.lengths = _map(folder / f"lengths-{mark}.i16", (count, 2), np.int16)

    def take(
        self, rows: Tensor, manners: Sequence[str], left_out: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Sentences:
        """The captions of these pictures, each in the manner given for it.

        `left_out` says for "clip", "t5" and "byt5" which pictures that branch is told nothing of, (B,) bool.
        """
        texts = self.gallery.captions(rows, manners)
        places = rows.numpy() * len(STYLES) + np.array([STYLES.index(manner) for manner in manners])
        self._read({int(place): text for place, text in zip(places, texts, strict=True) if not self.lengths[place, 0]})
        lengths = torch.from_numpy(self.lengths[places].astype(np.int64))
        clip, t5 = (_taken(kept, places, lengths[:, i]) for i, kept in enumerate((self.clip, self.t5)))
        gone = {name: left_out.get(name, torch.zeros(len(rows), dtype=torch.bool)) for name in ("clip", "t5", "byt5")}
        self._leave_out(clip, lengths[:, 0], gone["clip"], self.text.encode_clip)
        self._leave_out(t5, lengths[:, 1], gone["t5"], self.text.encode_t5)
        letters = ["" if silent else quoted(text) for text, silent in zip(texts, gone["byt5"].tolist(), strict=True)]
        return Sentences(_cut(clip, lengths[:, 0]), _cut(t5, lengths[:, 1]), letters)

    def _leave_out(self, values: Tensor, lengths: Tensor, gone: Tensor, encode: Encode) -> None:
        """Put the tokens of the empty sentence where `gone` (B,), in place."""
        if gone.any():
            here = _first(encode([""]))
            values[gone, : len(here)], lengths[gone] = here, len(here)

    @torch.no_grad()
    def _read(self, texts: Mapping[int, str]) -> None:
        """Encode the captions that belong to these places, cut to what a place can hold."""
        if not texts:
            return
        places, written = np.array(list(texts)), list(texts.values())
        # CLIP's lengths come last: they say that a place is filled.
        for column, kept, tokens in (
            (1, self.t5, self.text.encode_t5(written)),
            (0, self.clip, self.text.encode_clip(written)),
        ):
            assert tokens.mask is not None, "both encoders return masks"
            length = min(kept.shape[1], tokens.values.shape[1])
            kept[places, :length] = tokens.values[:, :length].half().cpu().numpy()
            self.lengths[places, column] = tokens.mask[:, :length].sum(1).cpu().numpy()


def _map(path: Path, shape: tuple[int, ...], kind: Any = np.float16) -> "np.memmap[tuple[int, ...], Any]":
    mode: Literal["r+", "w+"] = "r+" if path.exists() else "w+"
    if mode == "r+":  # a gallery that grew keeps its rows
        os.truncate(path, int(np.prod(shape)) * np.dtype(kind).itemsize)
    return np.memmap(path, kind, mode, shape=shape)


def _taken(kept: "np.memmap[tuple[int, ...], Any]", places: "np.ndarray[Any, Any]", lengths: Tensor) -> Tensor:
    """The tokens (B, length, width) of these places, zero beyond their lengths (B,), of which nothing is read."""
    values = torch.zeros(len(places), *kept.shape[1:])
    for row, (place, length) in enumerate(zip(places.tolist(), lengths.tolist(), strict=True)):
        values[row, :length] = torch.from_numpy(kept[place, :length].astype(np.float32))
    return values


def _first(tokens: Tokens) -> Tensor:
    """The tokens (length, width) of the first sentence that count."""
    return tokens.values[0] if tokens.mask is None else tokens.values[0, tokens.mask[0]]


def _cut(values: Tensor, lengths: Tensor) -> Tokens:
    """Tokens with their mask, as long as the longest needs."""
    longest = min(values.shape[1], -(-int(lengths.max()) // _STEP) * _STEP)
    return Tokens(values[:, :longest].contiguous(), torch.arange(longest) < lengths[:, None])


def _rows(tokens: Tokens, rows: Tensor) -> Tokens:
    return Tokens(tokens.values[rows], None if tokens.mask is None else tokens.mask[rows])


def _shifted(tokens: Tokens) -> Tokens:
    return Tokens(tokens.values.roll(1, 0), None if tokens.mask is None else tokens.mask.roll(1, 0))
