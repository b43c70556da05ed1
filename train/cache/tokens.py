"""Tokens of one frozen encoder for every sentence of a gallery, written once, behind the sentences' places."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imagine.records import Tokens
from train.cache.rows import map_file

_LENGTH_MULTIPLE = 16  # tokens are cut to the longest sentence of a batch, rounded up to this


class TokenCache:
    """`count` places for up to `length` tokens of `width` numbers, in half precision, and how many each holds.

    A place that holds none is not written yet. What lies beyond a sentence's end is never written, so the file takes
    the disk only what the sentences need.
    """

    def __init__(self, path: Path, count: int, length: int, width: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.values = map_file(path.with_suffix(".f16"), (count, length, width), np.float16)
        # Written after the tokens, so that 0 means that they are not there yet.
        self.lengths = map_file(path.with_suffix(".lengths"), (count,), np.int16)

    def missing(self, positions: Sequence[int]) -> list[int]:
        """Those of the places that hold nothing yet, each once."""
        wanted = np.fromiter(dict.fromkeys(positions), np.int64)
        found: list[int] = wanted[self.lengths[wanted] == 0].tolist()
        return found

    def write(self, positions: Sequence[int], tokens: Tokens) -> None:
        """Keep the tokens (B, L, width) that count, cut to what a place can hold."""
        mask = torch.ones(tokens.values.shape[:2], dtype=torch.bool) if tokens.mask is None else tokens.mask.cpu()
        values = tokens.values.to("cpu", torch.float16)
        kept = [row[counts][: self.values.shape[1]].numpy() for row, counts in zip(values, mask, strict=True)]
        for position, row in zip(positions, kept, strict=True):
            self.values[position, : len(row)] = row
        self.values.flush()  # or a machine that stops could keep the lengths and lose the tokens
        self.lengths[list(positions)] = [len(row) for row in kept]

    def take(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens (B, length, width) of these places, zero beyond their lengths (B,), of which nothing is read."""
        lengths = self.lengths[np.asarray(positions)].astype(np.int64)
        values = torch.zeros(len(positions), *self.values.shape[1:])
        for row, (position, length) in enumerate(zip(positions, lengths.tolist(), strict=True)):
            values[row, :length] = torch.from_numpy(self.values[position, :length].astype(np.float32))
        return values, torch.from_numpy(lengths)


def trim_padding(values: Tensor, lengths: Tensor) -> Tokens:
    """Tokens with their mask, as long as the longest needs."""
    longest = min(values.shape[1], -(-int(lengths.max()) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)
    return Tokens(values[:, :longest].contiguous(), torch.arange(longest) < lengths[:, None])
