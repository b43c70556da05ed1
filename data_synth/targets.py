"""What each target is to show: values drawn so that a wished distribution is met exactly over a build.

Random draws would miss the wish by chance and by another amount each time. Here each attribute's values are dealt in
blocks: a block holds each value as often as its share says, in an order shuffled by the seed. So the aims of ask
number n follow from n, the number of asks and the settings, whoever draws them and in whatever order.
"""

import math
import zlib
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

BLOCK = 100  # about so many asks to a block: few enough that a part of a build has nearly the wished shares
LARGEST_BLOCK = 10_000

# What the world's captions can say; any other words do for rewriters that are language models.
EVEN: dict[str, dict[str, float]] = {
    "expression": {"neutral": 1, "smiling": 1, "laughing": 1, "sad": 1, "surprised": 1, "angry": 1},
    "gaze": {"left": 1, "ahead": 2, "right": 1},
    "yaw": {"left": 1, "front": 1, "right": 1},
    "pitch": {"up": 1, "level": 2, "down": 1},
    "roll": {"left": 1, "upright": 2, "right": 1},
    "scene": {
        "beach": 1, "forest": 1, "city": 1, "mountains": 1, "room": 1, "snow": 1, "desert": 1, "space": 1,
    },
    "light": {"soft": 2, "left": 1, "right": 1, "sunset": 1, "moonlight": 1},
    "clothes": {"t-shirt": 1, "hoodie": 1, "suit": 1, "striped shirt": 1},
    "style": {"photo": 6, "pencil": 1, "watercolour": 1, "pixel art": 1, "comic": 1},
}  # fmt: skip


class TargetSettings(BaseModel):
    """The wished distribution: for each attribute, the share of each value. Shares are relative: 1, 1, 2 is a half for
    the third."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    distribution: Mapping[str, Mapping[str, float]] = Field(default_factory=lambda: EVEN)
    seed: int = Field(default=0, ge=0)

    @field_validator("distribution")
    @classmethod
    def _can_be_dealt(cls, wished: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
        for name, shares in wished.items():
            if not shares or any(not math.isfinite(share) or share < 0 for share in shares.values()):
                raise ValueError(f"the shares of {name} must be numbers of 0 or more, at least one of them")
            if not any(shares.values()):
                raise ValueError(f"all shares of {name} are 0: give at least one of them more")
            if sum(_counts(shares)) > LARGEST_BLOCK:
                raise ValueError(f"the shares of {name} are too finely graded: round them to two or three digits")
        return wished


def aims(number: int, total: int, settings: TargetSettings) -> dict[str, str]:
    """What ask `number` of `total` should show: attribute -> value, in the order of the settings.

    number: 0 to total - 1; asks are numbered in the order of the references, as often as each has targets.
    Over all `total` asks, each value comes up as often as its share says, rounded up or down to a whole number. A build
    that grows changes the aims of its last block only. Raises ValueError if the number is out of range.
    """
    if not 0 <= number < total:
        raise ValueError(f"ask {number} of {total} is out of range")
    return {
        name: _dealt(name, tuple(shares.items()), number, total, settings.seed)
        for name, shares in settings.distribution.items()
    }


def wished(settings: TargetSettings) -> dict[str, dict[str, float]]:
    """The distribution with shares that add up to 1, for a report."""
    return {
        name: {value: share / sum(shares.values()) for value, share in shares.items()}
        for name, shares in settings.distribution.items()
    }


def _counts(shares: Mapping[str, float]) -> list[int]:
    """The smallest whole numbers in the ratio of the shares, which are read as they are written: 0.1 is a tenth."""
    exact = [Fraction(str(share)) for share in shares.values()]
    scale = math.lcm(*(share.denominator for share in exact))
    whole = [int(share * scale) for share in exact]
    divisor = math.gcd(*whole)
    return [number // divisor for number in whole]


@lru_cache(maxsize=256)
def _shape(shares: tuple[tuple[str, float], ...]) -> tuple[int, ...]:
    """`_counts`, which takes longer than all the rest, once."""
    return tuple(_counts(dict(shares)))


def _dealt(name: str, shares: tuple[tuple[str, float], ...], number: int, total: int, seed: int) -> str:
    counts = _shape(shares)
    size = sum(counts) * max(1, round(BLOCK / sum(counts)))
    block = number // size
    here = min(size, total - block * size)
    values = [value for value, _ in shares]
    return values[_block(name, counts, here, block, seed)[number - block * size]]


@lru_cache(maxsize=256)
def _block(name: str, counts: tuple[int, ...], size: int, block: int, seed: int) -> list[int]:
    """Which value each place of a block has: as many as the shares say, by largest remainder, and shuffled."""
    ideal = [Fraction(count * size, sum(counts)) for count in counts]
    number = [int(one) for one in ideal]
    order = sorted(range(len(counts)), key=lambda value: (number[value] - ideal[value], value))
    for value in order[: size - sum(number)]:
        number[value] += 1
    dealt = np.repeat(np.arange(len(counts)), number)
    # Raw bits, which numpy promises never to change; each attribute by itself, so that no two go hand in hand.
    bits = np.random.Philox(np.random.SeedSequence((seed, zlib.crc32(name.encode()), block))).random_raw(size)
    places: list[int] = dealt[np.argsort(bits, kind="stable")].tolist()
    return places
