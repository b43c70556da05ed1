"""The share of a stage's images that carry a word, which may change while the stage trains.

Which images carry one is a pure function of their number, and as regular as the order of the sources
(`train.data.sources`): any stretch of images has the wanted share up to a few images.
"""

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from train.task import Share

# Multiples of it modulo 1 are evenly spread, and independent of the golden ratio's, which choose the source.
_SILVER_RATIO = 2**0.5 - 1


class Words(BaseModel):
    """The share of images with a word: `start` for the first `steady` images, then over `over` images to `end`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    start: Share
    end: Share
    steady: Annotated[int, Field(ge=0)] = 0  # images with the share `start`
    over: Annotated[int, Field(ge=0)] = 0  # images over which it then changes, linearly; 0: at once

    def shares(self, first: int, size: int) -> Tensor:
        """Return the wanted share at each image `first` to `first + size`, (size,)."""
        numbers = torch.arange(first, first + size, dtype=torch.float64)
        moved = ((numbers - self.steady) / self.over).clamp(0, 1) if self.over else (numbers >= self.steady).double()
        return self.start + (self.end - self.start) * moved

    def carry(self, first: int, size: int) -> Tensor:
        """Return which of the images `first` to `first + size` carry a word, (size,) bool."""
        numbers = torch.arange(first, first + size, dtype=torch.float64)
        return (numbers * _SILVER_RATIO) % 1 < self.shares(first, size)
