"""What each forward pass of one pipeline call is conditioned on.

The pipelines of diffusers compute guidance in two ways. Some stack both halves into one batch, in either order; some
run the transformer twice in a step, first with the prompt and then without. The reference acts in the half with the
prompt only (unless the adapter was trained with an empty input for the other half), so guidance strengthens it.

`CallPasses` belongs to one call. It is passed on in the attention arguments, and the transformer's hook asks it for the
conditioning of a forward pass with so many rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor, nn

from imagine.errors import ConfigError
from imagine.pipeline.controls import Factors, Window, layer_scales
from imagine.records import VISION, Conditioning, Tokens, join, take
from imagine.transformer_bases.adapter import prepare
from imagine.transformer_bases.families import Guidance


@dataclass(frozen=True)
class People:
    """The identity branch of the pictures of a call: tokens, strength (pictures,), and perhaps regions and groups.

    `absent` are the tokens of pictures without people, for an adapter that was trained with them.
    """

    tokens: Tokens
    strength: Tensor
    regions: Tensor | None = None
    groups: Tensor | None = None
    absent: Tokens | None = None

    def positive(self) -> Conditioning:
        """Return the conditioning of the half with the prompt."""
        return _conditioning(self.tokens, self.strength, self.regions, self.groups)

    def negative(self) -> Conditioning | None:
        """Return the conditioning of the half without the prompt."""
        if self.absent is None:
            return None
        groups = None if self.groups is None else _only_first(self.groups)
        regions = None if self.regions is None else _everywhere(self.regions)
        return _conditioning(_as_long(self.absent, self.tokens), self.strength, regions, groups)

    def both(self, negative_first: bool) -> Conditioning:
        """Return the conditioning of one batch of both halves."""
        negative = self.negative() or _conditioning(
            self.tokens, torch.zeros_like(self.strength), self.regions, self.groups
        )
        halves = [negative, self.positive()] if negative_first else [self.positive(), negative]
        return Conditioning(
            {VISION: join([half.branches[VISION] for half in halves])},
            {VISION: torch.cat([_tensor(half.scales[VISION]) for half in halves])},
            {} if self.regions is None else {VISION: torch.cat([half.regions[VISION] for half in halves])},
            {} if self.groups is None else {VISION: torch.cat([half.groups[VISION] for half in halves])},
        )


def _tensor(scale: Any) -> Tensor:
    assert isinstance(scale, Tensor)
    return scale


def _conditioning(tokens: Tokens, strength: Tensor, regions: Tensor | None, groups: Tensor | None) -> Conditioning:
    return Conditioning(
        {VISION: tokens}, {VISION: strength}, {} if regions is None else {VISION: regions},
        {} if groups is None else {VISION: groups},
    )  # fmt: skip


def _only_first(groups: Tensor) -> Tensor:
    return (torch.arange(groups.shape[1], device=groups.device) == 0).expand_as(groups)


def _everywhere(regions: Tensor) -> Tensor:
    whole = torch.zeros_like(regions)
    whole[:, 0] = 1
    return whole


def _as_long(absent: Tokens, like: Tokens) -> Tokens:
    """Return tokens of absent people, masked to the length of those of a picture with several people."""
    if absent.values.shape[1] >= like.values.shape[1]:
        return absent
    return take(join([absent, like]), slice(len(absent.values)))


class CallPasses:
    """The conditionings of one call of a pipeline, by forward pass.

    transformer: with the adapter attached. window: the steps in which the reference acts. factors: on the strength, by
    site; None for 1 everywhere.
    """

    def __init__(
        self, transformer: nn.Module, people: People, guidance: Guidance, window: Window, factors: Factors | None = None
    ) -> None:
        self.transformer, self.people, self.guidance, self.window = transformer, people, guidance, window
        self.factors = factors
        self._active, self._passes = window.contains(0.0), 0
        self._prepared: dict[str, Conditioning | None] = {}

    def __call__(self, rows: int) -> Conditioning | None:
        """Return the conditioning of the next forward pass; None without a person.

        Raises ConfigError if the number of rows is neither that of the pictures nor twice that.
        """
        number, self._passes = self._passes, self._passes + 1
        if not self._active:
            return None
        pictures = len(self.people.strength)
        if rows == pictures:
            first = self.guidance != "two passes" or number == 0
            return self._once("positive" if first else "negative", self._positive if first else self.people.negative)
        if rows != 2 * pictures or self.guidance == "two passes":
            raise ConfigError(
                f"The pipeline computes {rows} rows for {pictures} pictures, so the references cannot be matched to "
                "them: give one prompt per picture, or draw without a reference."
            )
        return self._once("both", lambda: self.people.both(self.guidance == "negative first"))

    def _positive(self) -> Conditioning:
        return self.people.positive()

    def _once(self, name: str, make: Callable[[], Conditioning | None]) -> Conditioning | None:
        if name not in self._prepared:
            made = make()
            if made is not None:
                scales = {branch: layer_scales(_tensor(each), self.factors) for branch, each in made.scales.items()}
                made = prepare(self.transformer, replace(made, scales=scales))
            self._prepared[name] = made
        return self._prepared[name]

    def release(self) -> None:
        """Drop the cached keys and values; the pipeline keeps this object until its next call."""
        self._prepared.clear()

    def wrap_callback(self, given: dict[str, Any]) -> None:
        """Wrap the call's callback, if any, to know where each step begins."""
        callback: Callable[..., Any] | None = given.get("callback_on_step_end")
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            given["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs

        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
            changed = {} if callback is None else callback(pipe, step, timestep, tensors)
            self._passes = 0
            self._active = self.window.contains((step + 1) / pipe.num_timesteps)
            return changed

        given["callback_on_step_end"] = on_step_end
