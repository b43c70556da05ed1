"""Terms that methods add to the error of the denoiser's prediction, one number per sample."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from imagine.records import Watched


def location_loss(watched: Mapping[str, Watched], places: Tensor, halves: Tensor, vectors: int = 1) -> Tensor:
    """Return the mean squared attention of each subject's words outside its own region, (B,).

    SVDiff (arXiv 2303.11305, equation 5). places: (B, L), the learnt words in the text. halves: (B, S, 1, h, w), 1
    where a subject is; its words are numbers s * vectors + 1 and on. Layers of other shapes than squares are left out.
    """
    losses = []
    for layer in watched.values():
        attention = layer.attention()  # (B, positions, L)
        side = round(attention.shape[1] ** 0.5)
        if side * side != attention.shape[1]:
            continue
        for subject in range(halves.shape[1]):
            words = (places > subject * vectors) & (places <= (subject + 1) * vectors)
            outside = 1 - F.interpolate(halves[:, subject], size=(side, side), mode="nearest").flatten(1)
            drawn = (attention * words[:, None].to(attention.dtype)).sum(2)
            losses.append((drawn * outside.to(drawn)).square().mean(1))
    return torch.stack(losses).mean(0) if losses else halves.new_zeros(len(halves))


def norm_loss(rows: Tensor, wanted: float) -> Tensor:
    """Return the squared distance of the rows' norms to a wanted norm, a scalar (cloneofsimo/lora pulls it to 0.4)."""
    return (rows.norm(dim=-1) - wanted).square().mean()
