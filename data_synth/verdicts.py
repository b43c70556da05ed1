"""Decide which measured candidates become pairs: filters, the best candidate of a target, duplicates, and reviews.

Verdicts are not stored. They are derived from the store and the settings, so a changed threshold only needs another
pass over the store.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from data_synth.filters import FilterSettings, best, rejection
from data_synth.records import Case, Pair, Rejection
from data_synth.review.decisions import Decision, judged
from data_synth.steps import Outcome

UNDECIDED = "waits for a reviewer"


@dataclass(frozen=True)
class Verdict:
    """The verdict on one target."""

    outcome: Outcome
    cases: tuple[Case, ...] = ()  # its measured candidates; at most one has no rejection
    pair: Pair | None = None  # from the case without a rejection; a reviewer may have changed its prompt

    @property
    def rejections(self) -> list[Rejection]:
        """The rejections before measurement, then those of candidates."""
        return [*self.outcome.losses, *(case.rejection for case in self.cases if case.rejection is not None)]


def verdict(outcome: Outcome, filters: FilterSettings) -> Verdict:
    """Judge the candidates of one target on their own: the best of those that pass the filters becomes a pair.

    A deferred target has no cases and no pair yet.
    """
    if outcome.deferred is not None or outcome.reference is None or outcome.spec is None:
        return Verdict(outcome)
    candidate_rejections = [rejection(candidate.key, measures, filters) for candidate, measures in outcome.tries]
    passed = [number for number, one in enumerate(candidate_rejections) if one is None]
    pair = None
    if passed:
        kept, others = best([outcome.tries[number] for number in passed])
        by_key = {one.key: one for one in others}
        candidate_rejections = [
            one or by_key.get(outcome.tries[number][0].key) for number, one in enumerate(candidate_rejections)
        ]
        pair = Pair(outcome.reference, outcome.spec, *outcome.tries[passed[kept]])
    cases = (
        Case(outcome.reference, outcome.spec, candidate, measures, one)
        for (candidate, measures), one in zip(outcome.tries, candidate_rejections, strict=True)
    )
    return Verdict(outcome, tuple(cases), pair)


def without_duplicates(verdicts: Iterable[Verdict], duplicates: Mapping[str, Rejection]) -> Iterator[Verdict]:
    """Yield the verdicts, with pairs rejected whose targets are near-duplicates of another target."""
    for one in verdicts:
        yield _rejected(one, duplicates[one.pair.target.key]) if one.pair and one.pair.target.key in duplicates else one


def reviewed(verdicts: Iterable[Verdict], decided: Mapping[str, Decision], required: bool) -> Iterator[Verdict]:
    """Yield the verdicts with the reviewers' decisions applied; `required`: reject pairs without a decision."""
    for one in verdicts:
        if one.pair is None:
            yield one
            continue
        review_result = judged(one.pair, decided)
        if review_result is None and required:
            review_result = Rejection(one.pair.target.key, "review", UNDECIDED)
        if isinstance(review_result, Rejection):
            yield _rejected(one, review_result)
        else:
            yield one if review_result is None else replace(one, pair=_without_old_captions(one.pair, review_result))


def _without_old_captions(pair: Pair, review_result: Pair) -> Pair:
    """Remove the target's other captions if a reviewer fixed the prompt, because they may contain the same error."""
    if review_result.spec.prompt == pair.spec.prompt:
        return review_result
    facts = {name: value for name, value in review_result.target.facts.items() if name != "captions"}
    return replace(review_result, target=replace(review_result.target, facts=facts))


def _rejected(one: Verdict, reason: Rejection) -> Verdict:
    cases = tuple(replace(case, rejection=reason) if case.rejection is None else case for case in one.cases)
    return replace(one, cases=cases, pair=None)
