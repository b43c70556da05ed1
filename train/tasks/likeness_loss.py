"""The network of the adapter's likeness loss: it recognises a person from latents, without decoding them.

It is used for training only. The judge, which measures the result, is a different network: it takes pictures and is
trained on other people. It never takes part in the training of the adapter.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagine.networks.recogniser import ResidualBlock

DIMENSIONS = 128  # width of an embedding


class LikenessNetwork(nn.Module):
    """Map normalised latents (B, C, h, w) and a face mask (B, 1, h, w) of 1 and 0 to unit embeddings (B, 128)."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        fine, coarse, blocks = 128, 256, 2
        self.stem = nn.Conv2d(channels + 1, fine, 3, padding=1)
        self.fine = nn.Sequential(*(ResidualBlock(fine) for _ in range(blocks)))
        self.down = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(*(ResidualBlock(coarse) for _ in range(blocks)))
        self.norm = nn.GroupNorm(coarse // 16, coarse)
        self.out = nn.Linear(coarse, DIMENSIONS)

    def forward(self, latents: Tensor, faces: Tensor) -> Tensor:
        h = self.fine(self.stem(torch.cat((latents, faces.to(latents.dtype)), 1)))
        h = F.relu(self.norm(self.coarse(self.down(h))))
        return F.normalize(cast(Tensor, self.out(h.mean((2, 3)))), dim=1)
