"""Draw the pictures of one call: first pass, decoding, second pass over small faces, and further attempts.

A `Drawing` yields each Denoising that it needs, and continues when that is done. Whoever drives it decides with which
other pictures the steps are shared: `ImaginePipeline.__call__` takes them alone, and a server together with the
pictures of other people. Everything else is the same for both.
"""

import copy
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from imagine.networks.diffusion import add_noise
from imagine.people.faces import finder_of_drawings
from imagine.people.persona import Persona
from imagine.pipeline.attempts import Drawn, PeopleChecker, Rounds, known_people
from imagine.pipeline.call import CallSettings, StepCallback
from imagine.pipeline.notes import photo_notes
from imagine.pipeline.output import ImagineOutput, to_output
from imagine.pipeline.picture_check import check_picture
from imagine.pipeline.recording import CallRecord, record_call
from imagine.pipeline.sampling import Inputs
from imagine.pipeline.second_pass import (
    SecondPass,
    SmallFace,
    keep_outside,
    noise_from_latents,
    paste_squares,
    visible_latents,
)
from imagine.pipeline.stepping import CallState, Denoising
from imagine.records import Progress

if TYPE_CHECKING:
    from imagine.pipeline.pipeline import ImaginePipeline


@dataclass
class Drawing:
    """One call of a pipeline, ready to be denoised. Iterate over it, and step each Denoising until it is done.

    start: the start latents, (pictures, channels, h, w). strength: of the identity, (pictures,). record: the call as it
    was asked for, with the people of each request. `output` is the call's result, after the last Denoising.
    """

    pipe: "ImaginePipeline"
    plan: CallSettings
    inputs: Inputs
    arguments: Mapping[str, Any]
    start: Tensor
    strength: Tensor
    record: CallRecord
    progress: Progress
    output: ImagineOutput | None = None

    def __post_init__(self) -> None:
        self.call = CallState(self.plan.guidance, progress=self.progress)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Denoising]:
        self.output = yield from self._steps()

    def stop(self) -> None:
        """End the current Denoising now; the pictures are then what its latents show."""
        self.call.interrupt = True

    def result(self) -> ImagineOutput:
        """Return the result of the call, after the last Denoising."""
        assert self.output is not None
        return self.output

    def _steps(self) -> Generator[Denoising, None, ImagineOutput]:
        personas, copies = self.record.personas, self.record.copies
        people = [list(each) for each in personas for _ in range(copies)]
        faces = [face for each in personas for persona in each for face in persona.faces]
        if not self.plan.attempts:
            drawn = yield from self._draw(self.inputs, self.start, self.strength, people, "denoising")
            out = ImagineOutput(drawn.images, faces, sum(drawn.refined), list(drawn.notes.values()))
        else:
            recogniser = self.pipe._picture_recogniser()
            known = known_people(self.record.requests, personas, recogniser, copies)
            checker = PeopleChecker(finder_of_drawings(self.pipe.finder), recogniser, known)
            rounds = Rounds(self.start, checker, self.plan.attempts)
            while (asked := rounds.next()) is not None:
                rows = torch.tensor(list(asked.numbers), device=self.strength.device)
                inputs = self.inputs if asked.attempt == 1 else self.inputs.pictures(rows)
                stage = "denoising" if asked.attempt == 1 else f"denoising, attempt {asked.attempt}"
                own = [people[row] for row in asked.numbers]
                rounds.take(asked, (yield from self._draw(inputs, asked.start, self.strength[rows], own, stage)))
            out = to_output(rounds.result(), faces)
        self.pipe.maybe_free_model_hooks()
        out.notes = [*out.notes, *photo_notes(self.pipe.adapter, faces)]
        record_call(self.pipe, out, self.plan, self.record)
        return out

    def _draw(
        self, inputs: Inputs, start: Tensor, strength: Tensor, people: list[list[Persona]], stage: str
    ) -> Generator[Denoising, None, Drawn]:
        """Draw some pictures of the call once, from their start latents, and redraw their small faces."""
        plan, pipe, call = self.plan, self.pipe, self.call
        call.guidance = plan.guidance
        scheduler = copy.deepcopy(plan.scheduler)  # a scheduler counts its steps
        call.timesteps = steps = len(scheduler.timesteps)
        run = Denoising(
            inputs, start * getattr(scheduler, "init_noise_sigma", 1.0), strength, scheduler,
            plan.window.steps(steps), call, self.arguments, plan.on_step, stage,
        )  # fmt: skip
        yield run
        call.progress("decoding", 0, 0)
        drawn = Drawn(None, [0] * len(start))
        if plan.refining is not None:
            images = pipe._decode(run.latents, "pt")
            second_pass = SecondPass(
                plan.refining, plan.refining.levels(steps), plan.window, start, strength, people, inputs
            )
            # A new adapter must give the base's picture bit for bit, so small faces are not redrawn with one.
            if not call.interrupt and pipe.adapter is not None and pipe.adapter.active:
                yield from self._refine(second_pass, images, drawn)
            drawn.images = pipe.image_processor.postprocess(images, plan.output_type, [False] * len(images))
        elif plan.output_type != "latent":
            drawn.images = pipe._decode(run.latents, plan.output_type)
        else:
            check_picture(run.latents, pipe._suspects)
            drawn.images = run.latents
        drawn.interrupted = call.interrupt
        return drawn

    def _refine(self, second_pass: SecondPass, images: Tensor, drawn: Drawn) -> Generator[Denoising, None, None]:
        """Redraw the small faces of images (B, 3, H, W) in 0..1, in place, and count them."""
        self.call.progress("finding small faces", 0, 0)
        side = int(self.pipe.unet.config.sample_size) * self.pipe.vae_scale_factor
        batches, drawn.notes = second_pass.small_faces(images, side, finder_of_drawings(self.pipe.finder))
        for some, squares in batches:
            redrawn = yield from self._redraw(some, squares, second_pass)
            for face in paste_squares(images, some, redrawn, second_pass.settings):
                drawn.refined[face.picture] += 1

    def _redraw(
        self, faces: Sequence[SmallFace], squares: Tensor, second_pass: SecondPass
    ) -> Generator[Denoising, None, Tensor]:
        """Redraw each face's square (faces, 3, S, S) in 0..1 with its person and the same prompt."""
        pipe = self.pipe
        clean = pipe.encode_pictures(squares)
        noise = torch.stack([noise_from_latents(second_pass.start[face.picture], clean.shape[1:]) for face in faces])
        rows = torch.tensor([face.picture for face in faces], device=second_pass.strength.device)
        vision = pipe._vision_tokens([[second_pass.people[face.picture][face.person]] for face in faces], 1)
        # This scheduler uses `sigmas` unchanged, whichever schedule the first pass used.
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=second_pass.levels, device=clean.device)
        keep = keep_outside(clean, noise, second_pass.levels, visible_latents(faces, clean, second_pass.settings))
        run = Denoising(
            second_pass.inputs.rows(rows, vision),
            add_noise(clean, noise, torch.full((len(faces),), second_pass.levels[0], device=clean.device)),
            second_pass.strength[rows],
            scheduler,
            second_pass.active,
            self.call,
            self.arguments,
            StepCallback(keep, ("latents",)),
            "redrawing small faces",
        )
        yield run
        return cast(Tensor, pipe._decode(run.latents, "pt"))
