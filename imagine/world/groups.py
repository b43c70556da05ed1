"""Arrange several people in one picture: side by side, one behind the other, or arms round shoulders.

An arrangement says where each person stands, how large, leaning how far, who is in front, and whose arm lies on whose
shoulders. Wide canvases keep heads as large as in portraits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imagine.world.contexts import Contexts
from imagine.world.tables import Table
from imagine.world.vocabulary import FRAMINGS

ARRANGEMENTS = ("side by side", "one behind", "arms round shoulders")
MAX_PEOPLE = 4
_SHAPES = {1: (1.0, 1.0), 2: (1.0, 1.5), 3: (1.0, 2.0), 4: (1.5, 2.0)}  # height and width, in sides of a portrait


@dataclass(frozen=True)
class Groups(Table):
    """One row per picture of P people, from left to right. Lengths are shares of the picture's height."""

    kind: Tensor  # (N,) indexes ARRANGEMENTS
    centre: Tensor  # (N, P, 2) of each head
    scale: Tensor  # (N, P) half the height of each head
    lean: Tensor  # (N, P) of each body, in radians, clockwise
    order: Tensor  # (N, P) the numbers of the people from the back to the front
    arm: Tensor  # (N, P) 1: this person's arm lies on the shoulders of the next person to the right; else 0
    behind: Tensor  # (N, P) whether the person stands behind the others


def canvas_shape(count: int, size: int) -> tuple[int, int]:
    """Return the height and width in pixels of a picture of `count` people, where portraits are `size` x `size`.

    Raises ValueError for a number of people that does not fit.
    """
    if count not in _SHAPES:
        raise ValueError(f"{count} people do not fit into a picture: choose 1 to {MAX_PEOPLE}.")
    height, width = _SHAPES[count]
    return round(height * size), round(width * size)


def sample_groups(seeds: Sequence[int], count: int, aspect: float) -> Groups:
    """Sample one arrangement of `count` people per seed, for pictures whose width is `aspect` times their height."""
    rows = [_draw(seed, count, aspect) for seed in seeds]
    columns = [torch.as_tensor(np.stack([row[i] for row in rows])) for i in range(7)]
    return Groups(*(column.float() if column.is_floating_point() else column for column in columns))


def group_contexts(contexts: Contexts, groups: Groups) -> Contexts:
    """Return the contexts as people in these groups show them.

    All people of a picture share the scene, the light and the style of the first. Nobody is closer than a portrait,
    only the person at the right holds something, and who stands behind has no word on the chest, which would be hidden.
    """
    count = groups.scale.shape[1]
    first = contexts[::count].repeat(count)
    last = torch.arange(count) == count - 1
    return contexts.replace(
        scene=first.scene, light=first.light, style=first.style, variation=first.variation,
        framing=FRAMINGS.index("portrait"), held=contexts.held * last.repeat(len(groups)),
        letters=contexts.letters * ~groups.behind.flatten().unsqueeze(1),
    )  # fmt: skip


def _draw(seed: int, count: int, aspect: float) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng([seed, 5])
    kind = int(random.integers(len(ARRANGEMENTS))) if count > 1 else 0
    behind = _behind(random, kind, count)
    columns = count - behind.sum() / 2  # people behind stand in the gaps between the others
    slot = aspect / (columns + 0.1)
    scale = np.full(count, min(0.26, 0.345 * slot)) * random.uniform(0.96, 1.04, count)
    closeness = 0.86 if ARRANGEMENTS[kind] == "arms round shoulders" else 0.98
    steps = np.concatenate(([0.0], np.where(behind[1:] | behind[:-1], 0.62, 1.0) * slot * closeness)).cumsum()
    x = aspect / 2 + steps - steps[-1] / 2 + random.uniform(-0.02, 0.02, count)
    y = 0.40 + (0.26 - scale) * 0.5 + random.uniform(-0.025, 0.025, count) - np.where(behind, 0.62 * scale, 0.0)
    scale = np.where(behind, 0.94 * scale, scale)
    arm = np.zeros(count, np.int64)
    lean = random.uniform(-0.03, 0.03, count)
    if ARRANGEMENTS[kind] == "arms round shoulders":
        arm[:-1] = 1
        lean = lean + np.linspace(0.09, -0.09, count)  # towards the middle
    order = np.argsort(~behind, kind="stable")
    return np.array(kind), np.stack((x, y), 1), scale, lean, order, arm, behind


def _behind(random: np.random.Generator, kind: int, count: int) -> np.ndarray:
    """Return which people stand behind: every second one in pictures of that kind and in all pictures of four."""
    first = int(random.integers(2))
    if count == 3:
        first = 1  # the one in the middle
    rows = ARRANGEMENTS[kind] == "one behind" or count == MAX_PEOPLE
    return np.array([rows and i % 2 == first for i in range(count)])
