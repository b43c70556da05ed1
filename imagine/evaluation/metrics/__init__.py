"""The formulas of the evaluation, as pure functions of embeddings, words and numbers."""

from imagine.evaluation.metrics.identity import SMALLEST_ANGLE, angle, copy_paste, rank1, similarity
from imagine.evaluation.metrics.intervals import bootstrap, bootstrap_ratio
from imagine.evaluation.metrics.words import ABSENT, found, leaked

__all__ = [
    "ABSENT",
    "SMALLEST_ANGLE",
    "angle",
    "bootstrap",
    "bootstrap_ratio",
    "copy_paste",
    "found",
    "leaked",
    "rank1",
    "similarity",
]
