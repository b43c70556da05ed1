"""Compute, print and plot the funnel of a build.

The funnel counts the targets that remain after each step and each filter, the reasons of all rejections, and the effect
of each round of refinement. A target counts as far as its best candidate got. The funnel is written as funnel.json and
funnel.png, and printed.
"""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from data_synth.filters import STAGES, stage_of
from data_synth.records import Case, Measures, Rejection
from data_synth.verdicts import Verdict

_STEPS = {"captioned": "caption", "rewritten": "rewrite", "drawn and measured": "generate"}
_BAR, _ROW, _LABEL, _NUMBER = 520, 26, 210, 150  # pixels of funnel.png


@dataclass
class Funnel:
    """The counters of a build."""

    photos: int = 0  # found by the import
    references: int = 0
    targets: int = 0
    # (step, reason) of deferred targets
    deferred_reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    # the sentence of the first deferred target, by (step, reason)
    example_details: dict[tuple[str, str], str] = field(default_factory=dict)
    reached: Counter[str] = field(default_factory=Counter)  # targets that passed, by step or filter
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)  # (step, reason) of all rejections
    refined: dict[int, "_RefinementEffect"] = field(default_factory=dict)  # by round
    measured: "_Means" = field(default_factory=lambda: _Means())  # all candidates
    kept: "_Means" = field(default_factory=lambda: _Means())  # pairs
    seen: set[str] = field(default_factory=set)  # keys of rejections that several targets share

    @property
    def deferred(self) -> int:
        """The number of targets deferred to the next run."""
        return self.deferred_reasons.total()

    def watch(self, verdicts: Iterable[Verdict]) -> Iterator[Verdict]:
        """Count verdicts and yield them unchanged."""
        for verdict in verdicts:
            self.add(verdict)
            yield verdict

    def add(self, verdict: Verdict) -> None:
        """Count one target."""
        self.targets += 1
        if (deferred := verdict.outcome.deferred) is not None:
            self.deferred_reasons[deferred.step, deferred.reason] += 1
            self.example_details.setdefault((deferred.step, deferred.reason), deferred.detail)
        for name in _passed_steps(verdict):
            self.reached[name] += 1
        for rejection in verdict.rejections:
            self.reject(rejection)
        for case in verdict.cases:
            self.measured.add(case.measures)
        if verdict.pair is not None:
            self.kept.add(verdict.pair.measures)
        for before, after in pairwise(verdict.cases):
            if after.candidate.round == before.candidate.round + 1:
                self.refined.setdefault(after.candidate.round, _RefinementEffect()).add(before, after)

    def reject(self, rejection: Rejection) -> None:
        """Count a rejection; one of the import or the captioner counts once, because a reference's targets share it."""
        if rejection.step in ("caption", "import"):
            if rejection.key in self.seen:
                return
            self.seen.add(rejection.key)
        self.reasons[rejection.step, rejection.reason] += 1

    def rows(self) -> list[tuple[str, int]]:
        """Return the rows of the funnel, from top to bottom."""
        rows = [("photos found", self.photos), ("references", self.references), ("targets asked for", self.targets)]
        rows += [(name, self.reached[name]) for name in _STEPS]
        rows += [(f"filter: {name}", self.reached[name]) for name in STAGES if name != "choice"]
        return [*rows, ("pairs", self.kept.count)]

    def as_json(self) -> dict[str, Any]:
        """Return the content of funnel.json."""
        return {
            "rows": [{"name": name, "count": count} for name, count in self.rows()],
            "rejected": _by_step(self.reasons),
            "parked": _by_step(self.deferred_reasons),
            "rounds": {str(number): self.refined[number].as_json() for number in sorted(self.refined)},
            "candidates": self.measured.as_json(),
            "pairs": self.kept.as_json(),
        }


@dataclass
class _Means:
    """Mean similarity and difference of some candidates."""

    count: int = 0
    sums: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, measures: Measures) -> None:
        self.count += 1
        for name in ("similarity", "difference"):
            value = getattr(measures, name)
            if value is not None:
                self.sums[name] += value
                self.counts[name] += 1

    def as_json(self) -> dict[str, Any]:
        means = {name: round(self.sums[name] / count, 4) for name, count in sorted(self.counts.items())}
        return {"count": self.count, **means}


@dataclass
class _RefinementEffect:
    """The effect of one round of refinement on the candidates that it was applied to."""

    before: _Means = field(default_factory=_Means)
    after: _Means = field(default_factory=_Means)
    better: int = 0  # candidates that became more similar to the reference

    def add(self, before: Case, after: Case) -> None:
        self.before.add(before.measures)
        self.after.add(after.measures)
        one, two = before.measures.similarity, after.measures.similarity
        self.better += one is not None and two is not None and two > one

    def as_json(self) -> dict[str, Any]:
        return {"before": self.before.as_json(), "after": self.after.as_json(), "better": self.better}


def _by_step(counted: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Return step -> reason -> count."""
    table: dict[str, dict[str, int]] = {}
    for (step, reason), count in sorted(counted.items()):
        table.setdefault(step, {})[reason] = count
    return table


def _passed_steps(verdict: Verdict) -> list[str]:
    """Return the steps and filters that a target's best candidate passed."""
    lost = {rejection.step for rejection in verdict.outcome.losses}
    if verdict.outcome.deferred is not None:
        lost.add(verdict.outcome.deferred.step)
    steps = list(_STEPS)
    if not verdict.cases:
        order = ["import", "caption", "rewrite", "generate", "refine", "measure"]
        first = min((order.index(step) for step in lost if step in order), default=0)
        return [name for name, step in _STEPS.items() if order.index(step) < first and step != "generate"]
    stages = list(STAGES)
    return steps + stages[: max(_failed_stage(case, stages) for case in verdict.cases)]


def _failed_stage(case: Case, stages: Sequence[str]) -> int:
    """Return the index of the filter that a candidate did not pass, or the number of filters for a pair."""
    if case.rejection is None:
        return len(stages)
    return stages.index("review" if case.rejection.step == "review" else stage_of(case.rejection.reason) or "measured")


# --- printing and plotting --------------------------------------------------------------------------------------------
def print_funnel(funnel: Funnel, console: Console) -> None:
    """Print the funnel, the reasons of rejections and deferrals, and the effect of each round of refinement."""
    rows = funnel.rows()
    most = max(count for _, count in rows) or 1
    table = Table(title="Funnel", title_justify="left", box=None, show_header=False)
    for name, count in rows:
        table.add_row(name, f"{count:,}", "█" * round(40 * count / most))
    console.print(table)
    if funnel.reasons:
        table = Table(title="Rejected", title_justify="left", box=None, show_header=False)
        for (step, reason), count in funnel.reasons.most_common():
            table.add_row(step, reason, f"{count:,}")
        console.print(table)
    for number, effect in sorted(funnel.refined.items()):
        before, after = effect.before.as_json(), effect.after.as_json()
        console.print(
            f"Round {number} of refinement: {effect.before.count} candidates, similarity {before.get('similarity')} -> "
            f"{after.get('similarity')}, difference {before.get('difference')} -> {after.get('difference')}"
        )
    if funnel.deferred:
        console.print(
            f"{funnel.deferred:,} targets are deferred (parked.jsonl): run the same command again to retry them."
        )
        table = Table(title="Deferred", title_justify="left", box=None, show_header=False)
        for (step, reason), count in funnel.deferred_reasons.most_common():
            table.add_row(step, reason, f"{count:,}", f"for example: {funnel.example_details[step, reason]}")
        console.print(table)


def plot(funnel: Funnel) -> bytes:
    """Draw the funnel and return it as a PNG file."""
    rows = funnel.rows()
    image = Image.new("RGB", (_LABEL + _BAR + _NUMBER, _ROW * len(rows) + 20), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    most = max(count for _, count in rows) or 1
    for place, (name, count) in enumerate(rows):
        y = 10 + place * _ROW
        draw.text((10, y + 3), name, fill="black", font=font)
        width = round(_BAR * count / most)
        draw.rectangle((_LABEL, y, _LABEL + max(width, 1), y + _ROW - 6), fill=_colour(name))
        draw.text((_LABEL + width + 8, y + 3), f"{count:,} {_share(rows, place)}", fill="black", font=font)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _colour(name: str) -> str:
    return "#b36b2c" if name.startswith("filter") else "#2c7a4b" if name == "pairs" else "#3b6ea5"


def _share(rows: Sequence[tuple[str, int]], place: int) -> str:
    """Return the remaining share of the targets in per cent, or "" for the rows above the targets."""
    targets = dict(rows)["targets asked for"]
    return f"({rows[place][1] / targets:.0%})" if place > 2 and targets else ""
