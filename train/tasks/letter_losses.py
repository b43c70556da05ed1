"""Auxiliary losses that teach a base to write: what a letter looks like, where it belongs, and that it can be read.

glyph              the values of a letter's token must contain the picture of the letter. Glyph-ByT5 aligns the tokens
                   of ByT5 with rendered glyphs (arXiv 2403.09622); here a linear layer predicts the glyph
letter attention   a letter's token must be attended to inside the cells of its letter. FastComposer holds attention to
                   segments in this way (arXiv 2305.10431, section 4.2), UDiffText that of characters (arXiv 2312.04884)
reader             a reader must read the word in the decoded prediction (UDiffText; OCR losses as in AnyText, arXiv
                   2311.03054)

Each returns one loss per picture, and 0 where the picture has no word or the branch of characters does not know it.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagine.evaluation.judge import Reader, reading_loss
from imagine.records import Watched
from imagine.world.contexts import letters_text
from imagine.world.glyphs import atlas
from imagine.world.vocabulary import LETTERS
from train.cache.latents import box_mask

GLYPH = 16  # side of a predicted glyph
_LEAST = 1e-6  # below this share of attention the loss does not rise further


class GlyphHead(nn.Module):
    """Predict the glyph of a letter from the values of its token; discarded after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, GLYPH**2)

    def forward(self, values: Tensor) -> Tensor:
        """Map values (N, width) to logits (N, GLYPH**2)."""
        logits: Tensor = self.out(values)
        return logits


@lru_cache(maxsize=1)
def glyphs() -> Tensor:
    """Return the glyphs of the world's letters, (27, GLYPH**2) in 0..1; entry 0 is empty."""
    return F.interpolate(atlas()[:, None], size=(GLYPH, GLYPH), mode="area").flatten(1)


def finest(watched: Mapping[str, Watched]) -> list[Watched]:
    """Return the layers with the most positions: the only ones that can tell letters apart."""
    most = max(each.query.shape[2] for each in watched.values())
    return [each for each in watched.values() if each.query.shape[2] == most]


def glyph_loss(watched: Mapping[str, Watched], head: GlyphHead, texts: Sequence[str]) -> Tensor:
    """Return the error (B,) of the glyphs that `head` predicts from the values of the finest layers.

    texts: what ByT5 read for each picture; its tokens are bytes, so token i belongs to byte i. Characters without a
    glyph do not count. The error is the binary cross-entropy, averaged over pixels, letters and layers.
    """
    layers = finest(watched)
    device, count = layers[0].query.device, len(texts)
    letters = [(row, place, number) for row, text in enumerate(texts) for place, number in _numbered(text)]
    if not letters:
        return torch.zeros(count, device=device)
    rows, places, numbers = torch.tensor(letters, device=device).T
    wanted, losses = glyphs().to(device)[numbers], []
    for layer in layers:
        assert layer.value is not None, "branches show their values"
        logits = head(layer.value[rows, :, places].flatten(1))
        losses.append(F.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none").mean(1))
    sums = torch.zeros(count, device=device).index_add(0, rows, torch.stack(losses).mean(0))
    return sums / torch.bincount(rows, minlength=count).clamp(min=1)


def _numbered(text: str) -> list[tuple[int, int]]:
    """Return (byte, number of the letter) for the bytes of a text that are letters of the world."""
    return [(place, LETTERS.index(chr(byte)) + 1) for place, byte in enumerate(text.encode()) if chr(byte) in LETTERS]


def knows_word(letters: Tensor, texts: Sequence[str]) -> Tensor:
    """Return where ByT5 read just the word of the picture, (B,) bool; `letters` (B, 3) are the numbers of its letters.

    Elsewhere there is no word, or the caption does not mention it, or it was left out.
    """
    words = [letters_text(row) for row in letters]
    known = [bool(word) and word == text for word, text in zip(words, texts, strict=True)]
    return torch.tensor(known, device=letters.device)


def letter_boxes_of(words: Tensor, letters: Tensor) -> Tensor:
    """Return the box of each letter, (B, 3, 4) in pixels, of the words' boxes (B, 4); width 0 where there is none.

    All letters of a word are equally wide.
    """
    there = letters > 0
    width = words[:, 2:3] / there.sum(1, keepdim=True).clamp(min=1) * there
    left = words[:, :1] + torch.arange(letters.shape[1], device=words.device) * width
    top, height = (words[:, i : i + 1].expand_as(width) for i in (1, 3))
    return torch.stack((left, top, width, height), 2)


def letter_attention_loss(
    watched: Mapping[str, Watched], boxes: Tensor, known: Tensor, picture: int, cells: tuple[int, int]
) -> Tensor:
    """Return -log of the share of a letter's attention inside the cells of its letter, (B,), 0 or more.

    The attention to a token is summed over all positions of the layer, and over those that touch the letter's box. The
    loss is the mean over letters and over the finest layers. boxes: (B, 3, 4) of the letters in pixels of a picture of
    `picture` pixels; cells: height and width of the layers. known: (B,) bool, where the tokens are those of the word.
    """
    rows = known.nonzero().squeeze(1)
    layers, zeros = finest(watched), torch.zeros(len(known), device=boxes.device)
    if not len(rows):
        return zeros
    slots = boxes.shape[1]
    inside = box_mask(boxes[rows].flatten(0, 1).cpu(), (picture, picture), cells).to(boxes.device)
    inside = inside.flatten(1).unflatten(0, (len(rows), slots))  # (b, slots, positions)
    there = inside.any(2)  # a letter outside the picture has no cell
    losses = []
    for layer in layers:
        mask = layer.mask if layer.mask is None else layer.mask[rows]
        attention = Watched(layer.query[rows], layer.key[rows], mask).attention().float()[:, :, :slots].transpose(1, 2)
        share = (attention * inside).sum(2) / attention.sum(2).clamp(min=_LEAST)
        losses.append(-(share.clamp(min=_LEAST).log() * there).sum(1) / there.sum(1).clamp(min=1))
    return zeros.index_add(0, rows, torch.stack(losses).mean(0))


def readable(words: Tensor, picture: int) -> Tensor:
    """Return which words (B, 4), boxes in pixels, are for four fifths or more within a picture of that side, (B,)."""
    start, length = words[:, :2], words[:, 2:]
    seen = (torch.minimum(start + length, torch.full_like(start, picture)) - start.clamp(min=0)).clamp(min=0)
    return (words[:, 2] > 0) & (seen.prod(1) >= 0.8 * length.prod(1))


def reader_loss(reader: Reader, pictures: Tensor, letters: Tensor) -> Tensor:
    """Return the cross-entropy (B,) of the words (B, 3) that a reader reads in pictures (B, 3, S, S) in 0..1."""
    if pictures.shape[-1] != reader.size:
        pictures = F.interpolate(pictures, size=(reader.size, reader.size), mode="bilinear")
    return reading_loss({"letters": reader(pictures)["letters"].float()}, {"letters": letters})["letters"]
