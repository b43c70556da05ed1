"""Generate candidates with our own pipeline, so that the weights of one stage make the pairs for the next stage."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from data_synth.backends.contracts import Failed
from data_synth.backends.generators import candidate_of, load_imagine, noise_of
from data_synth.backends.local_models import ModelSettings, ModelSource, failure, identity_of, source_identity
from data_synth.records import Candidate, Reference, TargetSpec
from imagine.errors import ImagineError
from imagine.networks.weights import default_folder

VERSION = 1


class ImagineGenerator:
    """A generator with our pipeline, from the prompt alone or from prompt and reference."""

    class Settings(ModelSettings):
        """The weights and the arguments of the call; for None, the value of the weights is used."""

        model: ModelSource = Field(default="", exclude=True)  # "": the shipped weights
        # 0: from the prompt alone, as in the paper, so that a refiner adds the identity; 1: with the full reference
        identity_scale: float = Field(default=0.0, ge=0)
        steps: int | None = Field(default=None, ge=1)
        guidance_scale: float | None = None
        identity_guidance_scale: float | None = None
        # Pictures per batch. More is faster, but the last bit may depend on the other pictures of the batch.
        batch_size: int = Field(default=8, ge=1, exclude=True)

    def __init__(self, settings: "ImagineGenerator.Settings") -> None:
        self.settings = settings
        self.pipe: Any = None

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """The class, the version, and the weights with their licence."""
        model = self.settings.model or str(default_folder())
        return identity_of(self, VERSION, **source_identity(model, self.settings.revision, self.settings.licence))

    def load(self) -> None:
        """Load the pipeline. Raises WeightsError if it cannot be loaded."""
        self.pipe = load_imagine(self.settings)

    def generate(self, work: Sequence[tuple[Reference, TargetSpec, int]]) -> list[Candidate | Failed]:
        """Return one candidate of round 0 for each (reference, target specification, attempt)."""
        size = self.settings.batch_size
        return [one for start in range(0, len(work), size) for one in self._draw(work[start : start + size])]

    def _draw(self, work: Sequence[tuple[Reference, TargetSpec, int]]) -> list[Candidate | Failed]:
        """Return the candidates of one batch; after an error, draw its items one by one."""
        settings = self.settings
        try:
            drawn = self.pipe(
                [spec.prompt for _, spec, _ in work],
                reference=[reference.image for reference, _, _ in work] if settings.identity_scale else None,
                generator=[noise_of(spec.seed, attempt) for _, spec, attempt in work],
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                identity_guidance_scale=settings.identity_guidance_scale,
                identity_scale=settings.identity_scale,
            )
        except ImagineError as error:
            return [failure(error)] if len(work) == 1 else [one for each in work for one in self._draw([each])]
        return [
            candidate_of(spec, attempt, 0, image) for (_, spec, attempt), image in zip(work, drawn.images, strict=True)
        ]
