"""Judge what an autoencoder keeps of held-out people: their likeness, their words and their expressions.

Signal-to-noise ratios do not measure faces and letters (arXiv 2505.18142), so the gates of an autoencoder are these
numbers. Each is a share of the same number for the real renders.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagine.evaluation.judge import Judge, Reader
from imagine.networks.recogniser import Recogniser
from imagine.world import Contexts, attributes, render, sample_contexts, sample_people
from imagine.world.seeds import HELD_OUT
from imagine.world.vocabulary import CLOTHES, FRAMINGS, STYLES

STAGES = ("recogniser", "reader")  # the stages whose exports are the judge
_FIRST = HELD_OUT.stop - 4_000  # far from the people of the evaluation and of the other validations
_PEOPLE, _WORDS = 256, 192  # pictures


class ReconstructionJudge:
    """Compares the reconstructions of held-out renders with the renders themselves."""

    def __init__(self, judge: Judge, people: int = _PEOPLE, words: int = _WORDS) -> None:
        self.judge, self.people, self.word_count = judge, people, words

    @classmethod
    def from_stages(cls, earlier: Mapping[str, Path]) -> "ReconstructionJudge | None":
        """Return the judge that earlier stages of the run trained; None unless both are among them."""
        if not set(STAGES) <= set(earlier):
            return None
        recogniser = Recogniser.load(earlier["recogniser"] / "recogniser")
        return cls(Judge(recogniser, Reader.load(earlier["reader"] / "reader")))

    def scores(self, reconstruct: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return likeness, words and expression kept, as shares. reconstruct: pictures (B, 3, S, S), 0..1, to the same.

        likeness: the similarity to another picture of the person. words: how often a word of two letters is read right.
        expression: how often the expression is read right.
        """
        images, boxes, others, rows = self._portraits
        likeness = (self.judge.embed(reconstruct(images), boxes) * others).sum(1).mean()
        real = (self.judge.embed(images, boxes) * others).sum(1).mean()
        lettered, words = self._lettered
        return {
            "likeness_kept": float(likeness / real),
            "words_kept": self._share(reconstruct(lettered), lettered, words, "letters"),
            "expression_kept": self._share(reconstruct(images), images, rows, "expression"),
        }

    def _share(self, drawn: Tensor, real: Tensor, rows: list[dict[str, str]], name: str) -> float:
        """Return how often an attribute is read right in drawn pictures, as a share of the real ones."""
        right = [
            sum(read[name] == row[name] for read, row in zip(self.judge.read(images), rows, strict=True))
            for images in (drawn, real)
        ]
        return right[0] / max(1, right[1])

    @cached_property
    def _portraits(self) -> tuple[Tensor, Tensor, Tensor, list[dict[str, str]]]:
        """Return pictures, their face boxes, the embeddings of other pictures of the people, and the attributes."""
        seeds = range(_FIRST, _FIRST + self.people)
        people, contexts = sample_people(seeds), sample_contexts(seeds)
        out = render(people, contexts)
        other = render(people, sample_contexts([seed + 5_000_000 for seed in seeds]))
        return out.images, out.boxes, self.judge.embed(other.images, other.boxes), attributes(people, contexts)

    @cached_property
    def _lettered(self) -> tuple[Tensor, list[dict[str, str]]]:
        """Return photos of people with a word of two letters on a T-shirt, and the attributes."""
        seeds = range(_FIRST + 1_000, _FIRST + 1_000 + self.word_count)
        people, contexts = sample_people(seeds), _with_words(sample_contexts(seeds))
        return render(people, contexts).images, attributes(people, contexts)


def _with_words(contexts: Contexts) -> Contexts:
    random = torch.Generator().manual_seed(0)
    letters = torch.randint(1, 27, (len(contexts), 3), generator=random)
    letters[:, 2] = 0
    plain: dict[str, Any] = {
        "clothes": CLOTHES.index("t-shirt"), "framing": FRAMINGS.index("portrait"), "style": STYLES.index("photo"),
        "light": 0, "held": 0,
    }  # fmt: skip
    return contexts.replace(letters=letters, **plain)
