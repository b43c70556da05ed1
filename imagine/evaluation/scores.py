"""Compute the tables of the report from the judge's results, with the same computation for every row.

A row is one source of pictures for the prompts: the pipeline ("full"), the base alone ("detached"), real renders of
the person ("ceiling") or of another person ("other"), or the reference itself ("copy").
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imagine.evaluation import metrics
from imagine.evaluation.cases import Cases, Judged, JudgedReal
from imagine.evaluation.suites import Prompt

METRICS = ("prompt", "sim_gt", "sim_ref", "rank1", "copy_paste")
FLOORS = {"prompt": "copy", "sim_gt": "other", "sim_ref": "other", "rank1": "other", "copy_paste": "copy"}
OF_CEILING = ("prompt", "sim_gt", "rank1")


def score(cases: Cases, judged: Judged, real: JudgedReal) -> dict[str, Tensor]:
    """Return each metric for every case, as (I, P); "prompt" is the share of the prompt's attributes that was found."""
    reference = real.references.embeddings[cases.person]
    truth = real.truths.embeddings
    shares = [_share(cases.prompt(case), judged.read[case]) for case in range(len(cases))]
    numbers = {
        "prompt": torch.tensor(shares),
        "sim_gt": metrics.similarity(judged.embeddings, truth),
        "sim_ref": metrics.similarity(judged.embeddings, reference),
        "rank1": metrics.rank1(judged.embeddings, real.gallery.embeddings, cases.person),
        "copy_paste": metrics.copy_paste(judged.embeddings, truth, reference),
    }
    return {name: values.view(cases.identities, -1) for name, values in numbers.items()}


def summarise(
    cases: Cases, scores: Mapping[str, Mapping[str, Tensor]], judged: Mapping[str, Judged], real: JudgedReal, seed: int
) -> dict[str, Any]:
    """Return the tables of the report as plain numbers: metrics, rows, attributes, groups, leakage."""
    counts = torch.tensor([float(len(prompt.asked)) for prompt in cases.prompts])
    weights = {name: counts if name == "prompt" else torch.ones_like(counts) for name in METRICS}
    table = {
        row: {name: _summary(numbers[name], weights[name], seed) for name in METRICS} for row, numbers in scores.items()
    }
    main = next(iter(table))
    headline = {
        name: {**table[main][name], "ceiling": table["ceiling"][name]["value"], "floor": table[floor][name]["value"]}
        for name, floor in FLOORS.items()
    }
    return {
        "metrics": headline,
        "of_ceiling": {name: headline[name]["value"] / max(headline[name]["ceiling"], 1e-9) for name in OF_CEILING},
        "rows": table,
        "attributes": _attribute_table(cases, judged),
        "groups": _group_table(cases, scores),
        "leakage": _leakage_table(cases, judged, real.reference_attributes),
    }


def _share(prompt: Prompt, read: Mapping[str, str]) -> float:
    correct = metrics.found(prompt.asked, read)
    return sum(correct.values()) / len(correct)


def _summary(values: Tensor, weights: Tensor, seed: int) -> dict[str, float]:
    """Return the weighted mean over prompts, then over people, with a bootstrap interval over people: (I, P), (P,)."""
    people = (values * weights).sum(1) / weights.sum()
    low, high = metrics.bootstrap(people, seed)
    return {"value": float(people.mean()), "low": low, "high": high}


def _attribute_table(cases: Cases, judged: Mapping[str, Judged]) -> dict[str, dict[str, float]]:
    """Return attribute -> how many prompts asked for it, and the share found in each row."""
    names = dict.fromkeys(name for prompt in cases.prompts for name in prompt.asked)
    table: dict[str, dict[str, float]] = {}
    for name in names:
        with_attribute = [case for case in range(len(cases)) if name in cases.prompt(case).asked]
        table[name] = {"asked": len(with_attribute)}
        for row, results in judged.items():
            correct = [metrics.found(cases.prompt(case).asked, results.read[case])[name] for case in with_attribute]
            table[name][row] = sum(correct) / len(correct)
    return table


def _group_table(cases: Cases, scores: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Return prompt group -> row -> mean of every metric."""
    groups = dict.fromkeys(prompt.group for prompt in cases.prompts)
    columns = {g: [i for i, prompt in enumerate(cases.prompts) if prompt.group == g] for g in groups}
    return {
        group: {
            row: {name: float(numbers[name][:, columns[group]].mean()) for name in METRICS}
            for row, numbers in scores.items()
        }
        for group in groups
    }


def _leakage_table(
    cases: Cases, judged: Mapping[str, Judged], references: Sequence[Mapping[str, str]]
) -> dict[str, dict[str, float]]:
    """Return attribute -> how often it could leak from the reference, and the share that leaked in each row.

    "all" pools the attributes.
    """
    counts: dict[str, dict[str, list[bool]]] = {"all": {row: [] for row in judged}}
    for row, results in judged.items():
        for case in range(len(cases)):
            reference_words = references[case // len(cases.prompts)]
            for name, has_leaked in metrics.leaked(
                cases.prompt(case).asked, reference_words, results.read[case]
            ).items():
                counts.setdefault(name, {}).setdefault(row, []).append(has_leaked)
                counts["all"][row].append(has_leaked)
    return {
        name: {
            "possible": len(next(iter(by_row.values()))),
            **{row: sum(d) / max(len(d), 1) for row, d in by_row.items()},
        }
        for name, by_row in counts.items()
    }
