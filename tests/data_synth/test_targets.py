"""A wished distribution is met exactly for any number of targets, and the aims of a target depend only on itself."""

import itertools
from collections import Counter

import pytest
from pydantic import ValidationError

from data_synth.targets import DEFAULT_DISTRIBUTION, TargetSettings, aims, wished
from imagine.world.vocabulary import ATTRIBUTES

SETTINGS = TargetSettings(
    distribution={"expression": {"smiling": 0.5, "sad": 0.3, "angry": 0.2}, "gaze": {"left": 1, "ahead": 1, "right": 1}}
)


def counted(name: str, references: int, turns: int = 1, settings: TargetSettings = SETTINGS) -> Counter[str]:
    targets = itertools.product(range(references), range(turns))
    return Counter(aims(place, turn, references, settings)[name] for place, turn in targets)


@pytest.mark.parametrize(("references", "turns"), [(10, 1), (100, 1), (41, 30), (410, 3), (1, 20)])
def test_shares_that_divide_the_targets_are_met_exactly(references: int, turns: int) -> None:
    tenths = references * turns // 10
    assert counted("expression", references, turns) == {"smiling": 5 * tenths, "sad": 3 * tenths, "angry": 2 * tenths}


@pytest.mark.parametrize("references", [1, 2, 7, 99, 101, 255])
@pytest.mark.parametrize("turns", [1, 2, 3, 7])
def test_other_shares_are_met_within_one_target(references: int, turns: int) -> None:
    uneven = TargetSettings(distribution={"style": {"photo": 61, "pencil": 7, "comic": 1, "none": 0}, "one": {"a": 1}})
    for settings in (SETTINGS, uneven):
        for name, values in wished(settings).items():
            counts = counted(name, references, turns, settings)
            assert sum(counts.values()) == references * turns
            assert all(abs(counts[value] - share * references * turns) < 1 for value, share in values.items())


def test_aims_do_not_depend_on_the_order_of_calls() -> None:
    targets = list(itertools.product(range(130), range(3)))
    forwards = [aims(*target, 130, SETTINGS) for target in targets]
    backwards = [aims(*target, 130, TargetSettings(**SETTINGS.model_dump())) for target in reversed(targets)]
    assert forwards == backwards[::-1]
    assert list(forwards[0]) == ["expression", "gaze"]


def test_more_references_change_the_last_block_only() -> None:
    targets = list(itertools.product(range(250), range(2)))
    small, large = ([aims(*target, references, SETTINGS) for target in targets] for references in (250, 1000))
    changed = [place for (place, _), one, two in zip(targets, small, large, strict=True) if one != two]
    assert changed and min(changed) >= 198  # blocks of 100 for one attribute, of 99 for the other


@pytest.mark.parametrize("references", [1, 3, 40])
def test_references_with_many_turns_have_uncorrelated_attributes(references: int) -> None:
    even = TargetSettings(distribution={"gaze": {"left": 1, "right": 1}, "yaw": {"left": 1, "right": 1}})
    targets = [aims(place, turn, references, even) for place in range(references) for turn in range(400 // references)]
    equal = sum(one["gaze"] == one["yaw"] for one in targets)
    assert abs(equal - 200) < 60, "attributes with the same shares are not correlated"


def test_the_seed_shuffles_the_order_and_attributes_are_independent() -> None:
    other = SETTINGS.model_copy(update={"seed": 1})
    rows = [aims(place, 0, 900, SETTINGS) for place in range(900)]
    for changed in (
        [aims(place, 0, 900, other) for place in range(900)],
        [aims(n, 1, 900, SETTINGS) for n in range(900)],
    ):
        assert sum(one != two for one, two in zip(rows, changed, strict=True)) > 600
    joint = Counter((row["expression"], row["gaze"]) for row in rows)
    assert all(abs(joint["smiling", gaze] - 150) < 40 for gaze in ("left", "ahead", "right"))  # 4 standard deviations
    runs = sum(one["expression"] != two["expression"] for one, two in itertools.pairwise(rows))
    assert runs > 450  # a shuffled order has about 557, a sorted one 3


def test_a_share_of_zero_never_occurs() -> None:
    settings = TargetSettings(distribution={"scene": {"beach": 1, "space": 0}})
    assert counted("scene", 300, settings=settings) == {"beach": 300}
    assert aims(0, 0, 1, TargetSettings(distribution={})) == {}


def test_the_default_distribution_uses_the_vocabulary_of_the_world() -> None:
    assert all(set(values) <= set(ATTRIBUTES[name]) for name, values in DEFAULT_DISTRIBUTION.items())
    assert TargetSettings().distribution == DEFAULT_DISTRIBUTION
    assert all(sum(values.values()) == pytest.approx(1) for values in wished(TargetSettings()).values())


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ({}, "at least one share"),
        ({"a": -1, "b": 2}, "0 or more"),
        ({"a": 0}, "are 0"),
        ({"a": float("nan")}, "0 or more"),
        ({"a": 0.33333333, "b": 0.66666667}, "round them"),
    ],
)
def test_invalid_shares_are_refused(shares: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        TargetSettings(distribution={"gaze": shares})


@pytest.mark.parametrize(("place", "turn"), [(-1, 0), (10, 0), (0, -1)])
def test_a_target_out_of_range_is_refused(place: int, turn: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        aims(place, turn, 10, SETTINGS)
