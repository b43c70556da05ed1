"""Captions rewritten to what a target should show, by a language model here or behind an endpoint.

The paper's section 3.3 lets Llama 3 "inject" gaze and pose. Here the aims are drawn beforehand, so that the wished
distribution is met over the whole build, and the model only writes them into the sentence: a model that chooses by
itself makes everybody smile into the camera.
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
        raise ValueError(f"the instruction does not say where {' and '.join(missing)} go")
    return instruction


Instruction = Annotated[str, AfterValidator(_has_places)]


class TransformersRewriter:
    """Any language model that transformers' AutoModelForCausalLM loads, trained to follow instructions."""

    class Settings(ChatSettings):
        """The model, and what it is asked."""

        instruction: Instruction = REWRITE  # {aims} and {caption} are put in
        temperature: float = Field(default=0.7, ge=0)  # some chance, or equal aims give equal sentences
        top_p: float = Field(default=0.95, gt=0, le=1)

    def __init__(self, settings: "TransformersRewriter.Settings") -> None:
        self.settings = settings
        self.language_model = ChatModel(settings, "text-generation")

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """Class, version, and the model's name, weights and licence."""
        return identity_of(self, VERSION, **model_identity(self.settings))

    def load(self) -> None:
        """Load the model; WeightsError if it is not there or knows no conversation."""
        self.language_model.load()

    def rewrite(self, targets: Sequence[Target]) -> list[str | Failed]:
        """Each target's caption with its aims brought in."""
        return _rewritten(self.language_model, targets, self.settings.instruction)


class EndpointRewriter:
    """A language model behind an OpenAI-compatible endpoint."""

    class Settings(EndpointSettings):
        """The endpoint, and what it is asked."""

        instruction: Instruction = REWRITE  # {aims} and {caption} are put in
        temperature: float | None = Field(default=0.7, ge=0)  # some chance, or equal aims give equal sentences

    def __init__(self, settings: "EndpointRewriter.Settings") -> None:
        self.settings = settings
        self.language_model = Endpoint(settings)

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """Class, version, and what the endpoint calls its model: it alone knows which weights those are."""
        return identity_of(self, VERSION, model=self.settings.model, licence=self.settings.licence)

    def load(self) -> None:
        """Find the key; ConfigError if there is none."""
        self.language_model.load()

    def rewrite(self, targets: Sequence[Target]) -> list[str | Failed]:
        """Each target's caption with its aims brought in."""
        return _rewritten(self.language_model, targets, self.settings.instruction)


def _rewritten(language_model: LanguageModel, targets: Sequence[Target], instruction: str) -> list[str | Failed]:
    """Ask for every target that has aims; where nothing is to change, the caption is the answer."""
    asked = [target for target in targets if target.aims]
    texts = iter(
        answers(language_model, [Question(_instruction(target, instruction), target.seed) for target in asked])
    )
    return [next(texts) if target.aims else target.caption for target in targets]


def _instruction(target: Target, instruction: str) -> str:
    aims = "\n".join(f"- {name}: {value}" for name, value in target.aims.items())
    # Not str.format: captions and other people's instructions may hold braces. The caption comes last, so that a
    # caption that holds "{aims}" stays as it is.
    return instruction.replace("{aims}", aims).replace("{caption}", target.caption)
