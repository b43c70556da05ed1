"""Tokens of one frozen encoder for every sentence of a gallery, written once, behind the sentences' places."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imagine.records import Tokens
from train.cache.rows import mapped

_STEP = 16  # tokens are cut to the longest sentence of a batch, rounded up to this


class KeptTokens:
    """`count` places for up to `length` tokens of `width` numbers, in half precision, and how many each holds.

    A place that holds none is not written yet. What lies beyond a sentence's end is never written, so the file takes
    the disk only what the sentences need.
    """

    def __init__(self, path: Path, count: int, length: int, width: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.values = mapped(path.with_suffix(".f16"), (count, length, width), np.float16)
        # Written after the tokens, so that 0 means that they are not there yet.
        self.lengths = mapped(path.with_suffix(".lengths"), (count,), np.int16)

    def missing(self, places: Sequence[int]) -> list[int]:
        """Those of the places that hold nothing yet, each once."""
        wanted = np.fromiter(dict.fromkeys(places), np.int64)
        found: list[int] = wanted[self.lengths[wanted] == 0].tolist()
        return found

    def write(self, places: Sequence[int], tokens: Tokens) -> None:
        """Keep the tokens (B, L, width) that count, cut to what a place can hold."""
        mask = torch.ones(tokens.values.shape[:2], dtype=torch.bool) if tokens.mask is None else tokens.mask.cpu()
        values = tokens.values.to("cpu", torch.float16)
        kept = [row[counts][: self.values.shape[1]].numpy() for row, counts in zip(values, mask, strict=True)]
        for place, row in zip(places, kept, strict=True):
            self.values[place, : len(row)] = row
        self.values.flush()  # or a machine that stops could keep the lengths and lose the tokens
        self.lengths[list(places)] = [len(row) for row in kept]

    def take(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens (B, length, width) of these places, zero beyond their lengths (B,), of which nothing is read."""
        lengths = self.lengths[np.asarray(places)].astype(np.int64)
        values = torch.zeros(len(places), *self.values.shape[1:])
        for row, (place, length) in enumerate(zip(places, lengths.tolist(), strict=True)):
            values[row, :length] = torch.from_numpy(self.values[place, :length].astype(np.float32))
        return values, torch.from_numpy(lengths)


def cut(values: Tensor, lengths: Tensor) -> Tokens:
    """Tokens with their mask, as long as the longest needs."""
    longest = min(values.shape[1], -(-int(lengths.max()) // _STEP) * _STEP)
    return Tokens(values[:, :longest].contiguous(), torch.arange(longest) < lengths[:, None])
