"""Rewrite captions to describe a target, with a language model in this process or behind an endpoint.

In the paper's section 3.3, Llama 3 "injects" gaze and pose. Here the aims (the attribute values of a target) are
assigned before, so that the whole build meets the wished distribution, and the model only writes them into the
caption. A model that chooses the values itself makes almost everybody smile into the camera.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from data_synth.backends.chat import ChatModel, ChatSettings, LanguageModel, Question, answers
from data_synth.backends.contracts import Failed, Target
from data_synth.backends.endpoint import Endpoint, EndpointSettings
from data_synth.backends.local_models import identity_of, model_identity

REWRITE = (
    "Below is the caption of a picture of a person. Write the caption of another picture of the same person, in which "
    "the following is so:\n{aims}\n"
    "Keep whatever says who the person is: age, skin, hair, beard, glasses. Change what the list asks for and what "
    "would contradict it; keep the rest. Do not compare the two pictures. Answer with the new caption alone, one "
    "paragraph of at most 80 words.\n\nCaption: {caption}"
)
VERSION = 1


def _has_places(instruction: str) -> str:
    if missing := [place for place in ("{aims}", "{caption}") if place not in instruction]:
        raise ValueError(f"the instruction does not say where {' and '.join(missing)} go; add the placeholder")
    return instruction


Instruction = Annotated[str, AfterValidator(_has_places)]


class TransformersRewriter:
    """A rewriter with any instruction-tuned language model that transformers' AutoModelForCausalLM loads."""

    class Settings(ChatSettings):
        """The model and its prompt."""

        instruction: Instruction = REWRITE  # {aims} and {caption} are replaced
        temperature: float = Field(default=0.7, ge=0)  # above 0, so that equal aims give different sentences
        top_p: float = Field(default=0.95, gt=0, le=1)

    def __init__(self, settings: "TransformersRewriter.Settings") -> None:
        self.settings = settings
        self.language_model = ChatModel(settings, "text-generation")

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """The class, the version, and the model's name, weights and licence."""
        return identity_of(self, VERSION, **model_identity(self.settings))

    def load(self) -> None:
        """Load the model. Raises WeightsError if it cannot be loaded or has no chat template."""
        self.language_model.load()

    def rewrite(self, targets: Sequence[Target]) -> list[str | Failed]:
        """Return each target's caption, changed to include its aims."""
        return _rewritten(self.language_model, targets, self.settings.instruction)


class EndpointRewriter:
    """A rewriter with a language model behind an OpenAI-compatible endpoint."""

    class Settings(EndpointSettings):
        """The endpoint and its prompt."""

        instruction: Instruction = REWRITE  # {aims} and {caption} are replaced
        temperature: float | None = Field(default=0.7, ge=0)  # above 0, so that equal aims give different sentences

    def __init__(self, settings: "EndpointRewriter.Settings") -> None:
        self.settings = settings
        self.language_model = Endpoint(settings)

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """The class, the version and the endpoint's name for its model; the weights behind that name are unknown."""
        return identity_of(self, VERSION, model=self.settings.model, licence=self.settings.licence)

    def load(self) -> None:
        """Read the API key. Raises ConfigError if it is missing."""
        self.language_model.load()

    def rewrite(self, targets: Sequence[Target]) -> list[str | Failed]:
        """Return each target's caption, changed to include its aims."""
        return _rewritten(self.language_model, targets, self.settings.instruction)


def _rewritten(language_model: LanguageModel, targets: Sequence[Target], instruction: str) -> list[str | Failed]:
    """Rewrite the caption of every target that has aims; return the other captions unchanged."""
    with_aims = [target for target in targets if target.aims]
    texts = iter(
        answers(language_model, [Question(_instruction(target, instruction), target.seed) for target in with_aims])
    )
    return [next(texts) if target.aims else target.caption for target in targets]


def _instruction(target: Target, instruction: str) -> str:
    aims = "\n".join(f"- {name}: {value}" for name, value in target.aims.items())
    # str.format would fail, because captions and custom instructions may contain braces. The caption is inserted last,
    # so that "{aims}" in a caption is not replaced.
    return instruction.replace("{aims}", aims).replace("{caption}", target.caption)
