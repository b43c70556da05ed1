"""The settings of one call of a pipeline, checked before anything is encoded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from imagine.errors import ConfigError, PromptError
from imagine.people.safety import SafetyClassifier, check_prompts
from imagine.pipeline.controls import Factors, Window
from imagine.pipeline.sampling import Guidance, TextTokens
from imagine.pipeline.second_pass import RefineFaces
from imagine.records import Tokens
from imagine.request import Request, generators, read_requests, whole

Callback = Callable[..., Any]  # a function, or one of diffusers' PipelineCallback objects


@dataclass(frozen=True)
class CallSettings:
    """The checked arguments of a call that do not depend on its prompts and people.

    `attempts` is how often a picture is drawn at most until it shows its people; 0 means that nobody checks that.
    """

    guidance: Guidance
    scheduler: Any
    window: Window
    output_type: str
    factors: Factors | None
    refining: RefineFaces | None
    on_step: "StepCallback | None"
    attempts: int = 0


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


def checked_attempts(attempts: int, requests: Sequence[Request], output_type: str) -> int:
    """Return the most attempts at each picture of a call, and 0 if its pictures are not checked.

    They are checked if the call may draw them again, and if one of them should show several people. Raises ConfigError
    for a wrong number, or if latents are wanted, in which no face can be found.
    """
    most = max((len(request.people) for request in requests), default=0)
    attempts = whole("attempts", attempts)
    if attempts > 1 and output_type == "latent":
        raise ConfigError("attempts needs pictures to look for faces: choose output_type pil, np or pt.")
    return attempts if output_type != "latent" and most > (0 if attempts > 1 else 1) else 0


def call_requests(
    prompt: "str | Sequence[str] | None", reference: Any, embeds: TextTokens | None,
    safety: SafetyClassifier | None = None,
) -> list[Request]:  # fmt: skip
    """Return one request per prompt, or per encoded prompt.

    Raises PromptError unless exactly one of both is given, and SafetyError if the classifier refuses a prompt.
    """
    if (prompt is None) == (embeds is None):
        raise PromptError("Give exactly one of prompt and prompt_embeds.")
    if prompt is not None:
        requests = read_requests(prompt, reference)
        check_prompts(safety, [(request.sentence, len(request.people)) for request in requests])
        return requests
    # Without sentences there are no names, so all people of the references are shown.
    return read_requests([""] * count_prompts("prompt_embeds", embeds), reference, blank=True)


def count_prompts(name: str, embeds: Any) -> int:
    """Return the number of prompts in encoded prompts. Raises PromptError unless `encode_prompt` returned them."""
    if not isinstance(embeds, tuple) or len(embeds) != 2 or not isinstance(embeds[0], Tokens):
        raise PromptError(f"{name} must be what encode_prompt returns, not a {type(embeds).__name__}.")
    return len(embeds[0].values)


def timestep_shift(config: Mapping[str, Any], positions: int) -> float:
    """Return the schedule's shift for a number of latent positions (arXiv 2403.03206; diffusers' Flux pipeline)."""
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return float(config["base_shift"] + slope * (positions - config["base_image_seq_len"]))


def start_latents(
    pipe: Any, count: int, size: tuple[int, int], generator: "torch.Generator | Sequence[torch.Generator] | None",
    latents: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return start latents (count, channels, height, width): the given ones, or noise drawn for each picture."""
    shape, device = (int(pipe.unet.config.in_channels), *size), pipe._execution_device
    if latents is not None:
        found = tuple(getattr(latents, "shape", ()))
        if not isinstance(latents, Tensor) or found != (count, *shape):
            raise ConfigError(f"latents have the wrong shape {found}: give a tensor of shape {(count, *shape)}.")
        return latents.to(device, torch.float32)
    # Noise is drawn on the generator's device in float32, so that a seed gives the same noise on every device.
    drawn = [
        torch.randn(shape, generator=each, device=each.device if each else "cpu")
        for each in generators(generator, count)
    ]
    return torch.stack([each.to(device) for each in drawn])
