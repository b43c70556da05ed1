"""Compute the tables of the suite `people` from the judge's results, with the same computation for every row.

A row is one source of pictures: the pipeline ("full"), real pictures of the group ("ceiling"), or real pictures of
strangers ("other", the floor). A face that was not found counts as a missing person: no case leaves the denominators.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imagine.evaluation.metrics import bootstrap_ratio, found
from imagine.evaluation.metrics.several import PATTERNS
from imagine.evaluation.people.cases import GroupCases
from imagine.evaluation.people.judging import JudgedGroup
from imagine.evaluation.people.suites import GroupPrompt

METRICS = ("present", "doubled", "assigned", "attributes", "exchanged", *PATTERNS)
LOWER_IS_BETTER = ("doubled", *PATTERNS[1:])
Counts = dict[str, tuple[Tensor, Tensor]]  # metric -> how often, out of how many, for each group (groups,)


@dataclass(frozen=True)
class JudgedRow:
    """One row's pictures of the cases, and, for pairs, of the first sentence with exchanged references."""

    pictures: list[JudgedGroup]
    exchanged: list[JudgedGroup]


def is_assigned(prompt: GroupPrompt, group: JudgedGroup) -> bool:
    """Return whether everyone is present and, where the sentence gives places, stands in the right order."""
    wanted = sorted(range(len(prompt.people)), key=lambda number: prompt.people[number].place or 0)
    return group.all_present and (not prompt.has_places or group.order == wanted)


def has_exchanged(one: JudgedGroup, other: JudgedGroup) -> bool:
    """Return whether two pictures show all people, in opposite orders."""
    return one.all_present and other.all_present and one.order == other.order[::-1]


def attributes_found(prompt: GroupPrompt, group: JudgedGroup) -> int:
    """Return how many of the attributes that are asked of people were read; none of a person who is not present."""
    pairs = zip(prompt.people, group.people, strict=True)
    return sum(sum(found(wanted.asked, person.read).values()) for wanted, person in pairs)


def count_groups(cases: GroupCases, row: JudgedRow) -> Counts:
    """Return what each group contributes to each metric."""
    prompts = [cases.prompt(case) for case in range(len(cases))]
    numbers = {
        "present": [(sum(one.present for one in group.people), cases.count) for group in row.pictures],
        "doubled": [(group.doubled, 1) for group in row.pictures],
        "assigned": [(is_assigned(prompt, group), 1) for prompt, group in zip(prompts, row.pictures, strict=True)],
        "attributes": [
            (attributes_found(prompt, group), sum(len(person.asked) for person in prompt.people))
            for prompt, group in zip(prompts, row.pictures, strict=True)
        ],
    }
    if all(group.patterns for group in row.pictures):
        numbers |= {name: [(group.patterns.count(name), cases.count) for group in row.pictures] for name in PATTERNS}
    counts: Counts = {}
    for name, pairs in numbers.items():
        table = torch.tensor(pairs).view(cases.groups, len(cases.prompts), 2).sum(1)
        counts[name] = table[:, 0], table[:, 1]
    if row.exchanged:
        first = [row.pictures[case] for case in cases.first_cases.tolist()]
        swapped = [has_exchanged(one, other) for one, other in zip(first, row.exchanged, strict=True)]
        counts["exchanged"] = torch.tensor(swapped).long(), torch.ones(cases.groups, dtype=torch.long)
    return counts


def summarise(sets: Sequence[GroupCases], rows: Mapping[str, Sequence[JudgedRow]], seed: int) -> dict[str, Any]:
    """Return the tables of the report as plain numbers; each row of pictures has one `JudgedRow` for each set of cases.

    metrics and of_ceiling: all groups together; by_people: the metrics for each number of people; rows: every row.
    """
    counts = {
        row: [count_groups(cases, own) for cases, own in zip(sets, judged, strict=True)] for row, judged in rows.items()
    }
    together = {row: _metrics(parts, seed) for row, parts in counts.items()}
    by_people = {
        str(cases.count): _headline({row: _metrics(parts[number : number + 1], seed) for row, parts in counts.items()})
        for number, cases in enumerate(sets)
    }
    headline = _headline(together)
    return {
        "metrics": headline,
        "of_ceiling": {
            name: one["value"] / max(one["ceiling"], 1e-9)
            for name, one in headline.items()
            if name not in LOWER_IS_BETTER
        },
        "by_people": by_people,
        "rows": together,
        "attributes": _attribute_table(sets, rows),
        "people": _group_means(next(iter(counts.values()))),
        "faces": {row: _mean_faces(sets, judged) for row, judged in rows.items()},
    }


def _metrics(parts: Sequence[Counts], seed: int) -> dict[str, dict[str, float]]:
    """Return each metric with its bootstrap interval over groups."""
    table = {}
    for name in METRICS:
        own = [part[name] for part in parts if name in part]
        if own:
            counts, totals = torch.cat([one for one, _ in own]), torch.cat([total for _, total in own])
            low, high = bootstrap_ratio(counts, totals, seed)
            table[name] = {"value": int(counts.sum()) / int(totals.sum()), "low": low, "high": high}
    return table


def _group_means(parts: Sequence[Counts]) -> dict[str, list[float]]:
    """Return metric -> each group's share, the pairs first, to compare systems."""
    return {
        name: [
            float(count) / max(float(total), 1.0)
            for part in parts
            if name in part
            for count, total in zip(*part[name], strict=True)
        ]
        for name in METRICS
        if any(name in part for part in parts)
    }


def _headline(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the first row's metrics beside the values of the ceiling and of the floor."""
    main = next(iter(table.values()))
    return {
        name: {**one, "ceiling": table["ceiling"][name]["value"], "floor": table["other"][name]["value"]}
        for name, one in main.items()
    }


def _attribute_table(
    sets: Sequence[GroupCases], rows: Mapping[str, Sequence[JudgedRow]]
) -> dict[str, dict[str, float]]:
    """Return attribute -> of how many people it was asked, and the share found in each row.

    What is asked of the picture (scene, style, light) is read on the square of every person, and counts once for each.
    """
    found_by: dict[str, dict[str, list[bool]]] = {}
    for row, judged in rows.items():
        for cases, own in zip(sets, judged, strict=True):
            for case, group in enumerate(own.pictures):
                prompt = cases.prompt(case)
                for wanted, person in zip(prompt.people, group.people, strict=True):
                    for name, correct in found({**wanted.asked, **prompt.picture}, person.read).items():
                        found_by.setdefault(name, {}).setdefault(row, []).append(correct)
    return {
        name: {"asked": len(next(iter(by_row.values()))), **{row: sum(c) / len(c) for row, c in by_row.items()}}
        for name, by_row in found_by.items()
    }


def _mean_faces(sets: Sequence[GroupCases], judged: Sequence[JudgedRow]) -> dict[str, float]:
    """Return the mean number of faces that were found in a picture, for each number of people."""
    return {
        str(cases.count): sum(group.faces for group in own.pictures) / len(own.pictures)
        for cases, own in zip(sets, judged, strict=True)
    }
