"""Captions of the training pictures as tokens: written and read once each, kept on disk, as latents are.

Each picture has one caption in each manner. The frozen encoders' tokens (CLIP, T5) are kept in half precision and made
when first asked for; what stands between quotes is handed on as text, because ByT5 trains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from imagine.encoders import TextEncoders, quoted
from imagine.records import Tokens
from imagine.weights import fingerprint
from imagine.world import captions
from train.pictures import Gallery

STYLES = ("terse", "dense", "rewritten")
_T5_TOKENS = 128  # the longest dense captions take about 110
_STEP = 16  # tokens are cut to the longest caption of a batch, rounded up to this


@dataclass(frozen=True)
class Sentences:
    """A batch of captions: tokens of the frozen encoders, and the letters asked for, "" where there are none."""

    clip: Tokens
    t5: Tokens
    letters: list[str]

    def shifted(self) -> "Sentences":
        """The same captions, each given to the next picture."""
        return Sentences(_shifted(self.clip), _shifted(self.t5), self.letters[-1:] + self.letters[:-1])


class SentenceStore:
    """The captions of a gallery, in three manners, behind the row numbers of its pictures."""

    def __init__(self, gallery: Gallery, text: TextEncoders, folder: Path) -> None:
        self.gallery, self.text = gallery, text
        window = int(text.clip.config.max_position_embeddings)
        count, mark = len(gallery) * len(STYLES), f"{fingerprint(text.clip)}-{fingerprint(text.t5)}"
        folder.mkdir(parents=True, exist_ok=True)
        self.clip = _map(folder / f"clip-{mark}.f16", (count, window, text.clip.config.hidden_size))
        self.t5 = _map(folder / f"t5-{mark}.f16", (count, _T5_TOKENS, text.t5.config.d_model))
        # How many tokens count; written after the tokens, so that 0 means that they are not there yet.
        self.lengths = _map(folder / f"lengths-{mark}.i16", (count, 2), np.int16)

    def take(self, rows: Tensor, styles: Sequence[str], left_out: Tensor) -> Sentences:
        """The captions of these pictures, each in the manner given for it; "" where `left_out` (B,) says so."""
        texts = self.write(rows, styles)
        manners = [STYLES.index(style) for style in styles]
        places = rows.numpy() * len(STYLES) + np.array(manners)
        self._read({int(place): text for place, text in zip(places, texts, strict=True) if not self.lengths[place, 0]})
        lengths = torch.from_numpy(self.lengths[places].astype(np.int64))
        clip, t5 = (torch.from_numpy(kept[places]).float() for kept in (self.clip, self.t5))
        if left_out.any():
            empty = self.text.encode_clip([""]), self.text.encode_t5([""])
            for values, tokens, column in zip((clip, t5), empty, (0, 1), strict=True):
                here = _first(tokens)
                values[left_out, : len(here)], lengths[left_out, column] = here, len(here)
        letters = ["" if gone else quoted(text) for text, gone in zip(texts, left_out.tolist(), strict=True)]
        return Sentences(_cut(clip, lengths[:, 0]), _cut(t5, lengths[:, 1]), letters)

    def write(self, rows: Tensor, styles: Sequence[str]) -> list[str]:
        """Each picture's caption in the manner given for it, always the same one."""
        people, contexts = self.gallery.people(rows), self.gallery.contexts(rows)
        texts = [""] * len(rows)
        for style in set(styles):
            mine = [i for i, name in enumerate(styles) if name == style]
            for i, text in zip(mine, captions(people[mine], contexts[mine], style, rows[mine].tolist()), strict=True):
                texts[i] = text
        return texts

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
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    mode: Literal["r+", "w+"] = "r+" if path.exists() and path.stat().st_size == size else "w+"
    return np.memmap(path, kind, mode, shape=shape)


def _first(tokens: Tokens) -> Tensor:
    """The tokens (length, width) of the first sentence that count."""
    return tokens.values[0] if tokens.mask is None else tokens.values[0, tokens.mask[0]]


def _cut(values: Tensor, lengths: Tensor) -> Tokens:
    """Tokens with their mask, as long as the longest needs."""
    longest = min(values.shape[1], -(-int(lengths.max()) // _STEP) * _STEP)
    return Tokens(values[:, :longest].contiguous(), torch.arange(longest) < lengths[:, None])


def _shifted(tokens: Tokens) -> Tokens:
    return Tokens(tokens.values.roll(1, 0), None if tokens.mask is None else tokens.mask.roll(1, 0))
