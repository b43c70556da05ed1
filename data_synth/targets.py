"""Assign to each target what it should show, so that a build meets a wished distribution exactly.

Random draws would miss the distribution by a different amount each time. Instead, the values of each attribute are
assigned to blocks of references, turn by turn; in one turn each reference of a block gets one target. A full block
contains each value as often as its share requires, in an order shuffled by the seed. The last block may be too short
for that. Its values in successive turns are cut from one sequence that meets the shares at every prefix (`_sequence`).

A target's values depend only on the number of its reference, its turn, the number of references and the settings. So
more turns change no earlier target, and more references change the last block only.
"""

import math
import zlib
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

BLOCK = 100  # approximate number of references; small, so that a part of a build has nearly the wished shares
LARGEST_BLOCK = 10_000

# The vocabulary of the world's captions. Rewriters that are language models accept any other words.
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
    """The wished distribution: for each attribute, the share of each value.

    Shares are relative: of 1, 1, 2 the third value gets a half.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    distribution: Mapping[str, Mapping[str, float]] = Field(default_factory=lambda: DEFAULT_DISTRIBUTION)
    seed: int = Field(default=0, ge=0)

    @field_validator("distribution")
    @classmethod
    def _check_shares(cls, wished: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
        for name, shares in wished.items():
            if not shares or any(not math.isfinite(share) or share < 0 for share in shares.values()):
                raise ValueError(
                    f"the shares of {name} are not valid: give at least one share, each a number of 0 or more"
                )
            if not any(shares.values()):
                raise ValueError(f"all shares of {name} are 0: give a larger number to at least one")
            if sum(_counts(shares)) > LARGEST_BLOCK:
                raise ValueError(f"the shares of {name} are too precise: round them to two or three digits")
        return wished


def aims(index: int, turn: int, references: int, settings: TargetSettings) -> dict[str, str]:
    """Return what target `turn` of reference `index` should show: attribute -> value, in the order of the settings.

    index: 0 to references - 1; turn: 0 or more. Over all references and the first T turns, for any T, each value occurs
    as often as its share requires, rounded up or down to a whole number. Raises ValueError if either is out of range.
    """
    if not 0 <= index < references or turn < 0:
        raise ValueError(f"target {turn} of reference {index} of {references} is out of range")
    return {
        name: _value_of(name, tuple(shares.items()), index, turn, references, settings.seed)
        for name, shares in settings.distribution.items()
    }


def wished(settings: TargetSettings) -> dict[str, dict[str, float]]:
    """Return the wished distribution, with shares that sum to 1."""
    return {
        name: {value: share / sum(shares.values()) for value, share in shares.items()}
        for name, shares in settings.distribution.items()
    }


def _counts(shares: Mapping[str, float]) -> list[int]:
    """Return the smallest integers in the ratio of the shares, which are read as decimals: 0.1 is exactly a tenth."""
    exact = [Fraction(str(share)) for share in shares.values()]
    scale = math.lcm(*(share.denominator for share in exact))
    whole = [int(share * scale) for share in exact]
    divisor = math.gcd(*whole)
    return [number // divisor for number in whole]


@lru_cache(maxsize=256)
def _cached_counts(shares: tuple[tuple[str, float], ...]) -> tuple[int, ...]:
    """Return `_counts`, cached because it is the slowest part."""
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
    """Return the index of the value at each place of a block in one turn, according to the shares and shuffled."""
    if size % sum(counts):
        length = 1 << (size * (turn + 1) - 1).bit_length()  # a power of two, so that the cache holds few lengths
        block_values = np.sort(_sequence(name, counts, length, block, seed)[size * turn : size * (turn + 1)])
    else:
        block_values = np.repeat(np.arange(len(counts)), np.array(counts) * (size // sum(counts)))
    places: list[int] = block_values[np.argsort(_random_bits(name, seed, size, block, turn), kind="stable")].tolist()
    return places


@lru_cache(maxsize=64)
def _sequence(name: str, counts: tuple[int, ...], length: int, block: int, seed: int) -> NDArray[np.int64]:
    """Return value indices in an order whose every prefix meets each share, rounded up or down.

    Occurrence n of a value with share c / s may come at place floor((n - 1) s / c) at the earliest and must come before
    place ceil(n s / c). Of the values that may come, the one with the earliest deadline is taken. Earliest-deadline
    scheduling meets all deadlines if any schedule does (Baruah et al., "Proportionate progress", Algorithmica 15,
    1996). The seed breaks ties, so that attributes with the same shares are not correlated. A shorter sequence is a
    prefix of a longer one.
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
    """Return random 64-bit integers, separate for each attribute; numpy guarantees that this stream never changes."""
    entropy = (seed, zlib.crc32(name.encode()), *which)
    return np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)
