"""The settings of one call of a pipeline, checked before anything is encoded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from imagine.errors import ConfigError
from imagine.pipeline.controls import Factors, Window
from imagine.pipeline.sampling import Guidance
from imagine.pipeline.second_pass import RefineFaces

Callback = Callable[..., Any]  # a function, or one of diffusers' PipelineCallback objects


@dataclass(frozen=True)
class CallSettings:
    """The checked arguments of a call that do not depend on its prompts and people."""

    guidance: Guidance
    scheduler: Any
    window: Window
    output_type: str
    factors: Factors | None
    refining: RefineFaces | None
    on_step: "StepCallback | None"


@dataclass(frozen=True)
class StepCallback:
    """A call's callback and the names of the tensors that it receives."""

    callback: Callback
    inputs: tuple[str, ...]

    @classmethod
    def make(cls, callback: Callback | None, inputs: Sequence[str], known: Sequence[str]) -> "StepCallback | None":
        if callback is None:
            return None
        if not callable(callback):
            raise ConfigError(f"callback_on_step_end={callback!r} cannot be called: give a function.")
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            inputs = callback.tensor_inputs
        if unknown := [name for name in inputs if name not in known]:
            raise ConfigError(
                f"callback_on_step_end_tensor_inputs has the unknown names {', '.join(unknown)}: choose from "
                f"{', '.join(known)}."
            )
        return cls(callback, tuple(inputs))
