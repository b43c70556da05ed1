"""Write dense captions of references with a vision-language model, in this process or behind an endpoint.

The paper's section 3.3 captions with "a multi-modal LLM" and does not give the prompt, so the default instruction is
ours; it is a setting. It requests the person first, with the attributes that `rewriters` changes or preserves, and
nothing that is not visible.
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
    """A captioner with any vision-language model that transformers' AutoModelForImageTextToText loads."""

    class Settings(ChatSettings):
        """The model and its prompt."""

        instruction: str = Field(default=DESCRIBE, min_length=1)
        longest_side: int = Field(default=1024, ge=32)  # pixels; larger photos are shrunk before the model reads them

    def __init__(self, settings: "TransformersCaptioner.Settings") -> None:
        self.settings = settings
        self.language_model = ChatModel(settings, "image-text-to-text")

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """The class, the version, and the model's name, weights and licence."""
        return identity_of(self, VERSION, **model_identity(self.settings))

    def load(self) -> None:
        """Load the model. Raises WeightsError if it cannot be loaded or does not read pictures."""
        self.language_model.load()

    def caption(self, references: Sequence[Reference]) -> list[str | Failed]:
        """Return a dense caption of each reference."""
        return answers(
            self.language_model, _questions(references, self.settings.instruction, self.settings.longest_side)
        )


class EndpointCaptioner:
    """A captioner with a vision-language model behind an OpenAI-compatible endpoint."""

    class Settings(EndpointSettings):
        """The endpoint and its prompt."""

        instruction: str = Field(default=DESCRIBE, min_length=1)
        longest_side: int = Field(default=1024, ge=32)  # pixels; larger photos are shrunk before they are sent

    def __init__(self, settings: "EndpointCaptioner.Settings") -> None:
        self.settings = settings
        self.language_model = Endpoint(settings)

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """The class, the version and the endpoint's name for its model; the weights behind that name are unknown."""
        return identity_of(self, VERSION, model=self.settings.model, licence=self.settings.licence)

    def load(self) -> None:
        """Read the API key. Raises ConfigError if it is missing."""
        self.language_model.load()

    def caption(self, references: Sequence[Reference]) -> list[str | Failed]:
        """Return a dense caption of each reference."""
        return answers(
            self.language_model, _questions(references, self.settings.instruction, self.settings.longest_side)
        )


def _questions(references: Sequence[Reference], instruction: str, longest_side: int) -> list[Question | Failed]:
    return [
        picture_question(instruction, reference.image, seed_of(reference.key), longest_side) for reference in references
    ]
