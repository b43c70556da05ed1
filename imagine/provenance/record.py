"""What is recorded of one picture, as a record, as JSON, and as the text that other programs read.

Names of people, notes on consents, and names and metadata of photos are never part of it: a record has no place for
them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from imagine.paths import VERSION

SCHEMA = 1
KEY = "imagine"  # of our JSON in a picture
NO_CONSENT = "not recorded"


@dataclass(frozen=True)
class ShownPerson:
    """One person of a picture: the hash of the persona, and the basis of the consent, or "not recorded"."""

    persona: str
    consent: str = NO_CONSENT


@dataclass(frozen=True)
class PictureRecord:
    """The origin of one picture; what is unknown is None or empty.

    `weights` is a hash of all networks, `settings` holds every other argument of the call as plain values.
    """

    prompt: str = ""
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str = ""
    model: str = ""
    weights: str = ""
    negative_prompt: str = ""
    people: tuple[ShownPerson, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    flag: str = ""  # why a safety classifier flagged the picture

    @property
    def consent(self) -> str:
        """Return "no person", "recorded" (for every person) or "not recorded"."""
        if not self.people:
            return "no person"
        return NO_CONSENT if any(person.consent == NO_CONSENT for person in self.people) else "recorded"

    def as_dict(self, marks: Mapping[str, Any], with_prompt: bool = True) -> dict[str, Any]:
        """Return plain values, ready for JSON; `marks` says which marks the picture carries."""
        prompts = {"prompt": self.prompt, "negative_prompt": self.negative_prompt} if with_prompt else {}
        return {
            "schema": SCHEMA, "software": f"imagine {VERSION}", "ai_generated": True, **prompts, "seed": self.seed,
            "steps": self.steps, "guidance_scale": self.guidance_scale, "sampler": self.sampler, "model": self.model,
            "weights": self.weights, "consent": self.consent,
            "people": [{"persona": person.persona, "consent": person.consent} for person in self.people],
            "settings": dict(self.settings), "marks": dict(marks), **({"flag": self.flag} if self.flag else {}),
        }  # fmt: skip

    def as_text(self, size: tuple[int, int], with_prompt: bool = True) -> str:
        """Return the text that AUTOMATIC1111's web UI and its relatives write and read, for a picture of this size.

        The prompt, then "Negative prompt: ...", then one line of "Name: value" pairs, where a value with a comma, a
        colon or a line break is quoted as JSON (modules/infotext_utils.py there).
        """
        pairs = {
            "Steps": self.steps, "Sampler": self.sampler, "CFG scale": self.guidance_scale, "Seed": self.seed,
            "Size": f"{size[0]}x{size[1]}", "Model hash": self.weights, "Model": self.model,
            "Version": f"imagine {VERSION}", "AI generated": "yes",
            "Imagine personas": " ".join(person.persona for person in self.people), "Imagine consent": self.consent,
        }  # fmt: skip
        line = ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value not in (None, ""))
        negative = [f"Negative prompt: {self.negative_prompt}"] if with_prompt and self.negative_prompt else []
        return "\n".join([self.prompt if with_prompt else "", *negative, line]).strip("\n")


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text
