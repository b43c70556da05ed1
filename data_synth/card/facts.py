"""The data card: what is in a finished build, what was thrown away, and for whom it works less well.

`make_card` reads the measured candidates once, in any order, and counts; only the pictures of a few stay in memory,
chosen by their keys. `card.page.write_card` puts card.json and card.html (one self-contained page) beside the
shards.

To which group a person belongs, such as a skin tone or an age, is known only if the import says it: the "groups" of a
reference's facts. The card never guesses it from a photo; where nobody says it, the card says "not known".
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
PEOPLE = ("skin tone", "age")  # groups that every card speaks of, known or not
POSE = ("expression", "yaw", "pitch", "roll", "gaze")
CARD_ATTRIBUTES = (*POSE, "scene", "light", "style", "framing", "clothes", "headwear", "held")
BINS = 50  # of similarity, from -1 to 1, and of difference, from 0 to 1
VERSION = 1  # of card.json

_LATER_STAGES = ("choice", "duplicates", "review")  # what was taken out there passed by itself
Item = TypeVar("Item")


class CardSettings(BaseModel):
    """How much is shown, and when a group is said to fall behind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: int = Field(default=24, ge=0)  # on the contact sheet
    examples: int = Field(default=3, ge=0)  # of each reason for a rejection
    least: int = Field(default=30, ge=2)  # people in a group, or candidates with one aim: of fewer nothing is said
    level: float = Field(default=0.01, gt=0, lt=1)  # of the test, before it is divided by the number of tests
    pass_rate: float = Field(default=0.05, ge=0)  # a smaller gap than this is not named, however sure it is
    similarity: float = Field(default=0.02, ge=0)


@dataclass(frozen=True)
class Card:
    """All that card.json says, and the cases whose pictures card.html shows."""

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
    """Count everything once. The same cases give the same card, in whatever order they come.

    cases: measured candidates, and targets that were lost before. others: rejections of what was never measured, from
    import to refinement. about: what cannot be counted, shown as it
    is: title, licence, seeds, model ids. wished: the distribution of the targets, as `targets.wished` gives it.
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
    """The groups that the import says a reference's person belongs to, and UNKNOWN for those of PEOPLE it does not."""
    stated = reference.facts.get("groups")
    known = {str(name): str(value) for name, value in stated.items()} if isinstance(stated, Mapping) else {}
    return {**dict.fromkeys(PEOPLE, UNKNOWN), **known}


# --- counting ---------------------------------------------------------------------------------------------------------
class _Tally:
    """What is counted of cases as they pass by."""

    def __init__(self, settings: CardSettings) -> None:
        self.settings = settings
        self.rejected: Counter[tuple[str, str]] = Counter()  # step and reason
        self.spec_keys: set[str] = set()
        self.num_candidates = 0
        self.kept = 0
        self.people: dict[str, _Person] = {}
        self.aims: dict[tuple[str, str], _Sums] = {}  # of candidates
        self.aim_counts: Counter[tuple[str, str]] = Counter()  # aims of asks, each ask once
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
        """Count a target that came to nothing."""
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
        """The content of card.json, in a fixed order."""
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
        """Attribute -> value -> share wished, how many asks and pairs ask for it, and how many pairs show it."""
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
        """Group -> value -> how many people, candidates, pairs and lost targets, and their means."""
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
    """The filter that took a candidate out, "" for none; people have reasons of their own."""
    if case.rejection is None:
        return ""
    return "review" if case.rejection.step == "review" else stage_of(case.rejection.reason)


@dataclass
class _Sums:
    """Sums over candidates; of squares too, for the tests."""

    candidates: int = 0
    passed: int = 0
    lost: int = 0  # targets without a candidate
    similarities: list[float] = field(default_factory=lambda: [0, 0.0, 0.0])  # how many, sum, sum of squares
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
        """What could have passed."""
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
    """One person's groups, and what was made of them."""

    groups: Mapping[str, str]
    sums: _Sums = field(default_factory=_Sums)
    pairs: int = 0


class _Histogram:
    """Counts by bin and by the filter that took a candidate out ("" for none of them)."""

    def __init__(self, low: float) -> None:
        self.low = low
        self.counts: dict[str | None, list[int]] = {}

    def add(self, value: float | None, stage: str | None) -> None:
        if value is None:
            return
        place = int((value - self.low) / (1 - self.low) * BINS)
        self.counts.setdefault(stage, [0] * BINS)[max(0, min(BINS - 1, place))] += 1

    def as_json(self) -> dict[str, Any]:
        """What there was before any filter, and what was left after each, in their order."""
        left = [sum(column) for column in zip(*self.counts.values(), strict=True)] or [0] * BINS
        table = {"before": left}
        for stage in STAGES:
            left = [a - b for a, b in zip(left, self.counts.get(stage, [0] * BINS), strict=True)]
            table[f"after {stage}"] = left
        return {"low": self.low, "high": 1.0, "counts": table}


class _Sample(Generic[Item]):
    """Some of many items, the same ones in whatever order they come: those whose keys' hashes are least."""

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


# --- who falls behind -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Mean:
    """Mean, variance of single values, and how many of them."""

    value: float
    variance: float
    count: int

    @staticmethod
    def of(values: list[float]) -> "_Mean":
        return _Mean(statistics.fmean(values), statistics.variance(values), len(values))


def _test_groups(
    groups: Mapping[tuple[str, str], list[_Person]], aims: Mapping[tuple[str, str], _Sums], settings: CardSettings
) -> dict[str, Any]:
    """Which groups of people, and which aims, fall clearly behind all others; and how that was found out.

    Each is compared with all the others of its kind (known skin tones with known skin tones) by Welch's one-sided test,
    on pass rate and on similarity. People are the units of their groups, each with the mean of their candidates,
    because the candidates of one person go together; of aims, candidates are the units.
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
    """Means and p, the chance of such a gap if there were none: by the normal distribution, as counts are large."""
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
        f"A group is named if it and the others have {settings.least} people or more (an aim: candidates), its mean "
        f"lies below the others' by {settings.pass_rate:g} of the pass rate or {settings.similarity:g} of the "
        f"similarity or more, and Welch's one-sided test gives p below {settings.level:g} divided by the number of "
        "tests. People count once, with the mean of their candidates. The pass rate is the share of candidates that "
        "pass the filters by themselves, the best try or not, before duplicates and reviewers; a target of which no "
        "candidate could be measured counts as one that did not."
    )
