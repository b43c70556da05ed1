"""A wished distribution is met exactly, whatever the number of asks, and each ask knows its aims by itself."""

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
    asks = itertools.product(range(references), range(turns))
    return Counter(aims(place, turn, references, settings)[name] for place, turn in asks)


@pytest.mark.parametrize(("references", "turns"), [(10, 1), (100, 1), (41, 30), (410, 3), (1, 20)])
def test_whole_shares_are_met_exactly(references: int, turns: int) -> None:
    tenths = references * turns // 10
    assert counted("expression", references, turns) == {"smiling": 5 * tenths, "sad": 3 * tenths, "angry": 2 * tenths}


@pytest.mark.parametrize("references", [1, 2, 7, 99, 101, 255])
@pytest.mark.parametrize("turns", [1, 2, 3, 7])
def test_other_shares_are_met_to_less_than_one(references: int, turns: int) -> None:
    uneven = TargetSettings(distribution={"style": {"photo": 61, "pencil": 7, "comic": 1, "none": 0}, "one": {"a": 1}})
    for settings in (SETTINGS, uneven):
        for name, values in wished(settings).items():
            counts = counted(name, references, turns, settings)
            assert sum(counts.values()) == references * turns
            assert all(abs(counts[value] - share * references * turns) < 1 for value, share in values.items())


def test_an_ask_knows_its_aims_by_itself() -> None:
    asks = list(itertools.product(range(130), range(3)))
    forwards = [aims(*ask, 130, SETTINGS) for ask in asks]
    backwards = [aims(*ask, 130, TargetSettings(**SETTINGS.model_dump())) for ask in reversed(asks)]
    assert forwards == backwards[::-1]
    assert list(forwards[0]) == ["expression", "gaze"]


def test_more_references_change_the_last_block_only() -> None:
    asks = list(itertools.product(range(250), range(2)))
    small, large = ([aims(*ask, references, SETTINGS) for ask in asks] for references in (250, 1000))
    changed = [place for (place, _), one, two in zip(asks, small, large, strict=True) if one != two]
    assert changed and min(changed) >= 198  # blocks of 100 for one attribute, of 99 for the other


@pytest.mark.parametrize("references", [1, 3, 40])
def test_references_with_many_turns_are_not_alike(references: int) -> None:
    even = TargetSettings(distribution={"gaze": {"left": 1, "right": 1}, "yaw": {"left": 1, "right": 1}})
    asks = [aims(place, turn, references, even) for place in range(references) for turn in range(400 // references)]
    together = sum(one["gaze"] == one["yaw"] for one in asks)
    assert abs(together - 200) < 60, "attributes with the same shares do not go hand in hand"


def test_the_order_is_shuffled_by_the_seed_and_attributes_are_dealt_apart() -> None:
    other = SETTINGS.model_copy(update={"seed": 1})
    rows = [aims(place, 0, 900, SETTINGS) for place in range(900)]
    for changed in (
        [aims(place, 0, 900, other) for place in range(900)],
        [aims(n, 1, 900, SETTINGS) for n in range(900)],
    ):
        assert sum(one != two for one, two in zip(rows, changed, strict=True)) > 600
    together = Counter((row["expression"], row["gaze"]) for row in rows)
    assert all(abs(together["smiling", gaze] - 150) < 40 for gaze in ("left", "ahead", "right"))  # 4 deviations
    runs = sum(one["expression"] != two["expression"] for one, two in itertools.pairwise(rows))
    assert runs > 450  # 557 are expected of a shuffled order, 3 of a sorted one


def test_a_share_of_nothing_is_never_asked_for() -> None:
    settings = TargetSettings(distribution={"scene": {"beach": 1, "space": 0}})
    assert counted("scene", 300, settings=settings) == {"beach": 300}
    assert aims(0, 0, 1, TargetSettings(distribution={})) == {}


def test_the_usual_distribution_speaks_the_words_of_the_world() -> None:
    assert all(set(values) <= set(ATTRIBUTES[name]) for name, values in DEFAULT_DISTRIBUTION.items())
    assert TargetSettings().distribution == DEFAULT_DISTRIBUTION
    assert all(sum(values.values()) == pytest.approx(1) for values in wished(TargetSettings()).values())


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({}, "at least one"),
        ({"a": -1, "b": 2}, "0 or more"),
        ({"a": 0}, "are 0"),
        ({"a": float("nan")}, "0 or more"),
        ({"a": 0.33333333, "b": 0.66666667}, "round them"),
    ],
)
def test_shares_that_cannot_be_dealt_are_refused(shares: dict[str, float], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TargetSettings(distribution={"gaze": shares})


@pytest.mark.parametrize(("place", "turn"), [(-1, 0), (10, 0), (0, -1)])
def test_an_ask_beyond_the_build_is_refused(place: int, turn: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        aims(place, turn, 10, SETTINGS)
