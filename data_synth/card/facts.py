"""Compute the facts of the data card: what a build contains, what was rejected, and which groups have worse results.

`make_card` counts the measured candidates in one pass, in any order. It holds only a few pictures in memory, selected
by a hash of their keys. `card.page.write_card` writes card.json and card.html (one self-contained page) beside the
shards.

The groups of a person, such as skin tone or age, come only from the import: the "groups" of a reference's facts. The
card never guesses them from a photo; without that information it shows "not known".
"""

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from data_synth.filters import STAGES, stage_of
from data_synth.records import Case, LostTarget, Measures, Reference, Rejection, TargetSpec

UNKNOWN = "not known"
PEOPLE = ("skin tone", "age")  # groups that every card lists, even if they are not known
POSE = ("expression", "yaw", "pitch", "roll", "gaze")
CARD_ATTRIBUTES = (*POSE, "scene", "light", "style", "framing", "clothes", "headwear", "held")
BINS = 50  # of similarity, from -1 to 1, and of difference, from 0 to 1
VERSION = 1  # of card.json

_LATER_STAGES = ("choice", "duplicates", "review")  # a candidate rejected at these stages passed the filters on its own
Item = TypeVar("Item")


class CardSettings(BaseModel):
    """How many examples the card shows, and when it names a group as falling behind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: int = Field(default=24, ge=0)  # on the contact sheet
    examples: int = Field(default=3, ge=0)  # per reason of a rejection
    # minimum number of people in a group, or of candidates with one aim, for a test
    least: int = Field(default=30, ge=2)
    level: float = Field(default=0.01, gt=0, lt=1)  # significance level, before division by the number of tests
    # a smaller gap in the pass rate is not named, even if it is significant
    pass_rate: float = Field(default=0.05, ge=0)
    similarity: float = Field(default=0.02, ge=0)  # the same for the similarity


@dataclass(frozen=True)
class Card:
    """The content of card.json, and the cases whose pictures card.html shows."""

    facts: Mapping[str, Any]
    pairs: tuple[Case, ...] = field(repr=False)
    examples: Mapping[str, tuple[Case, ...]] = field(repr=False)  # by reason


def make_card(
    cases: Iterable[Case | LostTarget],
    others: Iterable[Rejection] = (),
    about: Mapping[str, Any] | None = None,
    wished: Mapping[str, Mapping[str, float]] | None = None,
    settings: CardSettings | None = None,
) -> Card:
    """Count everything in one pass and return the card, which does not depend on the order of the cases.

    cases: measured candidates, and targets without one. others: rejections before the measurement, from import to
    refinement. about: facts that are shown unchanged: title, licence, seeds, model ids. wished: the distribution of the
    targets, as returned by `targets.wished`.
    """
    settings = settings or CardSettings()
    tally = _Tally(settings)
    for case in cases:
        if isinstance(case, LostTarget):
            tally.add_lost_target(case)
        else:
            tally.add(case)
    for rejection in others:
        tally.rejected[rejection.step, rejection.reason] += 1
    return Card(tally.facts(about or {}, wished or {}), tuple(tally.pairs.items()), tally.examples_by_reason())


def groups_of(reference: Reference) -> dict[str, str]:
    """Return the groups that the import states for a reference's person, with UNKNOWN for missing ones of PEOPLE."""
    stated = reference.facts.get("groups")
    known = {str(name): str(value) for name, value in stated.items()} if isinstance(stated, Mapping) else {}
    return {**dict.fromkeys(PEOPLE, UNKNOWN), **known}


# --- counting ---------------------------------------------------------------------------------------------------------
class _Tally:
    """The counters of one pass over the cases."""

    def __init__(self, settings: CardSettings) -> None:
        self.settings = settings
        self.rejected: Counter[tuple[str, str]] = Counter()  # step and reason
        self.spec_keys: set[str] = set()
        self.num_candidates = 0
        self.kept = 0
        self.people: dict[str, _Person] = {}
        self.aims: dict[tuple[str, str], _Sums] = {}  # candidates by aim
        self.aim_counts: Counter[tuple[str, str]] = Counter()  # aims of target specifications, each specification once
        self.pair_aim_counts: Counter[tuple[str, str]] = Counter()  # aims of pairs
        self.pair_attribute_counts: Counter[tuple[str, str]] = Counter()  # attributes of pairs' targets
        self.histograms = {name: _Histogram(low) for name, low in (("similarity", -1.0), ("difference", 0.0))}
        self.rounds: dict[int, _Sums] = {}
        self.pairs: _Sample[Case] = _Sample(settings.pairs)
        self.examples: dict[str, _Sample[Case]] = {}

    def add(self, case: Case) -> None:
        self.num_candidates += 1
        stage = _stage(case)
        self._add_groups(case, stage in ("", *_LATER_STAGES))
        for name, histogram in self.histograms.items():
            histogram.add(getattr(case.measures, name), stage)
        if case.rejection is None:
            self._add_pair(case)
            return
        reason = case.rejection.reason
        self.rejected[case.rejection.step, reason] += 1
        self.examples.setdefault(reason, _Sample(self.settings.examples)).add(case.candidate.key, case)

    def add_lost_target(self, loss: LostTarget) -> None:
        """Count a target without a measured candidate."""
        self._person(loss.reference).sums.lost += 1
        if loss.spec is not None:
            self._add_spec(loss.spec)
            for aim in loss.spec.aims.items():
                self.aims.setdefault(aim, _Sums()).lost += 1

    def _add_groups(self, case: Case, passed: bool) -> None:
        self._person(case.reference).sums.add(case.measures, passed)
        self.rounds.setdefault(case.candidate.round, _Sums()).add(case.measures, passed)
        self._add_spec(case.spec)
        for aim in case.spec.aims.items():
            self.aims.setdefault(aim, _Sums()).add(case.measures, passed)

    def _person(self, reference: Reference) -> "_Person":
        return self.people.setdefault(reference.person or reference.key, _Person(groups_of(reference)))

    def _add_spec(self, spec: TargetSpec) -> None:
        if spec.key not in self.spec_keys:
            self.spec_keys.add(spec.key)
            self.aim_counts.update(spec.aims.items())

    def _add_pair(self, case: Case) -> None:
        self.kept += 1
        self.pair_aim_counts.update(case.spec.aims.items())
        self.people[case.reference.person or case.reference.key].pairs += 1
        names = dict.fromkeys((*CARD_ATTRIBUTES, *case.spec.aims))
        self.pair_attribute_counts.update((name, case.measures.attributes.get(name, UNKNOWN)) for name in names)
        self.pairs.add(case.candidate.key, case)

    def examples_by_reason(self) -> dict[str, tuple[Case, ...]]:
        return {reason: tuple(self.examples[reason].items()) for reason in sorted(self.examples)}

    def facts(self, about: Mapping[str, Any], wished: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Return the content of card.json, in a fixed order."""
        steps: dict[str, dict[str, int]] = {}
        for (step, reason), count in sorted(self.rejected.items()):
            steps.setdefault(step, {})[reason] = count
        tested = _test_groups(self._groups(), self._aims(), self.settings)
        return {
            "version": VERSION,
            "about": dict(about),
            "counts": {
                "people": len(self.people),
                "asks": len(self.spec_keys),
                "candidates": self.num_candidates,
                "pairs": self.kept,
            },
            "rejected": steps,
            "attributes": self._attributes(wished),
            "people": self._people(),
            "rounds": {str(number): self.rounds[number].as_json() for number in sorted(self.rounds)},
            "histograms": {name: histogram.as_json() for name, histogram in self.histograms.items()},
            "behind": tested,
            "examples": {
                reason: {case.candidate.key: case.rejection.detail for case in some if case.rejection}
                for reason, some in self.examples_by_reason().items()
            },
            "shown": [case.candidate.key for case in self.pairs.items()],
        }

    def _attributes(self, wished: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Return attribute -> value -> the wished share, and counts of targets and of pairs (see `_value_row`)."""
        names = dict.fromkeys(
            [*CARD_ATTRIBUTES, *wished, *sorted({name for name, _ in (*self.aim_counts, *self.pair_attribute_counts)})]
        )
        table: dict[str, Any] = {}
        for name in names:
            counted = {value for which, value in (*self.aim_counts, *self.pair_attribute_counts) if which == name}
            values = dict.fromkeys([*wished.get(name, {}), *sorted(counted - {UNKNOWN}), *sorted(counted & {UNKNOWN})])
            if values:
                table[name] = {value: self._value_row(name, value, wished) for value in values}
        return table

    def _value_row(self, name: str, value: str, wished: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Return the wished share, counts of targets and pairs that aim at the value, and of pairs that show it."""
        return {
            "wished": wished.get(name, {}).get(value),
            "asked": self.aim_counts[name, value],
            "asked_in_pairs": self.pair_aim_counts[name, value],
            "shown_in_pairs": self.pair_attribute_counts[name, value],
        }

    def _groups(self) -> dict[tuple[str, str], list["_Person"]]:
        groups: dict[tuple[str, str], list[_Person]] = {}
        for person in sorted(self.people):
            for group in self.people[person].groups.items():
                groups.setdefault(group, []).append(self.people[person])
        return dict(sorted(groups.items()))

    def _aims(self) -> dict[tuple[str, str], "_Sums"]:
        return dict(sorted(self.aims.items()))

    def _people(self) -> dict[str, Any]:
        """Return group -> value -> numbers of people, candidates, pairs and lost targets, and the means."""
        table: dict[str, Any] = {}
        for (name, value), people in self._groups().items():
            sums = _Sums.of([person.sums for person in people])
            pairs = sum(person.pairs for person in people)
            table.setdefault(name, {})[value] = {
                "people": len(people),
                "pairs": pairs,
                "lost": sums.lost,
                **sums.as_json(),
            }
        return table


def _stage(case: Case) -> str | None:
    """Return the filter that rejected a candidate, or "" for none; "review" has its own reasons."""
    if case.rejection is None:
        return ""
    return "review" if case.rejection.step == "review" else stage_of(case.rejection.reason)


@dataclass
class _Sums:
    """Sums over candidates, with sums of squares for the tests."""

    candidates: int = 0
    passed: int = 0
    lost: int = 0  # targets without a candidate
    similarities: list[float] = field(default_factory=lambda: [0, 0.0, 0.0])  # count, sum, sum of squares
    differences: list[float] = field(default_factory=lambda: [0, 0.0, 0.0])

    def add(self, measures: Measures, passed: bool) -> None:
        self.candidates += 1
        self.passed += passed
        for sums, value in ((self.similarities, measures.similarity), (self.differences, measures.difference)):
            if value is not None:
                sums[0] += 1
                sums[1] += value
                sums[2] += value * value

    @property
    def tried(self) -> int:
        """The number of candidates and lost targets, the denominator of the pass rate."""
        return self.candidates + self.lost

    @staticmethod
    def of(parts: Iterable["_Sums"]) -> "_Sums":
        whole = _Sums()
        for part in parts:
            whole.candidates += part.candidates
            whole.passed += part.passed
            whole.lost += part.lost
            for mine, theirs in ((whole.similarities, part.similarities), (whole.differences, part.differences)):
                mine[:] = [a + b for a, b in zip(mine, theirs, strict=True)]
        return whole

    def as_json(self) -> dict[str, Any]:
        return {
            "candidates": self.candidates,
            "pass_rate": _ratio(self.passed, self.tried),
            "similarity": _ratio(self.similarities[1], self.similarities[0]),
            "difference": _ratio(self.differences[1], self.differences[0]),
        }


@dataclass
class _Person:
    """One person's groups, candidates and pairs."""

    groups: Mapping[str, str]
    sums: _Sums = field(default_factory=_Sums)
    pairs: int = 0


class _Histogram:
    """Counts by bin and by the filter that rejected a candidate ("" for none)."""

    def __init__(self, low: float) -> None:
        self.low = low
        self.counts: dict[str | None, list[int]] = {}

    def add(self, value: float | None, stage: str | None) -> None:
        if value is None:
            return
        place = int((value - self.low) / (1 - self.low) * BINS)
        self.counts.setdefault(stage, [0] * BINS)[max(0, min(BINS - 1, place))] += 1

    def as_json(self) -> dict[str, Any]:
        """Return the counts before all filters and after each filter, in their order."""
        left = [sum(column) for column in zip(*self.counts.values(), strict=True)] or [0] * BINS
        table = {"before": left}
        for stage in STAGES:
            left = [a - b for a, b in zip(left, self.counts.get(stage, [0] * BINS), strict=True)]
            table[f"after {stage}"] = left
        return {"low": self.low, "high": 1.0, "counts": table}


class _Sample(Generic[Item]):
    """A sample that does not depend on the order of the items: those with the smallest hashes of their keys."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: dict[str, Item] = {}

    def add(self, key: str, item: Item) -> None:
        self.kept[hashlib.sha256(key.encode()).hexdigest()] = item
        if len(self.kept) > self.size:
            del self.kept[max(self.kept)]

    def items(self) -> list[Item]:
        return [self.kept[mark] for mark in sorted(self.kept)]


def _ratio(total: float, count: float) -> float | None:
    return round(total / count, 4) if count else None


# --- groups that fall behind ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Mean:
    """Mean, variance and number of values."""

    value: float
    variance: float
    count: int

    @staticmethod
    def of(values: list[float]) -> "_Mean":
        return _Mean(statistics.fmean(values), statistics.variance(values), len(values))


def _test_groups(
    groups: Mapping[tuple[str, str], list[_Person]], aims: Mapping[tuple[str, str], _Sums], settings: CardSettings
) -> dict[str, Any]:
    """Return the groups of people and the aims that fall significantly behind all others, and describe the method.

    Each is compared with all others of its kind (a known skin tone with the other known skin tones) by Welch's
    one-sided test, on pass rate and on similarity. For groups the samples are people, each with the mean of their
    candidates, because the candidates of one person are correlated. For aims the samples are candidates.
    """
    found, too_few = [], []
    for kind, table in (("people", _people_means(groups)), ("aims", _aim_means(aims))):
        for (name, value), means in table.items():
            line = {"kind": kind, "group": name, "value": value}
            tested = [
                _compare(what, *pair) for what, pair in means.items() if pair and _is_large_enough(pair, settings)
            ]
            found += [{**line, **one} for one in tested]
            too_few += [] if tested else [line]
    level = settings.level / max(len(found), 1)
    named = [
        line
        for line in found
        if line["p"] < level and line["others"] - line["mean"] >= getattr(settings, line["measure"])
    ]
    return {"named": named, "too_few": too_few, "tests": len(found), "how": _method_text(settings)}


def _is_large_enough(pair: tuple[_Mean, _Mean], settings: CardSettings) -> bool:
    return min(pair[0].count, pair[1].count) >= settings.least


Means = dict[str, "tuple[_Mean, _Mean] | None"]  # pass_rate, similarity: of the group and of the others


def _people_means(groups: Mapping[tuple[str, str], list[_Person]]) -> dict[tuple[str, str], Means]:
    table: dict[tuple[str, str], Means] = {}
    for name, value in groups:
        if value == UNKNOWN:
            continue
        others = [p for (n, v), people in groups.items() if n == name and v not in (value, UNKNOWN) for p in people]
        both = (groups[name, value], others)
        rates = [[p.sums.passed / p.sums.tried for p in people] for people in both]
        sums = [[person.sums.similarities for person in people] for people in both]
        likeness = [[total / count for count, total, _ in some if count] for some in sums]
        table[name, value] = {"pass_rate": _means(*rates), "similarity": _means(*likeness)}
    return table


def _means(one: list[float], two: list[float]) -> "tuple[_Mean, _Mean] | None":
    return (_Mean.of(one), _Mean.of(two)) if min(len(one), len(two)) > 1 else None


def _aim_means(aims: Mapping[tuple[str, str], _Sums]) -> dict[tuple[str, str], Means]:
    table: dict[tuple[str, str], Means] = {}
    for name, value in aims:
        both = aims[name, value], _Sums.of(sums for (n, v), sums in aims.items() if n == name and v != value)
        rates = [_mean_from_sums(s.tried, s.passed, s.passed) for s in both]
        likeness = [_mean_from_sums(*s.similarities) for s in both]
        table[name, value] = {
            "pass_rate": (rates[0], rates[1]) if rates[0] and rates[1] else None,
            "similarity": (likeness[0], likeness[1]) if likeness[0] and likeness[1] else None,
        }
    return table


def _mean_from_sums(count: float, total: float, squares: float) -> _Mean | None:
    if count < 2:
        return None
    mean = total / count
    return _Mean(mean, max(0.0, squares - count * mean * mean) / (count - 1), int(count))


def _compare(what: str, group: _Mean, others: _Mean) -> dict[str, Any]:
    """Return the means and the p-value of their gap, by the normal distribution, because the counts are large."""
    gap = others.value - group.value
    error = math.sqrt(group.variance / group.count + others.variance / others.count)
    p = 0.5 * math.erfc(gap / error / math.sqrt(2)) if error > 0 else float(gap <= 0)
    return {
        "measure": what,
        "mean": round(group.value, 4),
        "others": round(others.value, 4),
        "count": group.count,
        "p": float(f"{p:.3g}"),
    }


def _method_text(settings: CardSettings) -> str:
    return (
        f"A group is named if all of this holds: it and the others have at least {settings.least} people each (for an "
        f"aim: candidates); its mean pass rate is at least {settings.pass_rate:g} lower, or its mean similarity at "
        f"least {settings.similarity:g} lower; and Welch's one-sided test gives p below {settings.level:g} divided by "
        "the number of tests. Each person counts once, with the mean of their candidates. The pass rate is the share "
        "of candidates that pass the filters on their own, before the choice of the best candidate, duplicates and "
        "reviews. A target without a measured candidate counts as a candidate that failed."
    )
