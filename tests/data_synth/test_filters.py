"""Each filter rejects exactly what it should, and near-duplicates do not depend on the order."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from data_synth.filters import (
    STAGES,
    FilterSettings,
    best,
    duplicate_rejections,
    near_duplicates,
    rejection,
    stage_of,
)
from data_synth.records import Candidate, Measures

GOOD = Measures(1, similarity=0.7, difference=0.5, quality=0.9, sharpness=0.01, text=0.0, picture_hash="0" * 16)
SETTINGS = FilterSettings(similarity=(0.5, 0.9))


def reason(measures: Measures, settings: FilterSettings = SETTINGS) -> str | None:
    found = rejection("key", measures, settings)
    assert found is None or (found.key, found.step) == ("key", "filter")
    return None if found is None else found.reason


def test_a_good_candidate_passes() -> None:
    assert reason(GOOD) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"faces": 0}, "too few faces"),
        ({"faces": 2}, "too many faces"),
        ({"similarity": 0.4999}, "too unlike the reference"),
        ({"similarity": 0.5}, None),
        ({"similarity": 0.9}, None),
        ({"similarity": 0.9001}, "too like the reference"),
        ({"difference": 0.1}, "pose and expression as in the reference"),
        ({"difference": 0.2}, None),
        ({"quality": 0.2}, "poor quality"),
        ({"sharpness": 4e-4}, "blurred"),
        ({"text": 0.02}, "writing nobody asked for"),
        ({"text": None}, None),
        ({"similarity": None}, "a number that could not be measured"),
        ({"sharpness": None}, "a number that could not be measured"),
        ({"faces": 0, "similarity": None, "sharpness": None}, "too few faces"),
        ({"similarity": 0.1, "quality": 0.0}, "too unlike the reference"),
    ],
)
def test_the_first_failure_is_the_reason(change: dict[str, float | None], expected: str | None) -> None:
    assert reason(replace(GOOD, **change)) == expected  # type: ignore[arg-type]


def test_none_switches_a_filter_off() -> None:
    off = FilterSettings(faces=None, similarity=None, difference=None, quality=None, sharpness=None, text=None)
    assert reason(Measures(0, text=1.0), off) is None


def test_the_detail_names_both_numbers() -> None:
    found = rejection("key", replace(GOOD, similarity=0.31), SETTINGS)
    assert found is not None
    assert "0.310" in found.detail
    assert "0.5" in found.detail


def test_every_reason_belongs_to_one_stage() -> None:
    reasons = [one for some in STAGES.values() for one in some]
    assert len(reasons) == len(set(reasons))
    assert all(stage_of(one) == name for name, some in STAGES.items() for one in some)
    assert stage_of("no caption") is None


@pytest.mark.parametrize("band", [(0.9, 0.5), (-2, 0.5), (0.5, 1.5)])
def test_an_invalid_similarity_range_is_refused(band: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="is not a valid range"):
        FilterSettings(similarity=band)


# --- choosing among candidates ----------------------------------------------------------------------------------------
def tries(*numbers: tuple[float | None, float | None]) -> list[tuple[Candidate, Measures]]:
    return [
        (Candidate(f"a-0-{n}-0", "a-0", b"", attempt=n), Measures(1, similarity=s, difference=d))
        for n, (s, d) in enumerate(numbers)
    ]


def test_the_most_similar_candidate_is_chosen_in_any_order() -> None:
    some = tries((0.5, 0.9), (0.8, 0.1), (0.7, 0.9), (None, 0.9))
    for order in itertools.permutations(some):
        kept, others = best(order)
        assert order[kept][0].key == "a-0-1-0"
        assert sorted(one.key for one in others) == ["a-0-0-0", "a-0-2-0", "a-0-3-0"]
        assert {one.reason for one in others} == {"another try is better"}


def test_ties_in_similarity_go_to_the_larger_difference() -> None:
    assert best(tries((0.5, 0.2), (0.5, 0.4)))[0] == 1
    assert best(tries((0.5, 0.4), (0.5, 0.4)))[0] == 0
    with pytest.raises(ValueError, match="no candidate to choose from"):
        best([])


# --- near-duplicates --------------------------------------------------------------------------------------------------
def hashes(count: int, seed: int = 0, neighbours: int = 0, apart: int = 3, chains: bool = True) -> dict[str, str]:
    """Return random hashes; the last `neighbours` differ in a few bits from an earlier one (chains: from any)."""
    random = np.random.default_rng(seed)
    values = [int(value) for value in random.integers(0, 1 << 63, count, dtype=np.int64)]
    for place in range(count - neighbours, count):
        bits = random.choice(64, int(random.integers(0, apart + 1)), replace=False).tolist()
        values[place] = values[int(random.integers(0, place if chains else count - neighbours))] ^ sum(
            1 << bit for bit in bits
        )
    return {f"{place:06d}": f"{value:016x}" for place, value in enumerate(values)}


def compared_with_all(table: dict[str, str], distance: int) -> dict[str, str]:
    kept: list[str] = []
    found = {}
    for key in sorted(table):
        near = [one for one in kept if (int(table[one], 16) ^ int(table[key], 16)).bit_count() <= distance]
        if near:
            found[key] = near[0]
        else:
            kept.append(key)
    return found


@pytest.mark.parametrize("distance", [0, 1, 3, 7, 10])
def test_near_duplicates_equal_a_comparison_of_all_pairs(distance: int) -> None:
    table = hashes(400, seed=distance, neighbours=200, apart=distance + 2)
    expected = compared_with_all(table, distance)
    found = near_duplicates(table, distance)
    assert set(found) == set(expected)
    assert len(found) > 50
    assert all((int(table[key], 16) ^ int(table[stays], 16)).bit_count() <= distance for key, stays in found.items())
    assert not set(found) & set(found.values())


def test_near_duplicates_do_not_depend_on_order() -> None:
    table = hashes(300, neighbours=150)
    shuffled = dict(sorted(table.items(), key=lambda item: item[1]))
    assert list(shuffled) != list(table)
    assert near_duplicates(shuffled, 3) == near_duplicates(table, 3)


def test_a_hundred_thousand_pictures_take_seconds() -> None:
    table = hashes(100_000, neighbours=1000, apart=3, chains=False)
    start = time.process_time()
    found = near_duplicates(table, 3)
    assert time.process_time() - start < 10
    assert {int(key) for key in found} == set(range(99_000, 100_000))


def test_duplicates_are_rejected_and_pictures_without_a_hash_are_not() -> None:
    table = {"b": "00000000000000ff", "a": "00000000000000fe", "c": "", "d": ""}
    found = duplicate_rejections(table, FilterSettings(duplicates=1))
    assert [(one.key, one.reason, one.detail) for one in found] == [("b", STAGES["duplicates"][0], "a was kept.")]
    assert duplicate_rejections(table, FilterSettings(duplicates=None)) == []


def test_an_invalid_hash_or_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="no picture hash"):
        near_duplicates({"a": "ff"}, 3)
    with pytest.raises(ValueError, match="out of range"):
        near_duplicates({}, 11)
    assert near_duplicates({}, 3) == {}
