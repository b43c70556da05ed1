"""Reading the world's identity traits off an embedding: a helper loss that says at once what there is to look at."""

import torch
import torch.nn.functional as F
from torch import Tensor

from imagine.world.people import CONTINUOUS, People
from imagine.world.vocabulary import TRAITS

TRAIT_OUTPUTS = len(CONTINUOUS) + sum(map(len, TRAITS.values()))  # width of what a head must return


def trait_loss(read: Tensor, people: People) -> Tensor:
    """How badly the traits are read, (B,): squared error of the continuous ones, cross-entropy of the others.

    `read` is (B, TRAIT_OUTPUTS): the continuous traits, then logits for each discrete one, in the world's order.
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
