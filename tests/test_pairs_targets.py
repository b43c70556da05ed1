"""A wished distribution is met exactly, whatever the number of asks, and each ask knows its aims by itself."""

import itertools
from collections import Counter

import pytest
from pydantic import ValidationError

from data_synth.targets import EVEN, TargetSettings, aims, wished
from imagine.world.vocabulary import ATTRIBUTES

SETTINGS = TargetSettings(
    distribution={"expression": {"smiling": 0.5, "sad": 0.3, "angry": 0.2}, "gaze": {"left": 1, "ahead": 1, "right": 1}}
)


def counted(name: str, total: int, settings: TargetSettings = SETTINGS) -> Counter[str]:
    return Counter(aims(number, total, settings)[name] for number in range(total))


@pytest.mark.parametrize("total", [10, 100, 700, 1230])
def test_whole_shares_are_met_exactly(total: int) -> None:
    assert counted("expression", total) == {
        "smiling": total * 5 // 10,
        "sad": total * 3 // 10,
        "angry": total * 2 // 10,
    }


@pytest.mark.parametrize("total", [1, 2, 7, 99, 101, 255, 1001])
def test_other_shares_are_met_to_less_than_one(total: int) -> None:
    shares = wished(SETTINGS)
    for name, values in shares.items():
        counts = counted(name, total)
        assert sum(counts.values()) == total
        assert all(abs(counts[value] - share * total) < 1 for value, share in values.items())


def test_an_ask_knows_its_aims_by_itself() -> None:
    forwards = [aims(number, 250, SETTINGS) for number in range(250)]
    backwards = [aims(number, 250, TargetSettings(**SETTINGS.model_dump())) for number in reversed(range(250))]
    assert forwards == backwards[::-1]
    assert list(forwards[0]) == ["expression", "gaze"]


def test_a_growing_build_changes_its_last_block_only() -> None:
    small, large = ([aims(number, total, SETTINGS) for number in range(250)] for total in (250, 1000))
    changed = [number for number in range(250) if small[number] != large[number]]
    assert changed
    assert min(changed) >= 200


def test_the_order_is_shuffled_by_the_seed_and_attributes_are_dealt_apart() -> None:
    other = SETTINGS.model_copy(update={"seed": 1})
    rows = [aims(number, 900, SETTINGS) for number in range(900)]
    assert rows != [aims(number, 900, other) for number in range(900)]
    together = Counter((row["expression"], row["gaze"]) for row in rows)
    assert all(abs(together["smiling", gaze] - 150) < 40 for gaze in ("left", "ahead", "right"))  # 4 deviations
    runs = sum(one["expression"] != two["expression"] for one, two in itertools.pairwise(rows))
    assert runs > 450  # 557 are expected of a shuffled order, 3 of a sorted one


def test_a_share_of_nothing_is_never_asked_for() -> None:
    settings = TargetSettings(distribution={"scene": {"beach": 1, "space": 0}})
    assert counted("scene", 300, settings) == {"beach": 300}
    assert aims(0, 1, TargetSettings(distribution={})) == {}


def test_the_usual_distribution_speaks_the_words_of_the_world() -> None:
    assert all(set(values) <= set(ATTRIBUTES[name]) for name, values in EVEN.items())
    assert TargetSettings().distribution == EVEN
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


@pytest.mark.parametrize("number", [-1, 10])
def test_an_ask_beyond_the_build_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        aims(number, 10, SETTINGS)
