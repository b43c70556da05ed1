"""Draw jobs with a pipeline of a public base, one call each.

diffusers' pipelines keep their own denoising loop, so their jobs cannot share steps. Between two steps the call reports
progress, and stops if its job was canceled.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from imagine.errors import ConfigError
from imagine.pipeline.output import ImagineOutput

AfterStep = Callable[[int, int], bool]  # step, number of steps -> whether to go on
_OURS = ("faces", "refined", "notes", "people_found", "people", "attempts", "seeds", "records", "flags")


class CanceledError(Exception):
    """Raised when a job was canceled while it was drawn."""


def draw_whole(pipe: Any, arguments: Mapping[str, Any], after_step: AfterStep) -> ImagineOutput:
    """Draw the pictures of one job. Raises CanceledError, or ImagineError with one sentence if they cannot be drawn."""
    known = inspect.signature(pipe.__call__).parameters
    if lacking := [name for name in arguments if name not in known]:
        raise ConfigError(f"{type(pipe).__name__} does not take {lacking[0]}: leave it out.")
    steps = int(arguments.get("num_inference_steps") or known["num_inference_steps"].default)
    canceled = False

    def callback(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal canceled
        if not after_step(step + 1, max(steps, step + 1)):
            canceled = pipe._interrupt = True
        return tensors

    drawn = pipe(**arguments, callback_on_step_end=callback)
    if canceled:
        raise CanceledError
    ours = {name: found for name in _OURS if (found := getattr(drawn, name, None)) is not None}
    return ImagineOutput(**{"images": drawn.images, "faces": [], **ours})
