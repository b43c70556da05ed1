"""Generate candidates from prompts, with any text-to-image pipeline that diffusers loads.

A generator does not need the reference: it draws some person who fits the prompt, and a refiner then adds the
reference's identity. The noise is drawn on the CPU from the target specification's seed and the attempt, so a seed
gives the same noise on every device and in every batch.
"""

import functools
import hashlib
import inspect
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from pydantic import Field

from data_synth.backends.contracts import Failed
from data_synth.backends.local_models import (
    ModelSettings,
    choose_device,
    choose_dtype,
    failure,
    identity_of,
    loading,
    model_identity,
)
from data_synth.records import Candidate, Reference, TargetSpec
from imagine.errors import ImagineError, WeightsError
from imagine.networks.weights import dtype_argument
from imagine.pipeline.pipeline import ImaginePipeline

Work = tuple[Reference, TargetSpec, int]

BLOCKED = "blocked by the model's safety checker"
VERSION = 1


class DiffusersGenerator:
    """A generator with any diffusers pipeline that takes a `prompt`.

    Examples are Stable Diffusion, SDXL, Flux, SD3, PixArt, Sana and Qwen-Image.
    """

    class Settings(ModelSettings):
        """The pipeline and the arguments of its call; for None, the pipeline's own value is used."""

        # text around the target's prompt, such as a trigger word
        prompt: str = Field(default="{prompt}", pattern=r"\{prompt\}")
        negative_prompt: str = ""
        width: int | None = Field(default=None, ge=8)
        height: int | None = Field(default=None, ge=8)
        steps: int | None = Field(default=None, ge=1)
        guidance_scale: float | None = None
        arguments: dict[str, Any] = Field(default_factory=dict)  # further arguments of the call: {true_cfg_scale: 4}
        # Pictures per batch. More is faster on a GPU, but the last bit may depend on the other pictures of the batch.
        batch_size: int = Field(default=1, ge=1, exclude=True)
        # keep models in main memory until they are needed, for a smaller GPU
        offload: bool = Field(default=False, exclude=True)

    def __init__(self, settings: "DiffusersGenerator.Settings") -> None:
        self.settings = settings
        self.pipe: Any = None

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """The class, the version, and the pipeline's name, weights and licence."""
        return identity_of(self, VERSION, **model_identity(self.settings))

    def load(self) -> None:
        """Load the pipeline. Raises WeightsError if it cannot be loaded or does not take a prompt."""
        from diffusers import DiffusionPipeline

        self.pipe = load_pipeline(DiffusionPipeline, self.settings, self.settings.offload)
        parameters = inspect.signature(self.pipe.__call__).parameters
        if not {"prompt", "generator"} <= set(parameters):
            raise WeightsError(
                f"{self.settings.model} is a {type(self.pipe).__name__}, which does not take a prompt. "
                "Name a text-to-image pipeline."
            )

    def generate(self, work: Sequence[Work]) -> list[Candidate | Failed]:
        """Return one candidate of round 0 for each (reference, target specification, attempt)."""
        size = self.settings.batch_size
        return [one for start in range(0, len(work), size) for one in self._draw(work[start : start + size])]

    def _draw(self, work: Sequence[Work]) -> list[Candidate | Failed]:
        """Return one batch of candidates; after an error, draw its items one by one, so that only the bad one fails."""
        settings = self.settings
        prompts = [settings.prompt.replace("{prompt}", spec.prompt) for _, spec, _ in work]
        call_options = {
            "width": settings.width,
            "height": settings.height,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "negative_prompt": [settings.negative_prompt] * len(work) if settings.negative_prompt else None,
        }
        arguments = {name: value for name, value in call_options.items() if value is not None} | settings.arguments
        noise = [noise_of(spec.seed, attempt) for _, spec, attempt in work]
        try:
            out = self.pipe(prompt=prompts, generator=noise, **arguments)
        except (ImagineError, ValueError) as error:
            return [failure(error)] if len(work) == 1 else [one for each in work for one in self._draw([each])]
        unsafe = getattr(out, "nsfw_content_detected", None) or [False] * len(work)
        return [
            Failed(BLOCKED) if blocked else candidate_of(spec, attempt, 0, image)
            for (_, spec, attempt), image, blocked in zip(work, out.images, unsafe, strict=True)
        ]


def load_pipeline(kind: Any, settings: ModelSettings, offload: bool = False) -> Any:
    """Load a diffusers pipeline with `kind.from_pretrained`, without output, with the settings' dtype and device."""
    device = choose_device(settings.device)
    options = {dtype_argument(kind): choose_dtype(settings.dtype, device), **settings.options}
    if settings.revision is not None:
        options["revision"] = settings.revision
    with loading(settings.model):
        pipe = kind.from_pretrained(settings.model, **options)
        pipe.set_progress_bar_config(disable=True)
        if offload and device.type != "cpu":
            pipe.enable_model_cpu_offload(device=device)
        elif "device_map" not in settings.options:
            pipe.to(device)
    return pipe


def load_imagine(settings: ModelSettings) -> ImaginePipeline:
    """Load our own pipeline without output, with the settings' dtype and device.

    `model` "" means the shipped weights.
    """
    device = choose_device(settings.device)
    options = {**settings.options, "dtype": choose_dtype(settings.dtype, device)}
    if settings.revision is not None:
        options["revision"] = settings.revision
    pipe = ImaginePipeline.from_pretrained(settings.model or None, **options)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    return pipe


def noise_of(seed: int, attempt: int, round: int = 0) -> torch.Generator:
    """Return the random generator of one picture: a different stream for every seed, attempt and refinement round."""
    mixed = hashlib.sha256(f"{seed}-{attempt}-{round}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(mixed, "big") >> 1)


def candidate_of(spec: TargetSpec, attempt: int, round: int, image: Image.Image) -> Candidate:
    """Return a picture as a candidate: a PNG file under the specification's key with attempt and round."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return Candidate(f"{spec.key}-{attempt}-{round}", spec.key, file.getvalue(), attempt, round)
