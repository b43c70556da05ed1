"""Who became whom in a picture of several people: the confusion matrix of MultiBind (arXiv 2603.21937).

S_gen holds the similarity of the face in each person's place to every person, S_gt the same for a real picture. Their
difference Delta separates what a system adds from how alike the people are: its diagonal is what each person lost, the
rest what each place gained of the others. The paper names four patterns of it (drift, swap, dominance, blending); the
rules by which `patterns` tells them apart, and the tolerance, are ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PATTERNS = ("kept", "drift", "swap", "dominance", "blending", "missing")


def confusion(generated: Tensor, real: Tensor) -> Tensor:
    """Return Delta = S_gen - S_gt, (P, P): row i is the face in the place of person i, column j the person compared.

    A row without a face is NaN in `generated` and in the result.
    """
    return generated - real


def tolerance(real: Tensor) -> float:
    """Return the change that counts: half of the gap between the same and another person in real pictures (N, P, P)."""
    people = real.shape[-1]
    own = torch.eye(people, dtype=torch.bool).expand_as(real)
    return float((real[own].mean() - real[~own].mean()) / 2)


def patterns(delta: Tensor, limit: float) -> list[str]:
    """Return the pattern of every person of one picture (P, P), one of PATTERNS.

    A place has lost its person if the diagonal fell by more than `limit`, and gained another whose column rose by more.
    drift: lost, and gained nobody. swap: two places lost their own and gained each other's. dominance: lost, and gained
    somebody who is also elsewhere. blending: gained somebody without losing the own person.
    """
    count = len(delta)
    lost = [bool(delta[i, i] < -limit) for i in range(count)]
    gained = [[j for j in range(count) if j != i and bool(delta[i, j] > limit)] for i in range(count)]
    missing = [bool(delta[i].isnan().any()) for i in range(count)]
    return ["missing" if missing[i] else _pattern(i, lost, gained) for i in range(count)]


def _pattern(i: int, lost: Sequence[bool], gained: Sequence[Sequence[int]]) -> str:
    if not lost[i]:
        return "blending" if gained[i] else "kept"
    if not gained[i]:
        return "drift"
    return "swap" if any(lost[j] and i in gained[j] for j in gained[i]) else "dominance"
