"""Dense captions of references, by a vision-language model here or behind an endpoint.

What the paper's section 3.3 asks of "a multi-modal LLM" without saying how: the instruction is ours, and a setting. It
asks for the person first and in the words that `rewriters` changes or keeps, and for nothing that cannot be seen.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from data_synth.backends.chat import ChatModel, ChatSettings, Question, answers, picture_question, seed_of
from data_synth.backends.contracts import Failed
from data_synth.backends.endpoint import Endpoint, EndpointSettings
from data_synth.backends.local_models import identity_of, model_identity
from data_synth.records import Reference

DESCRIBE = (
    "Describe this picture in one paragraph of at most 80 words, for a painter who has to paint it without seeing it. "
    "Begin with the person: rough age, skin, hair, beard, glasses, expression, where they look and how the head is "
    "turned. Then clothes and what they hold, the place, the light, and the kind of picture it is. Give no name and no "
    "guess at what cannot be seen. Answer with the description alone."
)
VERSION = 1


class TransformersCaptioner:
    """Any vision-language model that transformers' AutoModelForImageTextToText loads."""

    class Settings(ChatSettings):
        """The model, and what it is asked."""

        instruction: str = Field(default=DESCRIBE, min_length=1)
        longest_side: int = Field(default=1024, ge=32)  # pixels; larger photos are shrunk before they are looked at

    def __init__(self, settings: "TransformersCaptioner.Settings") -> None:
        self.settings = settings
        self.language_model = ChatModel(settings, "image-text-to-text")

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """Class, version, and the model's name, weights and licence."""
        return identity_of(self, VERSION, **model_identity(self.settings))

    def load(self) -> None:
        """Load the model; WeightsError if it is not there or cannot see."""
        self.language_model.load()

    def caption(self, references: Sequence[Reference]) -> list[str | Failed]:
        """A dense caption of each reference."""
        return answers(
            self.language_model, _questions(references, self.settings.instruction, self.settings.longest_side)
        )


class EndpointCaptioner:
    """A vision-language model behind an OpenAI-compatible endpoint."""

    class Settings(EndpointSettings):
        """The endpoint, and what it is asked."""

        instruction: str = Field(default=DESCRIBE, min_length=1)
        longest_side: int = Field(default=1024, ge=32)  # pixels; larger photos are shrunk before they are sent

    def __init__(self, settings: "EndpointCaptioner.Settings") -> None:
        self.settings = settings
        self.language_model = Endpoint(settings)

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """Class, version, and what the endpoint calls its model: it alone knows which weights those are."""
        return identity_of(self, VERSION, model=self.settings.model, licence=self.settings.licence)

    def load(self) -> None:
        """Find the key; ConfigError if there is none."""
        self.language_model.load()

    def caption(self, references: Sequence[Reference]) -> list[str | Failed]:
        """A dense caption of each reference."""
        return answers(
            self.language_model, _questions(references, self.settings.instruction, self.settings.longest_side)
        )


def _questions(references: Sequence[Reference], instruction: str, longest_side: int) -> list[Question | Failed]:
    return [
        picture_question(instruction, reference.image, seed_of(reference.key), longest_side) for reference in references
    ]
