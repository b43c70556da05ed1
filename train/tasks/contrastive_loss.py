"""InfoNCE, the contrastive loss that matches two views of each item within a batch, with a learned temperature."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Temperature(nn.Module):
    """Learned scales of cosines, stored as logarithms, one per kind of match (CLIP, arXiv 2103.00020, section 2.3)."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((kinds,), math.log(10.0)))

    def scales(self) -> Tensor:
        """Return the scales (kinds,), at most 60."""
        return self.log_scale.clamp(max=math.log(60.0)).exp()


def info_nce(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric InfoNCE loss (B,) of matching rows of unit vectors (B, D), and the share of rows matched."""
    logits = scale * a @ b.T
    labels = torch.arange(len(a), device=a.device)
    loss = (F.cross_entropy(logits, labels, reduction="none") + F.cross_entropy(logits.T, labels, reduction="none")) / 2
    return loss, (logits.argmax(1) == labels).float().mean()
