"""From measured candidates to pairs: filters, the choice among tries, duplicates across the build, and reviewers.

Nothing here is kept: it follows from what the store holds and from the settings, so that another threshold only means
reading again.
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
    """What became of one story."""

    outcome: Outcome
    cases: tuple[Case, ...] = ()  # its measured candidates, of which at most one has no rejection
    pair: Pair | None = None  # that one; its prompt may be a reviewer's

    @property
    def rejections(self) -> list[Rejection]:
        """Of what was never measured, then of candidates."""
        return [*self.outcome.losses, *(case.rejection for case in self.cases if case.rejection is not None)]


def verdict(outcome: Outcome, filters: FilterSettings) -> Verdict:
    """What a story's tries are worth by themselves: the best of those that pass the filters is a pair.

    A story that is parked is worth nothing yet.
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
    """The same, with pairs whose targets are too close to another's rejected."""
    for one in verdicts:
        yield _rejected(one, duplicates[one.pair.target.key]) if one.pair and one.pair.target.key in duplicates else one


def reviewed(verdicts: Iterable[Verdict], decided: Mapping[str, Decision], required: bool) -> Iterator[Verdict]:
    """The same, as reviewers left them; `required`: what nobody decided on is held back."""
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
    """A pair whose prompt was fixed keeps no other captions of its target: they may be wrong in the same way."""
    if review_result.spec.prompt == pair.spec.prompt:
        return review_result
    facts = {name: value for name, value in review_result.target.facts.items() if name != "captions"}
    return replace(review_result, target=replace(review_result.target, facts=facts))


def _rejected(one: Verdict, reason: Rejection) -> Verdict:
    cases = tuple(replace(case, rejection=reason) if case.rejection is None else case for case in one.cases)
    return replace(one, cases=cases, pair=None)
