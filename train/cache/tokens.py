"""Cached tokens of one frozen encoder for every sentence of a gallery, indexed by the sentence's position."""

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imagine.records import Tokens
from train.cache.rows import map_file

_LENGTH_MULTIPLE = 16  # tokens are cut to the longest sentence of a batch, rounded up to this


class TokenCache:
    """`count` entries of up to `length` tokens of `width` values in half precision, and the length of each entry.

    precision: float16, or bfloat16 for states that may exceed its range. An entry of length 0 is not written yet.
    Nothing is written beyond a sentence's end, so the sparse file needs disk space only for the sentences.
    """

    def __init__(self, path: Path, count: int, length: int, width: int, precision: torch.dtype = torch.float16) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.precision = precision
        # numpy has no bfloat16, so its bits are stored as int16
        suffix, kind = (".bf16", np.int16) if precision == torch.bfloat16 else (".f16", np.float16)
        self.values = map_file(path.with_suffix(suffix), (count, length, width), kind)
        if isinstance(self.values.base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
            # Reading ahead would fill the memory with the empty space between the sentences of a sparse file.
            self.values.base.madvise(mmap.MADV_RANDOM)
        # Written after the tokens, so that an interrupted write leaves length 0.
        self.lengths = map_file(path.with_suffix(".lengths"), (count,), np.int16)

    def missing(self, positions: Sequence[int]) -> list[int]:
        """Return the positions that are not written yet, without duplicates."""
        wanted = np.fromiter(dict.fromkeys(positions), np.int64)
        found: list[int] = wanted[self.lengths[wanted] == 0].tolist()
        return found

    def write(self, positions: Sequence[int], tokens: Tokens) -> None:
        """Write the unmasked tokens of (B, L, width), truncated to the length of an entry."""
        mask = torch.ones(tokens.values.shape[:2], dtype=torch.bool) if tokens.mask is None else tokens.mask.cpu()
        values = tokens.values.to("cpu", self.precision)
        trimmed = [self._stored(row[counts][: self.values.shape[1]]) for row, counts in zip(values, mask, strict=True)]
        for position, row in zip(positions, trimmed, strict=True):
            self.values[position, : len(row)] = row
        self.values.flush()  # otherwise a crash could leave lengths on disk without their tokens
        self.lengths[list(positions)] = [len(row) for row in trimmed]

    def take(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return tokens (B, length, width) at these positions, zero beyond their lengths, and the lengths (B,)."""
        lengths = self.lengths[np.asarray(positions)].astype(np.int64)
        values = torch.zeros(len(positions), *self.values.shape[1:])
        for row, (position, length) in enumerate(zip(positions, lengths.tolist(), strict=True)):
            values[row, :length] = self._read(self.values[position, :length])
        return values, torch.from_numpy(lengths)

    def _stored(self, row: Tensor) -> "np.ndarray[Any, Any]":
        return (row.view(torch.int16) if self.precision == torch.bfloat16 else row).numpy()

    def _read(self, stored: "np.ndarray[Any, Any]") -> Tensor:
        if self.precision == torch.bfloat16:
            return torch.from_numpy(stored.copy()).view(torch.bfloat16).float()
        return torch.from_numpy(stored.astype(np.float32))


def trim_padding(values: Tensor, lengths: Tensor) -> Tokens:
    """Return the tokens with their mask, cut to the longest sentence rounded up to a multiple of 16."""
    longest = min(values.shape[1], -(-int(lengths.max()) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)
    return Tokens(values[:, :longest].contiguous(), torch.arange(longest) < lengths[:, None])
