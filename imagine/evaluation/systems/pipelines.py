"""Pipelines as systems: ours, and any pipeline of diffusers.

system = DiffusersPipeline(pipe, reference="ip_adapter_image", options={"num_inference_steps": 30})
run(system, "out/report", suite="dreambench", ...)
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from imagine.errors import ConfigError
from imagine.evaluation.systems.contracts import DETACHED, FULL, Drawing, System
from imagine.evaluation.systems.finished import FinishedPictures, Judgeable
from imagine.networks import weights

_SIDE = 512  # of a pipeline that does not say how large its pictures are


class PersonalisedPipeline:
    """A pipeline with our interface: `enroll(photos)`, and a call with prompts, `reference=` and generators.

    These are `ImaginePipeline`, the pipelines of `imagine.stock`, and objects that behave like them. `options` go to
    every call.
    """

    rows = (FULL, DETACHED)

    def __init__(self, pipeline: Any, options: Mapping[str, Any] | None = None, name: str = "") -> None:
        self.pipeline, self.options = pipeline, dict(options or {})
        self.name = name or getattr(pipeline, "name", "") or type(pipeline).__name__
        if hasattr(pipeline, "set_progress_bar_config"):
            pipeline.set_progress_bar_config(disable=True)  # the evaluation counts the pictures of the whole run

    @property
    def side(self) -> int:
        """The side of the pipeline's pictures in pixels."""
        return _side(self.pipeline)

    def fingerprint(self) -> str:
        """Return a hash of the pipeline's weights and defaults."""
        return fingerprint(self.pipeline)

    def enroll(self, photos: Sequence[Image.Image], subject: str = "person") -> Any:
        """Return the persona of these photos; a photo without a face is used whole."""
        return self.pipeline.enroll(list(photos), on_no_face="whole")

    def draw(self, drawings: Sequence[Drawing]) -> "Sequence[Image.Image | str]":
        """Draw a batch of pictures of one size, all with people or all without."""
        size = drawings[0].size
        shape = {} if size is None else {"height": size[0], "width": size[1]}
        drawn = self.pipeline(
            [each.prompt for each in drawings],
            reference=None if drawings[0].person is None else [each.person for each in drawings],
            generator=[torch.Generator().manual_seed(each.seed) for each in drawings],
            output_type="pil",
            **{**shape, **self.options},
        )
        return list(drawn.images)


class DiffusersPipeline:
    """Any text-to-image pipeline of diffusers, with the name of the argument that takes a person's photos.

    reference: that argument, such as "ip_adapter_image" or "image"; None for a pipeline that has been trained for one
        person, or that draws without any photo.
    takes_list: whether the argument takes all photos as a list, or the first photo only.
    can_detach: whether the pipeline also draws without this argument, for the row "detached".
    The pipeline is called once for each picture, with `options`.
    """

    def __init__(
        self, pipeline: Any, reference: str | None = "ip_adapter_image", options: Mapping[str, Any] | None = None,
        name: str = "", takes_list: bool = False, can_detach: bool = False,
    ) -> None:  # fmt: skip
        self.pipeline, self.reference, self.options = pipeline, reference, dict(options or {})
        self.name = name or type(pipeline).__name__
        self.takes_list = takes_list
        self.rows = (FULL, DETACHED) if can_detach else (FULL,)
        if hasattr(pipeline, "set_progress_bar_config"):
            pipeline.set_progress_bar_config(disable=True)

    @property
    def side(self) -> int:
        """The side of the pipeline's pictures in pixels."""
        return _side(self.pipeline)

    def fingerprint(self) -> str:
        """Return a hash of the pipeline's weights and of how it is called."""
        call = f"{fingerprint(self.pipeline)} {self.reference} {self.takes_list} {sorted(self.options.items())}"
        return hashlib.sha256(call.encode()).hexdigest()[:16]

    def enroll(self, photos: Sequence[Image.Image], subject: str = "person") -> list[Image.Image]:
        """Return the photos: these pipelines read them in every call."""
        return list(photos)

    def draw(self, drawings: Sequence[Drawing]) -> "Sequence[Image.Image | str]":
        """Draw one picture after the other."""
        return [self._draw_one(each) for each in drawings]

    def _draw_one(self, drawing: Drawing) -> "Image.Image | str":
        shape = {} if drawing.size is None else {"height": drawing.size[0], "width": drawing.size[1]}
        out = self.pipeline(
            prompt=drawing.prompt, generator=torch.Generator().manual_seed(drawing.seed), output_type="pil",
            **self._photos(drawing.person), **{**shape, **self.options},
        )  # fmt: skip
        blocked = getattr(out, "nsfw_content_detected", None)
        if blocked and blocked[0]:
            return "The safety checker of the pipeline replaced the picture."
        picture: Image.Image = out.images[0]
        return picture

    def _photos(self, person: Any) -> dict[str, Any]:
        if person is None or self.reference is None:
            return {}
        if isinstance(person, Mapping):  # several people: one photo of each, in the order of their names
            return {self.reference: [photos[0] for photos in person.values()]}
        return {self.reference: list(person) if self.takes_list else person[0]}


def fingerprint(pipeline: Any) -> str:
    """Return a short hash of the pipeline's weights and defaults, to recognise pictures that other weights made."""
    digest = hashlib.sha256()
    for name, part in sorted(pipeline.components.items()):
        if isinstance(part, torch.nn.Module):
            # Only one of the fingerprint's two rounding schemes, so that runs of earlier versions can be resumed.
            digest.update(f"{name} {weights.fingerprint(part)[:16]}".encode())
    for name, value in sorted(pipeline.config.items()):
        if name.startswith(("default_", "latents_")):
            digest.update(f"{name} {value}".encode())
    return digest.hexdigest()[:16]


def as_system(given: Any, options: Mapping[str, Any] | None = None) -> System:
    """Return the system for what the caller has: a system as it is, or one of our pipelines, which takes `options`.

    Raises ConfigError for a pipeline of diffusers, which needs `DiffusersPipeline`, and for options of a system.
    """
    if isinstance(given, System):
        if options:
            raise ConfigError(f"{given.name} takes its options when it is made: give none to the evaluation.")
        return given
    if not hasattr(given, "enroll"):
        raise ConfigError(
            f"A {type(given).__name__} does not take photos of people in our way: wrap it as "
            "imagine.evaluation.systems.pipelines.DiffusersPipeline(pipeline, reference=ARGUMENT)."
        )
    return PersonalisedPipeline(given, options)


def as_judgeable(given: Any, options: Mapping[str, Any] | None = None) -> Judgeable:
    """Return what an evaluation takes: a folder of finished pictures as it is, anything else by `as_system`."""
    return given if isinstance(given, FinishedPictures) else as_system(given, options)


def _side(pipeline: Any) -> int:
    unet = getattr(pipeline, "unet", None)
    if unet is None or not hasattr(pipeline, "vae_scale_factor"):
        return _SIDE
    return int(unet.config.sample_size) * int(pipeline.vae_scale_factor)
