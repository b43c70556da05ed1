"""Build the cases of the suite `people`: every (group of people, sentence), and the real pictures of it.

Everyone is in one group only. For each person the world renders a reference portrait, which the pipeline gets, and
another portrait, the truth that faces are compared with. For each case it renders two pictures that show what the
sentence asks for: one of the group, which takes the place of a perfect pipeline's output (row "ceiling"), and one of
strangers in the same contexts (row "other").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imagine.evaluation.people.suites import NAMES, GroupPrompt
from imagine.evaluation.suites import contexts_for
from imagine.world import (
    Contexts,
    Groups,
    People,
    Renders,
    canvas_shape,
    render_groups,
    sample_groups,
    sample_people,
    seeds,
)

PLAIN = {"style": "photo", "headwear": "none"}  # a plain photo, for recognition
# First seeds of each kind, counted from the first seed of the evaluation, and the step from pairs to triples. The suite
# `portraits` has people at 0 to 1,000, and contexts at 100,000 to 366,000 and 600,000 to 666,000.
_PEOPLE, _STRANGERS, _REFERENCES, _TRUTHS, _PICTURES = 400_000, 420_000, 440_000, 460_000, 500_000
_PER_COUNT = 10_000
SIDE = 128  # height of the real pictures in pixels


@dataclass(frozen=True)
class GroupCases:
    """Every (group, sentence) for groups of `count` people, all sentences of the first group first.

    people, strangers, references, truths: `count` rows per group; contexts: `count` rows per case. The rows of a group
    are in the order of its references.
    """

    count: int
    groups: int
    prompts: tuple[GroupPrompt, ...]
    people: People
    strangers: People
    references: Contexts
    truths: Contexts
    contexts: Contexts
    arrangements: Groups  # one per case
    places: Tensor  # (cases, count), each person's place from the left in the real pictures

    def __len__(self) -> int:
        return self.groups * len(self.prompts)

    @property
    def names(self) -> tuple[str, ...]:
        return NAMES[: self.count]

    def prompt(self, case: int) -> GroupPrompt:
        return self.prompts[case % len(self.prompts)]

    def members(self, cases: Tensor, exchanged: bool = False) -> Tensor:
        """Return the rows of each case's people, (B, count); `exchanged`: in reverse order."""
        rows = (cases // len(self.prompts)).unsqueeze(1) * self.count + torch.arange(self.count)
        return rows.flip(1) if exchanged else rows

    def render(self, cases: Tensor, people: People, exchanged: bool = False, size: int = SIDE) -> Renders:
        """Render these cases (B,) with `people` or strangers; `exchanged`: everyone in the place of another."""
        order = self.places[cases].argsort(1)  # the number of the person at each place
        who = self.members(cases, exchanged).gather(1, order).flatten()
        how = (cases.unsqueeze(1) * self.count + order).flatten()
        return render_groups(people[who], self.contexts[how], self.count, size, groups=self.arrangements[cases])

    @property
    def first_cases(self) -> Tensor:
        """The cases of the first sentence, (groups,)."""
        return torch.arange(self.groups) * len(self.prompts)


def make_group_cases(prompts: Sequence[GroupPrompt], count: int, groups: int, seed: int) -> GroupCases:
    """Return the people and contexts of `groups` groups of `count` people, from held-out seeds only.

    `seed` is taken modulo 10: ten values give different people.
    """
    base = seeds.HELD_OUT.start + (seed % 10) * 1_000_000 + (count - 2) * _PER_COUNT
    rows, cases = groups * count, groups * len(prompts)
    pictures = base + _PICTURES + (count - 2) * _PER_COUNT  # there are more pictures than people
    height, width = canvas_shape(count, SIDE)
    asked = [
        {**prompt.picture, **person.asked} for _ in range(groups) for prompt in prompts for person in prompt.people
    ]
    return GroupCases(
        count=count,
        groups=groups,
        prompts=tuple(prompts),
        people=sample_people(range(base + _PEOPLE, base + _PEOPLE + rows)),
        strangers=sample_people(range(base + _STRANGERS, base + _STRANGERS + rows)),
        references=contexts_for([PLAIN] * rows, range(base + _REFERENCES, base + _REFERENCES + rows)),
        truths=contexts_for([PLAIN] * rows, range(base + _TRUTHS, base + _TRUTHS + rows)),
        contexts=contexts_for(asked, range(pictures, pictures + len(asked))),
        arrangements=sample_groups(range(pictures, pictures + cases), count, width / height),
        places=torch.stack([_places(prompts[case % len(prompts)], pictures + case) for case in range(cases)]),
    )


def _places(prompt: GroupPrompt, seed: int) -> Tensor:
    """Return each person's place: the sentence's, or in any order if the sentence leaves it open."""
    if prompt.has_places:
        return torch.tensor([person.place for person in prompt.people])
    return torch.randperm(len(prompt.people), generator=torch.Generator().manual_seed(seed))
