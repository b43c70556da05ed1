"""Cached caption tokens of the training pictures: each caption is encoded once and stored on disk.

Each picture has one caption in each style. The tokens of the frozen encoders (CLIP, T5) are stored in half precision
and computed on first use; quoted text is passed on as text, because ByT5 trains. A caption that is longer than an
encoder takes is cut, and counted (`train.cache.shortening`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from imagine.networks.encoders import CLIP_WINDOWS, QUOTED_BYTES, T5_TOKENS, TextEncoders, quoted
from imagine.networks.weights import fingerprint
from imagine.records import Tokens, join
from train.cache.pictures import Gallery
from train.cache.shortening import CutCaptions, shorten
from train.cache.tokens import TokenCache, trim_padding

STYLES = ("terse", "dense", "rewritten")
Encode = Callable[[Sequence[str]], Tokens]
_WORLD_T5_TOKENS = 128  # the longest dense captions of the portrait world take about 110


@dataclass(frozen=True)
class Sentences:
    """A batch of captions: tokens of the frozen encoders, and the quoted text, "" where there is none."""

    clip: Tokens
    t5: Tokens
    letters: list[str]

    def __getitem__(self, rows: Tensor) -> "Sentences":
        return Sentences(_rows(self.clip, rows), _rows(self.t5, rows), [self.letters[i] for i in rows.tolist()])

    @staticmethod
    def join(pieces: "Sequence[Sentences]") -> "Sentences":
        """Concatenate batches; shorter captions are padded."""
        if len(pieces) == 1:
            return pieces[0]
        clip, t5 = join([piece.clip for piece in pieces]), join([piece.t5 for piece in pieces])
        return Sentences(clip, t5, [letters for piece in pieces for letters in piece.letters])

    def shifted(self) -> "Sentences":
        """Return the captions shifted by one picture: each one moves to the next picture."""
        return Sentences(_shifted(self.clip), _shifted(self.t5), self.letters[-1:] + self.letters[:-1])


class CaptionedGallery(Protocol):
    """The interface of a gallery whose captions are cached."""

    @property
    def mark(self) -> str:
        """A fingerprint of everything that a row depends on besides its number."""
        ...

    def __len__(self) -> int: ...

    def captions(self, rows: Tensor, caption_styles: Sequence[str]) -> list[str]:
        """Return each picture's caption in the given style; it is the same at every call."""
        ...

    def name(self, row: int) -> str:
        """Return the name of a row in messages."""
        ...


class SentenceStore:
    """The captions of a gallery in three styles, indexed by the row numbers of its pictures.

    Each process has its own files, because machines that write to one file would overwrite each other's data.
    """

    def __init__(self, gallery: CaptionedGallery, text: TextEncoders, folder: Path) -> None:
        self.gallery, self.text = gallery, text
        window = int(text.clip.config.max_position_embeddings)
        made_by = "-".join(fingerprint(encoder)[:16] for encoder in (text.clip, text.t5))
        count, mark = len(gallery) * len(STYLES), f"{made_by}-{gallery.mark}{process_suffix()}"
        # Captions of portraits are short; those of several people and of records may have the length of a prompt.
        world = isinstance(gallery, Gallery)
        windows, tokens = (1, _WORLD_T5_TOKENS) if world else (CLIP_WINDOWS, T5_TOKENS)
        self.clip = TokenCache(folder / f"clip-{mark}", count, windows * window, int(text.clip.config.hidden_size))
        self.t5 = TokenCache(folder / f"t5-{mark}", count, tokens, int(text.t5.config.d_model))
        self.cut = CutCaptions(folder / f"cut_captions{process_suffix()}.json")

    def take(
        self, rows: Tensor, caption_styles: Sequence[str], left_out: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Sentences:
        """Return the captions of these pictures, each in the given style.

        `left_out` maps "clip", "t5" and "byt5" to a mask (B,) of pictures for which that branch gets an empty caption.
        """
        texts = self.gallery.captions(rows, caption_styles)
        positions = caption_positions(rows, caption_styles)
        self._read(dict(zip(positions, texts, strict=True)))
        letters = [self._letters(row, text) for row, text in zip(rows.tolist(), texts, strict=True)]
        (clip, clip_lengths), (t5, t5_lengths) = self.clip.take(positions), self.t5.take(positions)
        dropped = {
            name: left_out.get(name, torch.zeros(len(rows), dtype=torch.bool)) for name in ("clip", "t5", "byt5")
        }
        self._leave_out(clip, clip_lengths, dropped["clip"], self.text.encode_clip)
        self._leave_out(t5, t5_lengths, dropped["t5"], self.text.encode_t5)
        shown = ["" if is_dropped else text for text, is_dropped in zip(letters, dropped["byt5"].tolist(), strict=True)]
        return Sentences(trim_padding(clip, clip_lengths), trim_padding(t5, t5_lengths), shown)

    def _leave_out(self, values: Tensor, lengths: Tensor, dropped: Tensor, encode: Encode) -> None:
        """Replace the tokens by those of the empty sentence where `dropped` (B,), in place."""
        if dropped.any():
            here = _first(encode([""]))
            values[dropped, : len(here)], lengths[dropped] = here, len(here)

    @torch.no_grad()
    def _read(self, texts: Mapping[int, str]) -> None:
        """Encode the captions at these positions that are not cached yet."""
        for name, cache, encode in (
            ("t5", self.t5, self.text.encode_t5),
            ("clip", self.clip, self.text.encode_clip),
        ):
            if positions := cache.missing(list(texts)):
                cache.write(positions, encode([self._fitting(p // len(STYLES), name, texts[p]) for p in positions]))
                self.cut.save()

    def _letters(self, row: int, text: str) -> str:
        """Return the quoted text of a caption, cut to what ByT5 takes."""
        letters = quoted(text)
        if len(letters.encode()) < QUOTED_BYTES:  # ByT5's tokens are bytes, and the end token
            return letters
        cut = shorten(letters, lambda some: self.text.fits("byt5", f'"{some}"'))
        if cut != letters:
            self.cut.add("byt5", self.gallery.name(row))
            self.cut.save()
        return cut

    def _fitting(self, row: int, encoder: str, text: str) -> str:
        """Return the caption, cut to what an encoder takes; a caption that is cut is counted."""
        cut = shorten(text, lambda some: self.text.fits(encoder, some))
        if cut != text:
            self.cut.add(encoder, self.gallery.name(row))
        return cut


def process_suffix() -> str:
    """Return a suffix for this process's file names; "" for the main process."""
    here = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if here else 0
    return f"-process-{rank}" if rank else ""


def caption_positions(rows: Tensor, caption_styles: Sequence[str]) -> list[int]:
    """Return the positions of these pictures' captions in the cache, each in the given style."""
    return [
        row * len(STYLES) + STYLES.index(caption_style)
        for row, caption_style in zip(rows.tolist(), caption_styles, strict=True)
    ]


def _first(tokens: Tokens) -> Tensor:
    """Return the unmasked tokens (length, width) of the first sentence."""
    return tokens.values[0] if tokens.mask is None else tokens.values[0, tokens.mask[0]]


def _rows(tokens: Tokens, rows: Tensor) -> Tokens:
    return Tokens(tokens.values[rows], None if tokens.mask is None else tokens.mask[rows])


def _shifted(tokens: Tokens) -> Tokens:
    return Tokens(tokens.values.roll(1, 0), None if tokens.mask is None else tokens.mask.roll(1, 0))
