"""Build the cases of an evaluation: every (person, prompt), the real renders of it, and the judge's results for them.

For each held-out person the world renders a reference (the only picture that the pipeline gets) and a gallery picture.
For each prompt it renders two more pictures that show what the prompt asks for: the ground truth, and a second one that
takes the place of a perfect pipeline's output (row "ceiling"). Renders are judged batch by batch and then freed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imagine.evaluation.judge import Judge
from imagine.evaluation.suites import Prompt, contexts_for
from imagine.records import Progress, no_progress
from imagine.world import Contexts, People, attributes, render, sample_people, seeds

GALLERY = 1000
PictureLoader = Callable[
    [int, int], tuple[Tensor, Tensor | None]
]  # rows start..stop -> pictures (n, 3, H, W), boxes or None


@dataclass(frozen=True)
class Judged:
    """The judge's results for a list of pictures."""

    embeddings: Tensor  # (N, D), unit length
    read: list[dict[str, str]]  # attribute or trait -> word, one dict a picture

    def __getitem__(self, rows: Tensor) -> "Judged":
        return Judged(self.embeddings[rows], [self.read[row] for row in rows.tolist()])


@dataclass(frozen=True)
class Cases:
    """Every (person, prompt), all prompts of the first person first, with the contexts of the real renders."""

    prompts: tuple[Prompt, ...]
    people: People  # the gallery's people, the evaluated ones first
    references: Contexts  # one per evaluated person
    gallery: Contexts  # one per person in the gallery
    truths: Contexts  # one per case
    ceilings: Contexts  # one per case
    identities: int  # number of evaluated people

    def __len__(self) -> int:
        return self.identities * len(self.prompts)

    @property
    def person(self) -> Tensor:
        return torch.arange(self.identities).repeat_interleave(len(self.prompts))

    def prompt(self, case: int) -> Prompt:
        return self.prompts[case % len(self.prompts)]


@dataclass(frozen=True)
class JudgedReal:
    """The judge's results for the real renders, and the true attributes of the references."""

    references: Judged
    reference_attributes: list[dict[str, str]]
    truths: Judged
    gallery: Judged
    rows: dict[str, Judged]  # ceiling, other, copy


def make_cases(prompts: Sequence[Prompt], identities: int, seed: int, gallery: int = GALLERY) -> Cases:
    """Return the people and contexts of one evaluation, from held-out seeds only.

    `seed` is taken modulo 10: ten values give different people.
    """
    base = seeds.HELD_OUT.start + (seed % 10) * 1_000_000
    gallery = max(gallery, identities)
    asked = [prompt.asked for _ in range(identities) for prompt in prompts]
    plain = [{"style": "photo", "headwear": "none"}]  # a plain photo, for recognition
    return Cases(
        prompts=tuple(prompts),
        people=sample_people(range(base, base + gallery)),
        references=contexts_for(plain * identities, range(base + 100_000, base + 100_000 + identities)),
        gallery=contexts_for(plain * gallery, range(base + 200_000, base + 200_000 + gallery)),
        truths=contexts_for(asked, range(base + 300_000, base + 300_000 + len(asked))),
        ceilings=contexts_for(asked, range(base + 600_000, base + 600_000 + len(asked))),
        identities=identities,
    )


def judge_real_pictures(cases: Cases, judge: Judge, progress: Progress = no_progress) -> JudgedReal:
    """Render everything real, a batch at a time, and judge it."""

    def judged(stage: str, count: int, pictures: PictureLoader) -> Judged:
        return judge_pictures(judge, count, pictures, progress=progress, stage=f"judging {stage}")

    evaluated = cases.people[: cases.identities]
    each = evaluated.repeat(len(cases.prompts))
    references = judged("the references", cases.identities, _rendered(evaluated, cases.references, true_boxes=True))
    # Judged as the pipeline's pictures are: face found, not known.
    ceiling = judged("real pictures for the ceiling", len(cases), _rendered(each, cases.ceilings, true_boxes=False))
    other = torch.arange(len(cases)).roll(len(cases.prompts))  # the previous person, same prompt
    copies = judged(
        "the references as copies", cases.identities, _rendered(evaluated, cases.references, true_boxes=False)
    )
    return JudgedReal(
        references=references,
        reference_attributes=attributes(evaluated, cases.references),
        truths=judged("real pictures to compare with", len(cases), _rendered(each, cases.truths, true_boxes=True)),
        gallery=judged("the gallery", len(cases.gallery), _rendered(cases.people, cases.gallery, true_boxes=True)),
        rows={"ceiling": ceiling, "other": ceiling[other], "copy": copies[cases.person]},
    )


def _rendered(people: People, contexts: Contexts, true_boxes: bool) -> PictureLoader:
    def pictures(start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        drawn = render(people[start:stop], contexts[start:stop])
        return drawn.images, drawn.boxes if true_boxes else None

    return pictures


def judge_pictures(
    judge: Judge,
    count: int,
    pictures: PictureLoader,
    batch: int = 64,
    progress: Progress = no_progress,
    stage: str = "judging",
) -> Judged:
    """Judge `count` pictures without holding more than a batch of them."""
    embeddings, read = [], []
    for start in range(0, count, batch):
        progress(stage, start, count)
        images, boxes = pictures(start, min(start + batch, count))
        embeddings.append(judge.embed(images, boxes))
        read += judge.read(images)
    return Judged(torch.cat(embeddings), read)
