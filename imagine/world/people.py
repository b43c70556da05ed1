"""Sample people: batched records of identity traits, from one integer seed per person.

Identity is independent of context (contexts.py), so that any person can appear in any context.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from imagine.world import vocabulary as words
from imagine.world.tables import Table

CONTINUOUS = (
    "skin", "undertone", "head_width", "jaw", "eye_spacing", "eye_size", "brow_thickness", "brow_height",
    "nose_length", "nose_width", "mouth_width", "mouth_height", "lip_fullness", "ear_size", "age",
    "eye_tilt", "cheeks", "hairline",
)  # fmt: skip
DISCRETE = ("hair_style", "hair_colour", "eye_colour", "beard", "glasses", "freckles")


@dataclass(frozen=True)
class People(Table):
    """One row per person. Continuous traits are in 0..1, discrete ones index `vocabulary`; every tensor is (N,)."""

    skin: Tensor  # 0 fair, 1 dark
    undertone: Tensor  # 0 rosy, 1 olive
    head_width: Tensor
    jaw: Tensor  # 0 pointed, 1 square
    eye_spacing: Tensor
    eye_size: Tensor
    brow_thickness: Tensor
    brow_height: Tensor
    nose_length: Tensor
    nose_width: Tensor
    mouth_width: Tensor
    mouth_height: Tensor
    lip_fullness: Tensor
    ear_size: Tensor
    age: Tensor  # 0 young, 1 old: wrinkles
    eye_tilt: Tensor  # 0 outer corners low, 1 outer corners high
    cheeks: Tensor  # 0 hollow, 1 full
    hairline: Tensor  # 0 low, 1 high
    hair_style: Tensor
    hair_colour: Tensor
    eye_colour: Tensor
    beard: Tensor
    glasses: Tensor
    freckles: Tensor


def sample_people(seeds: Sequence[int]) -> People:
    """Sample one person per seed; a seed gives the same person in any batch."""
    rows = [_draw(seed) for seed in seeds]
    columns: dict[str, Tensor] = {}
    for index, spec in enumerate(fields(People)):
        kind = torch.float32 if spec.name in CONTINUOUS else torch.int64
        columns[spec.name] = torch.tensor([row[index] for row in rows], dtype=kind)
    return People(**columns)


def drift(people: People, seeds: Sequence[int], amount: float = 0.06) -> People:
    """Return the people with noise on their continuous traits, like the output of a generator with identity errors.

    `seeds` has one seed per row; `amount` is the standard deviation of the noise, on the traits' scale of 0 to 1. This
    is the identity error of synthetic pairs (method paper, section 4.3.3) as a controlled quantity.
    """
    drawn = [np.random.default_rng([seed, 3]).standard_normal(len(CONTINUOUS)) for seed in seeds]
    steps = np.array(drawn).reshape(len(seeds), len(CONTINUOUS))
    moved = {
        name: (getattr(people, name) + amount * torch.from_numpy(steps[:, i]).float()).clamp(0, 1)
        for i, name in enumerate(CONTINUOUS)
    }
    return people.replace(**moved)


def _draw(seed: int) -> list[float]:
    random = np.random.default_rng([seed, 1])
    continuous = list(random.beta(1.3, 1.3, len(CONTINUOUS)))
    odds = (
        np.full(len(words.HAIR_STYLES), 1 / len(words.HAIR_STYLES)),
        words.HAIR_ODDS,
        np.full(len(words.EYE_COLOURS), 1 / len(words.EYE_COLOURS)),
        words.BEARD_ODDS,
        words.GLASSES_ODDS,
        (0.8, 0.2),
    )
    return continuous + [int(random.choice(len(odd), p=odd)) for odd in odds]
