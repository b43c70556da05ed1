"""Measure the agreement of reviewers: the share of equal verdicts, and kappas, which correct for chance agreement."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean


@dataclass(frozen=True)
class ReviewerPair:
    """The agreement of two reviewers on the pairs that both have judged."""

    first: str
    second: str
    num_pairs: int  # judged by both, at least 1
    share: float  # of these, those with equal verdicts
    kappa: float | None  # Cohen's; None if undefined: both always gave the same single verdict


@dataclass(frozen=True)
class Agreement:
    """The agreement of all reviewers on the pairs that at least two have judged."""

    num_pairs: int
    share: float | None  # of two opinions on one pair, how often they are equal, averaged over pairs; None without any
    kappa: float | None  # Fleiss'; None if undefined: only one verdict was ever given
    reviewers: tuple[ReviewerPair, ...]  # every two reviewers with a pair in common


def agreement(opinions: Sequence[Mapping[str, str]]) -> Agreement:
    """Return the agreement over items, each given as {reviewer: verdict}; items with fewer than two are ignored."""
    several = [item for item in opinions if len(item) > 1]
    ratings = [list(item.values()) for item in several]
    share = fmean(_equal_share(item) for item in ratings) if ratings else None
    reviewer_pairs = Counter(two for item in several for two in combinations(sorted(item), 2))
    return Agreement(
        len(several), share, fleiss(ratings), tuple(_compare_reviewers(several, *two) for two in sorted(reviewer_pairs))
    )


def cohen(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Return Cohen's kappa (1960) of two raters' verdicts on the same items, or None if the chance agreement is 1."""
    observed = fmean(a == b for a, b in zip(first, second, strict=True))
    counts, others = Counter(first), Counter(second)
    chance = sum(counts[verdict] * others[verdict] for verdict in counts) / len(first) ** 2
    return None if chance == 1 else (observed - chance) / (1 - chance)


def fleiss(ratings: Sequence[Sequence[str]]) -> float | None:
    """Return Fleiss' kappa (1971) of two or more verdicts per item, by any raters.

    It is None if only one verdict was ever given. Items have equal weight, even with different numbers of verdicts.
    """
    if not ratings:
        return None
    verdicts = {verdict for item in ratings for verdict in item}
    if len(verdicts) == 1:
        return None
    observed = fmean(_equal_share(item) for item in ratings)
    shares = [fmean(item.count(verdict) / len(item) for item in ratings) for verdict in verdicts]
    chance = sum(share**2 for share in shares)
    return (observed - chance) / (1 - chance)


def _equal_share(verdicts: Sequence[str]) -> float:
    """Return the share of equal pairs among these verdicts (at least two)."""
    equal = sum(count * (count - 1) for count in Counter(verdicts).values())
    return equal / (len(verdicts) * (len(verdicts) - 1))


def _compare_reviewers(opinions: Sequence[Mapping[str, str]], first: str, second: str) -> ReviewerPair:
    both = [item for item in opinions if first in item and second in item]
    verdicts = [item[first] for item in both], [item[second] for item in both]
    share = fmean(a == b for a, b in zip(*verdicts, strict=True))
    return ReviewerPair(first, second, len(both), share, cohen(*verdicts))
