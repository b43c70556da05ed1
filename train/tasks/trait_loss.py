"""An auxiliary loss that predicts the world's identity traits from an embedding, which speeds up early training."""

import torch
import torch.nn.functional as F
from torch import Tensor

from imagine.world.people import CONTINUOUS, People
from imagine.world.vocabulary import TRAITS

TRAIT_OUTPUTS = len(CONTINUOUS) + sum(map(len, TRAITS.values()))  # output width of the head that predicts the traits


def trait_loss(read: Tensor, people: People) -> Tensor:
    """Return the loss (B,): squared error of the continuous traits, cross-entropy of the discrete ones.

    `read` (B, TRAIT_OUTPUTS) is the prediction: the continuous traits, then the logits of each discrete trait, in the
    world's order.
    """
    people = people.to(read.device)
    target = torch.stack([getattr(people, name) for name in CONTINUOUS], 1)
    loss = 6 * (read[:, : len(CONTINUOUS)] - target).square().sum(1)
    at = len(CONTINUOUS)
    for name, words in TRAITS.items():
        logits = read[:, at : at + len(words)]
        loss = loss + F.cross_entropy(logits, getattr(people, name), reduction="none")
        at += len(words)
    return loss / (len(CONTINUOUS) + len(TRAITS))
