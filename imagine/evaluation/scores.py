"""Compute the metrics of the suite `portraits` from the judge's results, with the same computation for every row.

A row is one source of pictures for the prompts: the system ("full"), the base alone ("detached"), real renders of
the person ("ceiling") or of another person ("other"), or the reference itself ("copy"). Every metric has one interface:
a function from the evidence of a row to one number per picture, and how much each picture counts. A picture that could
not be read, or shows no face, keeps its place in every denominator.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imagine.evaluation import metrics
from imagine.evaluation.cases import Cases, Judged, JudgedReal
from imagine.evaluation.suites import Prompt

MAIN = ("prompt", "sim_gt", "sim_ref", "rank1", "copy_paste")
OF_CEILING = ("prompt", "sim_gt", "rank1", "letters")


@dataclass(frozen=True)
class Evidence:
    """What a metric may look at: the cases, the judge's results for one row of pictures, and for the real pictures."""

    cases: Cases
    judged: Judged
    real: JudgedReal

    @property
    def references(self) -> Tensor:
        """The embeddings of each case's reference, (cases, D)."""
        return self.real.references.embeddings[self.cases.person]

    @property
    def reference_words(self) -> list[dict[str, str]]:
        """The true attributes of each case's reference."""
        return [self.real.reference_attributes[person] for person in self.cases.person.tolist()]

    @property
    def prompts(self) -> list[Prompt]:
        """The prompt of each case."""
        return [self.cases.prompt(case) for case in range(len(self.cases))]


@dataclass(frozen=True)
class Metric:
    """One number per picture, and how much each picture counts.

    floor: the row that shows the worst value to expect. better: whether "higher" or "lower" is better.
    """

    name: str
    floor: str
    score: Callable[[Evidence], Tensor]  # -> (cases,)
    weight: Callable[[Evidence], Tensor] | None = None  # -> (cases,); None: all pictures count alike
    better: str = "higher"


def _found_share(evidence: Evidence) -> Tensor:
    return torch.tensor([_share(p, read) for p, read in zip(evidence.prompts, evidence.judged.read, strict=True)])


def _asked_count(evidence: Evidence) -> Tensor:
    return torch.tensor([float(len(prompt.asked)) for prompt in evidence.prompts])


def _letters(evidence: Evidence) -> Tensor:
    asked = [prompt.asked.get("letters") for prompt in evidence.prompts]
    read = [words.get("letters") for words in evidence.judged.read]
    return torch.tensor([float(wanted is not None and wanted == got) for wanted, got in zip(asked, read, strict=True)])


def _has_letters(evidence: Evidence) -> Tensor:
    return torch.tensor([float("letters" in prompt.asked) for prompt in evidence.prompts])


def _leaks(evidence: Evidence) -> list[dict[str, bool]]:
    return [
        metrics.leaked(prompt.asked, words, read)
        for prompt, words, read in zip(evidence.prompts, evidence.reference_words, evidence.judged.read, strict=True)
    ]


def _leaked_share(evidence: Evidence) -> Tensor:
    return torch.tensor([sum(each.values()) / max(len(each), 1) for each in _leaks(evidence)])


def _leak_count(evidence: Evidence) -> Tensor:
    return torch.tensor([float(len(each)) for each in _leaks(evidence)])


def _copy_paste(evidence: Evidence) -> Tensor:
    scores = metrics.copy_paste(evidence.judged.embeddings, evidence.real.truths.embeddings, evidence.references)
    return scores * evidence.judged.readable  # an unreadable picture copies nothing


TABLE: tuple[Metric, ...] = (
    Metric("prompt", "copy", _found_share, _asked_count),
    Metric("sim_gt", "other", lambda e: metrics.similarity(e.judged.embeddings, e.real.truths.embeddings)),
    Metric("sim_ref", "other", lambda e: metrics.similarity(e.judged.embeddings, e.references)),
    Metric("rank1", "other", lambda e: metrics.rank1(e.judged.embeddings, e.real.gallery.embeddings, e.cases.person)),
    Metric("copy_paste", "copy", _copy_paste, better="lower"),
    Metric("letters", "copy", _letters, _has_letters),
    Metric("leakage", "copy", _leaked_share, _leak_count, better="lower"),
)
METRICS = tuple(metric.name for metric in TABLE)
FLOORS = {metric.name: metric.floor for metric in TABLE}


def other_metrics(names: Sequence[str]) -> tuple[Metric, ...]:
    """Return similarity to the truth and rank-1 by further recognisers, as metrics sim_gt_NAME and rank1_NAME."""
    return tuple(Metric(f"{kind}_{name}", "other", score) for name in names for kind, score in _by(name).items())


def _by(name: str) -> dict[str, Callable[[Evidence], Tensor]]:
    return {
        "sim_gt": lambda e: metrics.similarity(e.judged.others[name], e.real.truths.others[name]),
        "rank1": lambda e: metrics.rank1(e.judged.others[name], e.real.gallery.others[name], e.cases.person),
    }


def score(cases: Cases, judged: Judged, real: JudgedReal, table: Sequence[Metric] = TABLE) -> dict[str, Tensor]:
    """Return each metric for every case, as (I, P); "prompt" is the share of the prompt's attributes that was found."""
    evidence = Evidence(cases, judged, real)
    return {metric.name: metric.score(evidence).view(cases.identities, -1) for metric in table}


def weights(cases: Cases, judged: Judged, real: JudgedReal, table: Sequence[Metric] = TABLE) -> dict[str, Tensor]:
    """Return how much each case counts in each metric, as (I, P); a metric that nothing counts in is left out."""
    evidence, one = Evidence(cases, judged, real), torch.ones(len(cases))
    found = {metric.name: one if metric.weight is None else metric.weight(evidence) for metric in table}
    return {name: values.view(cases.identities, -1) for name, values in found.items() if bool(values.any())}


def summarise(
    scores: Mapping[str, Mapping[str, Tensor]], counts: Mapping[str, Tensor], table: Sequence[Metric], seed: int
) -> dict[str, Any]:
    """Return `metrics` (the first row with ceiling and floor), `of_ceiling` and `rows` (every metric of every row)."""
    rows = {
        row: {name: summary(numbers[name], weight, seed) for name, weight in counts.items()}
        for row, numbers in scores.items()
    }
    main = next(iter(rows))
    headline = {
        metric.name: {
            **rows[main][metric.name], "ceiling": rows["ceiling"][metric.name]["value"],
            "floor": rows[metric.floor][metric.name]["value"],
        }
        for metric in table
        if metric.name in counts
    }  # fmt: skip
    shares = [name for name in OF_CEILING if name in headline]
    return {
        "metrics": headline,
        "of_ceiling": {name: headline[name]["value"] / max(headline[name]["ceiling"], 1e-9) for name in shares},
        "rows": rows,
    }


def summary(values: Tensor, weight: Tensor, seed: int) -> dict[str, float]:
    """Return the weighted mean with a bootstrap interval over people: values and weights (I, P)."""
    sums, totals = (values * weight).double().sum(1), weight.double().sum(1)
    low, high = metrics.bootstrap_ratio(sums, totals, seed)
    return {"value": float(sums.sum() / totals.sum().clamp(min=1e-12)), "low": low, "high": high}


def _share(prompt: Prompt, read: Mapping[str, str]) -> float:
    correct = metrics.found(prompt.asked, read)
    return sum(correct.values()) / len(correct)
