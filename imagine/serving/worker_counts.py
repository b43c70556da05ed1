"""What a worker counts for /metrics; it writes the numbers into its row with every sign of life."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

ROWS = (1, 2, 4, 8, 16, 32, 64)  # upper limits of the histogram of pictures in a step


class Counts:
    """Numbers since a worker started."""

    def __init__(self) -> None:
        self.steps, self.pictures_in_steps, self.seconds = 0, 0, 0.0
        self.out_of_memory, self.decoded, self.decode_seconds = 0, 0, 0.0
        self.rows: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()

    def step(self, pictures: int, seconds: float) -> None:
        """Count one step that so many pictures shared."""
        self.steps += 1
        self.pictures_in_steps += pictures
        self.seconds += seconds
        self.rows[_limit(pictures, ROWS)] += 1

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and mappings, ready for JSON."""
        return {**vars(self), "rows": dict(self.rows), "ended": dict(self.ended)}


def _limit(value: int, limits: Sequence[int]) -> str:
    return str(next((limit for limit in limits if value <= limit), "+Inf"))
