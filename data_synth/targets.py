"""What each target is to show: values drawn so that a wished distribution is met exactly over a build.

Random draws would miss the wish by chance and by another amount each time. Here each attribute's values are dealt to
blocks of references, turn by turn: one turn gives each reference of a block one target. A full block holds each value
as often as its share says, in an order shuffled by the seed. The last block may be too short for that; what it gets
turn after turn is cut from one sequence in which the shares are met at every place (`_sequence`). So what a target
should show follows from its reference's number, its turn, the number of references and the settings, whoever asks; more
turns change nothing, and more references change the last block only.
"""

import math
import zlib
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

BLOCK = 100  # about so many references: few enough that a part of a build has nearly the wished shares
LARGEST_BLOCK = 10_000

# What the world's captions can say; any other words do for rewriters that are language models.
DEFAULT_DISTRIBUTION: dict[str, dict[str, float]] = {
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

    distribution: Mapping[str, Mapping[str, float]] = Field(default_factory=lambda: DEFAULT_DISTRIBUTION)
    seed: int = Field(default=0, ge=0)

    @field_validator("distribution")
    @classmethod
    def _check_shares(cls, wished: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
        for name, shares in wished.items():
            if not shares or any(not math.isfinite(share) or share < 0 for share in shares.values()):
                raise ValueError(f"the shares of {name} must be numbers of 0 or more, at least one of them")
            if not any(shares.values()):
                raise ValueError(f"all shares of {name} are 0: give at least one of them more")
            if sum(_counts(shares)) > LARGEST_BLOCK:
                raise ValueError(f"the shares of {name} are too finely graded: round them to two or three digits")
        return wished


def aims(index: int, turn: int, references: int, settings: TargetSettings) -> dict[str, str]:
    """What target `turn` of reference `index` should show: attribute -> value, in the order of the settings.

    place: 0 to references - 1; turn: 0 or more. Over all references and the first T turns, each value comes up as often
    as its share says, rounded up or down to a whole number, whatever T is. Raises ValueError for a place out of range.
    """
    if not 0 <= index < references or turn < 0:
        raise ValueError(f"target {turn} of reference {index} of {references} is out of range")
    return {
        name: _value_of(name, tuple(shares.items()), index, turn, references, settings.seed)
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
def _cached_counts(shares: tuple[tuple[str, float], ...]) -> tuple[int, ...]:
    """`_counts`, which takes longer than all the rest, once."""
    return tuple(_counts(dict(shares)))


def _value_of(
    name: str, shares: tuple[tuple[str, float], ...], index: int, turn: int, references: int, seed: int
) -> str:
    counts = _cached_counts(shares)
    size = sum(counts) * max(1, round(BLOCK / sum(counts)))
    block = index // size
    block_size = min(size, references - block * size)
    values = [value for value, _ in shares]
    return values[_block(name, counts, block_size, block, turn, seed)[index - block * size]]


@lru_cache(maxsize=256)
def _block(name: str, counts: tuple[int, ...], size: int, block: int, turn: int, seed: int) -> list[int]:
    """Which value each place of a block has in one turn: as many as the shares say so far, and shuffled."""
    if size % sum(counts):
        length = 1 << (size * (turn + 1) - 1).bit_length()  # powers of two, so that few lengths are worked out
        block_values = np.sort(_sequence(name, counts, length, block, seed)[size * turn : size * (turn + 1)])
    else:
        block_values = np.repeat(np.arange(len(counts)), np.array(counts) * (size // sum(counts)))
    places: list[int] = block_values[np.argsort(_random_bits(name, seed, size, block, turn), kind="stable")].tolist()
    return places


@lru_cache(maxsize=64)
def _sequence(name: str, counts: tuple[int, ...], length: int, block: int, seed: int) -> NDArray[np.int64]:
    """Values in an order of which every beginning has each of them as often as its share says, rounded up or down.

    Number n of a value with share c / s may come from place floor((n - 1) s / c) on and must have come before place
    ceil(n s / c). Of those that may come, the one that must come first does: a schedule by earliest deadline, which
    meets all deadlines where any schedule does (Baruah et al., "Proportionate progress", Algorithmica 15, 1996). Ties
    are broken by the seed, so that no two attributes go hand in hand. A longer sequence begins with the shorter one.
    """
    total, used = sum(counts), [0] * len(counts)
    ties = _random_bits(name, seed, length, block, 1 << 32).tolist()
    found = np.empty(length, np.int64)
    for index in range(length):
        allowed = [value for value, count in enumerate(counts) if count and used[value] * total // count <= index]
        deadlines = [-(-(used[value] + 1) * total // counts[value]) for value in allowed]
        first = [value for value, end in zip(allowed, deadlines, strict=True) if end == min(deadlines)]
        found[index] = first[ties[index] % len(first)]
        used[found[index]] += 1
    return found


def _random_bits(name: str, seed: int, count: int, *which: int) -> NDArray[np.uint64]:
    """Raw bits, which numpy promises never to change; each attribute has its own."""
    entropy = (seed, zlib.crc32(name.encode()), *which)
    return np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)
