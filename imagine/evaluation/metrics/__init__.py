"""The formulas of the evaluation, as pure functions of embeddings, words and numbers.

The names are imported on first use, because `agreement` serves programs that start without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagine.evaluation.metrics.identity import SMALLEST_ANGLE as SMALLEST_ANGLE
    from imagine.evaluation.metrics.identity import angle as angle
    from imagine.evaluation.metrics.identity import copy_paste as copy_paste
    from imagine.evaluation.metrics.identity import rank1 as rank1
    from imagine.evaluation.metrics.identity import similarity as similarity
    from imagine.evaluation.metrics.intervals import bootstrap as bootstrap
    from imagine.evaluation.metrics.intervals import bootstrap_ratio as bootstrap_ratio
    from imagine.evaluation.metrics.words import ABSENT as ABSENT
    from imagine.evaluation.metrics.words import found as found
    from imagine.evaluation.metrics.words import leaked as leaked

_MODULES = {
    "identity": ("SMALLEST_ANGLE", "angle", "copy_paste", "rank1", "similarity"),
    "intervals": ("bootstrap", "bootstrap_ratio"),
    "words": ("ABSENT", "found", "leaked"),
}
__all__ = ["ABSENT", "SMALLEST_ANGLE", "angle", "bootstrap", "bootstrap_ratio", "copy_paste", "found", "leaked",
           "rank1", "similarity"]  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
