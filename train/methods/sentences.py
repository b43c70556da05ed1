"""Sentences: how a subject is named in training, and how a user's sentence is made to name it."""

import re
from dataclasses import dataclass

PLAIN = "a photo of a {}"
# Templates that say nothing about the subject, after Textual Inversion (arXiv 2208.01618, supplementary material).
NEUTRAL = (
    PLAIN, "a photo of the {}", "a close-up photo of a {}", "a good photo of a {}", "a photograph of a {}",
    "a bright photo of a {}", "a cropped photo of a {}", "a picture of a {}", "a portrait of a {}", "one photo of a {}",
)  # fmt: skip


@dataclass(frozen=True)
class Naming:
    """The subjects' words, and the class noun that follows them in every sentence; "" for none."""

    tokens: tuple[str, ...]
    noun: str

    def name(self, number: int = 0) -> str:
        """Return the name of a subject: its word and the class noun."""
        return f"{self.tokens[number]} {self.noun}".strip()

    def side_by_side(self, left: int, right: int) -> str:
        """Return the sentence for a picture of two subjects (SVDiff, section 3.2)."""
        return f"a photo of a {self.name(left)} on the left and a {self.name(right)} on the right"

    def personal(self, sentence: str, noun: str = "person", number: int = 0) -> str:
        """Return the sentence with the first mention of `noun` replaced by the subject's name.

        If the sentence does not mention it, the name comes first. A sentence with a subject's word stays as it is.
        """
        if any(token in sentence.split() for token in self.tokens):
            return sentence
        found = re.search(rf"\b{re.escape(noun)}\b", sentence)
        if found is None:
            return f"a {self.name(number)}, {sentence}" if sentence else f"a {self.name(number)}"
        return sentence[: found.start()] + self.name(number) + sentence[found.end() :]
