"""An auxiliary loss that predicts the masks of a picture's parts from a feature map in the middle of the denoiser.

Alignment of the middle of a denoiser to features of a trained encoder speeds up its training (REPA, arXiv 2410.06940).
Of such features the spatial structure matters (iREPA, arXiv 2512.10794). The portrait world knows that structure: masks
of head, hair and clothes, and where eyes, mouth and words are. The head that predicts them is discarded after training,
and the loss should end before training does (HASTE, arXiv 2505.16792).
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from imagine.world.parts import PARTS

# How much of a picture each part covers on average, measured on 200 portraits (`part_masks`).
_COVERED = {
    "head": 0.144, "hair": 0.058, "body": 0.144, "headwear": 0.031, "eyes": 0.010, "nose": 0.0034, "mouth": 0.0077,
    "word": 0.0063,
}  # fmt: skip


class PartHead(nn.Module):
    """Predict part masks from the states of one layer; discarded after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.finer = 2  # cells of a mask per position, in each direction
        self.out = nn.Conv2d(width, len(PARTS) * self.finer**2, 3, padding=1)

    def forward(self, states: Tensor, size: tuple[int, int]) -> Tensor:
        """Map states (B, positions, width) of a layer of `size` to logits (B, parts, 2 * height, 2 * width)."""
        maps = states.transpose(1, 2).unflatten(2, size)
        return F.pixel_shuffle(self.out(maps), self.finer)


def part_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the cross-entropy (B,) of logits (B, parts, h, w) against masks (B, parts, H, W) in 0..1.

    The masks are averaged over the area of each cell. Each part is divided by the entropy of how much it covers on
    average, so that eyes count as much as hair: knowing no more than that gives 1.
    """
    wanted = F.adaptive_avg_pool2d(masks, (logits.shape[-2], logits.shape[-1]))
    each = F.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none").mean((2, 3))
    return (each / each.new_tensor([_entropy(_COVERED[part]) for part in PARTS])).mean(1)


def _entropy(share: float) -> float:
    return -share * math.log(share) - (1 - share) * math.log(1 - share)
