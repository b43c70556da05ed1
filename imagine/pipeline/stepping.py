"""Denoise the pictures of one or several calls step by step, all in one pass of the denoiser.

A call's pictures are a `Denoising` while they are on their way from noise to clean latents. A `Stepper` takes one step
of each of several Denoisings. A call of the pipeline steps its own to the end; a server steps those of different people
together, and adds and removes them between two steps. Pictures therefore need not be at the same noise level, nor have
the same prompt, person, strength, guidance or number of steps; only the size of their latents must be the same.
"""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from imagine.pipeline.call import StepCallback
from imagine.pipeline.sampling import Guidance, GuidedDenoiser, Inputs, NoisyPictures
from imagine.records import Progress, no_progress


@dataclass
class CallState:
    """State of a call that callbacks read or set; diffusers stores it on the pipeline, we per call."""

    guidance: Guidance
    timesteps: int = 0
    interrupt: bool = False
    progress: Progress = no_progress


# The call whose callback is running, which it reads and sets as attributes of the pipeline.
current_call: ContextVar[CallState | None] = ContextVar("imagine_call", default=None)


@dataclass(eq=False)
class Denoising:
    """Pictures between two steps, all with one schedule.

    latents: (pictures, channels, h, w), float32. strength: of the identity, (pictures,). active: whether the identity
    acts in each step. arguments: cross_attention_kwargs of the call. velocity: what the last step predicted.
    """

    inputs: Inputs
    latents: Tensor
    strength: Tensor
    scheduler: Any
    active: Sequence[bool]
    call: CallState
    arguments: Mapping[str, Any] = field(default_factory=dict)
    on_step: StepCallback | None = None
    stage: str = "denoising"
    number: int = 0
    velocity: Tensor | None = None

    def __post_init__(self) -> None:
        self._no_strength = torch.zeros_like(self.strength)

    @property
    def steps(self) -> int:
        return len(self.scheduler.timesteps)

    @property
    def done(self) -> bool:
        """Whether no step is left, or the call was interrupted."""
        return self.number >= self.steps or self.call.interrupt

    def fits(self, other: "Denoising") -> bool:
        """Return whether both can take a step in one pass of the denoiser."""
        return (
            self.latents.shape[1:] == other.latents.shape[1:]
            and self.arguments == other.arguments
            and self.inputs.fits(other.inputs)
        )

    def noisy(self, dtype: torch.dtype) -> NoisyPictures:
        """Return what the denoiser predicts from in the next step."""
        timestep = self.scheduler.timesteps[self.number]
        scaled = getattr(self.scheduler, "scale_model_input", lambda sample, _: sample)(self.latents, timestep)
        strength = self.strength if self.active[self.number] else self._no_strength
        return NoisyPictures(self.inputs, scaled.to(dtype), timestep, strength, self.call.guidance)

    def clean_estimate(self) -> Tensor:
        """Return the clean latents that the last step's prediction implies: x_0 = x_t - t * v, for a preview."""
        if self.velocity is None:
            return self.latents
        return self.latents - float(self.scheduler.sigmas[self.number]) * self.velocity


class Stepper:
    """Takes steps of Denoisings of one pipeline. It keeps what their next steps share, so use it in one thread."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._denoiser: GuidedDenoiser | None = None

    @torch.no_grad()
    def step(self, runs: Sequence[Denoising], max_pictures: int | None = None) -> None:
        """Take the next step of each of these Denoisings, which fit each other and are not done.

        max_pictures: how many pictures may share a pass, so that a step needs less memory; by default all. If a pass
        raises an error, none of the Denoisings has changed.
        """
        unet = self.pipe.unet
        for run in runs:
            run.call.progress(run.stage, run.number, run.steps)
        if self._denoiser is None or self._denoiser.unet is not unet or self._denoiser.arguments != runs[0].arguments:
            self._denoiser = GuidedDenoiser(unet, runs[0].arguments)
        wanted = [run.noisy(unet.dtype) for run in runs]
        for run, velocity in zip(runs, self._velocities(self._denoiser, wanted, max_pictures), strict=True):
            self._advance(run, velocity.float())

    def _velocities(self, denoiser: GuidedDenoiser, wanted: Sequence[NoisyPictures], most: int | None) -> list[Tensor]:
        if most is None or sum(len(each.latents) for each in wanted) <= most:
            return denoiser.velocities(wanted)
        parts = [(number, part) for number, each in enumerate(wanted) for part in single_pictures(each)]
        found: list[list[Tensor]] = [[] for _ in wanted]
        for first in range(0, len(parts), most):
            some = parts[first : first + most]
            velocities = denoiser.velocities([part for _, part in some])
            for (number, _), velocity in zip(some, velocities, strict=True):
                found[number].append(velocity)
        return [torch.cat(each) for each in found]

    def _advance(self, run: Denoising, velocity: Tensor) -> None:
        """Move a Denoising by the velocity that was predicted for it, and call its callback."""
        number, timestep = run.number, run.scheduler.timesteps[run.number]
        run.latents = run.scheduler.step(velocity, timestep, run.latents, return_dict=False)[0]
        run.velocity = velocity
        if run.on_step is not None:
            tensors = {"latents": run.latents, "identity_scale": run.strength}
            given = {name: tensors[name] for name in run.on_step.inputs}
            token = current_call.set(run.call)
            try:
                tensors |= run.on_step.callback(self.pipe, number, timestep, given) or {}
            finally:
                current_call.reset(token)
            run.latents, run.strength = tensors["latents"], tensors["identity_scale"]
        run.number += 1


def single_pictures(pictures: NoisyPictures) -> list[NoisyPictures]:
    """Return each of the pictures alone."""
    if len(pictures.latents) == 1:
        return [pictures]
    rows = torch.arange(len(pictures.latents), device=pictures.strength.device).split(1)
    return [
        NoisyPictures(
            pictures.inputs.pictures(row),
            pictures.latents[row],
            pictures.timestep,
            pictures.strength[row],
            pictures.guidance,
        )
        for row in rows
    ]
