"""The data card counts correctly in any order, and names exactly the groups that fall behind."""

import io
import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_synth.backends.embedded import world_groups
from data_synth.card.facts import UNKNOWN, Card, CardSettings, groups_of, make_card
from data_synth.card.page import write_card
from data_synth.records import Candidate, Case, LostTarget, Measures, Reference, Rejection, TargetSpec
from imagine.world import captions, sample_contexts, sample_people


def png(red: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (red, 90, 120)).save(file, format="PNG")
    return file.getvalue()


def case(
    number: int,
    similarity: float | None = 0.7,
    rejected: str | None = None,
    groups: dict[str, str] | None = None,
    aims: dict[str, str] | None = None,
    **changes: Any,
) -> Case:
    key = f"k{number:05d}"
    wanted = aims or {"expression": "smiling"}
    measures = Measures(1, similarity, changes.get("difference", 0.5), attributes=changes.get("attributes", {}))
    return Case(
        Reference(key, png(number % 256), changes.get("person"), facts={"groups": groups} if groups else {}),
        TargetSpec(f"{key}-0", key, "a person", changes.get("prompt", "a person, smiling"), wanted),
        Candidate(
            f"{key}-0-{changes.get('attempt', 0)}-{changes.get('round', 0)}",
            f"{key}-0",
            png(7),
            round=changes.get("round", 0),
        ),
        measures,
        rejected and Rejection(f"{key}-0-0-0", "filter", rejected, f"Detail of {key}."),  # type: ignore[arg-type]
    )


def crowd(seed: int, size: int, worse: Sequence[str] = (), likeness: float = 0.7) -> list[Case]:
    """Return cases of five skin tones with `size` people each; those in `worse` pass half as often."""
    chance = np.random.default_rng(seed)
    cases = []
    for number in range(5 * size):
        tone = ("fair", "light", "tan", "brown", "dark")[number % 5]
        similarity = float(chance.normal(likeness, 0.08))
        passes = chance.random() < (0.4 if tone in worse else 0.8)
        groups = {"skin tone": tone, "age": ("young", "old")[number % 2]}
        cases.append(case(number, similarity, None if passes else "too unlike the reference", groups))
    return cases


# --- counting ---------------------------------------------------------------------------------------------------------
def test_everything_is_counted_once() -> None:
    cases = [
        case(0),
        case(1, 0.3, "too unlike the reference"),
        case(2, 0.99, "too like the reference"),
        case(3, 0.75, attributes={"expression": "sad", "gaze": "left"}, aims={"expression": "sad"}),
        case(3, 0.65, "another try is better", attempt=1, aims={"expression": "sad"}),
        case(4, None, "too few faces"),
    ]
    others = [
        Rejection("x.png", "import", "no face"),
        Rejection("y.png", "import", "no face"),
        Rejection("k9", "caption", "no caption"),
    ]
    facts = make_card(cases, others).facts
    assert facts["counts"] == {"people": 5, "asks": 5, "candidates": 6, "pairs": 2}
    assert facts["rejected"] == {
        "caption": {"no caption": 1},
        "filter": {
            "another try is better": 1, "too few faces": 1, "too like the reference": 1, "too unlike the reference": 1,
        },
        "import": {"no face": 2},
    }  # fmt: skip
    expression = facts["attributes"]["expression"]
    assert expression["sad"] == {"wished": None, "asked": 1, "asked_in_pairs": 1, "shown_in_pairs": 1}
    assert expression["smiling"] == {"wished": None, "asked": 4, "asked_in_pairs": 1, "shown_in_pairs": 0}
    assert expression[UNKNOWN]["shown_in_pairs"] == 1
    assert facts["attributes"]["gaze"] == {
        "left": {"wished": None, "asked": 0, "asked_in_pairs": 0, "shown_in_pairs": 1},
        UNKNOWN: {"wished": None, "asked": 0, "asked_in_pairs": 0, "shown_in_pairs": 1},
    }  # fmt: skip


def test_histograms_count_the_candidates_left_after_each_filter() -> None:
    cases = [
        case(0, 0.7),
        case(1, 0.1, "too unlike the reference"),
        case(2, 0.71, "poor quality"),
        case(3, None, "too few faces"),
    ]
    counts = make_card(cases).facts["histograms"]["similarity"]["counts"]
    totals = {name: sum(bins) for name, bins in counts.items()}
    assert list(totals)[:4] == ["before", "after faces", "after identity", "after difference"]
    assert (totals["before"], totals["after faces"], totals["after identity"]) == (3, 3, 2)
    assert (totals["after difference"], totals["after quality"], totals["after review"]) == (2, 1, 1)
    place = counts["after review"].index(1)
    assert -1 + place * 0.04 <= 0.7 < -1 + (place + 1) * 0.04


def test_rejections_by_reviewers_come_last_and_do_not_lower_the_pass_rate() -> None:
    waiting = case(1, 0.5)
    waiting = replace(waiting, rejection=Rejection(waiting.candidate.key, "review", "any reason of a reviewer"))
    facts = make_card([case(0), waiting]).facts
    totals = {name: sum(bins) for name, bins in facts["histograms"]["similarity"]["counts"].items()}
    assert (totals["after duplicates"], totals["after review"]) == (2, 1)
    assert facts["people"]["age"][UNKNOWN]["pass_rate"] == 1


def test_wished_shares_are_listed_beside_the_counts() -> None:
    facts = make_card([case(0), case(1)], wished={"expression": {"smiling": 0.5, "sad": 0.5}}).facts
    assert facts["attributes"]["expression"]["sad"] == {
        "wished": 0.5,
        "asked": 0,
        "asked_in_pairs": 0,
        "shown_in_pairs": 0,
    }


def test_rounds_of_refinement_are_listed_separately() -> None:
    cases = [
        case(n, 0.4 + 0.1 * r, "another try is better" if r == 0 else None, round=r, difference=0.6)
        for n in range(3)
        for r in (0, 1)
    ]
    rounds = make_card(cases).facts["rounds"]
    assert rounds["0"]["similarity"] == pytest.approx(0.4)
    assert rounds["1"]["similarity"] == pytest.approx(0.5)
    assert rounds["1"]["candidates"] == 3


def test_the_card_does_not_depend_on_order(tmp_path: Path) -> None:
    cases = crowd(0, 40, worse=["dark"])
    shuffled = cases[:]
    random.Random(0).shuffle(shuffled)
    pages = []
    for some in (cases, shuffled):
        card = make_card(some, [Rejection("a", "import", "no face")])
        pages.append((card.facts, write_card(card, tmp_path).read_text()))
    assert pages[0] == pages[1]


def test_the_card_holds_only_some_pictures() -> None:
    card = make_card(crowd(0, 40), settings=CardSettings(pairs=5, examples=2))
    assert len(card.pairs) == 5
    assert {reason: len(some) for reason, some in card.examples.items()} == {"too unlike the reference": 2}
    assert all(one.rejection is None for one in card.pairs)


# --- groups -----------------------------------------------------------------------------------------------------------
def named(cases: Sequence[Case | LostTarget], **settings: Any) -> list[tuple[str, str, str]]:
    behind = make_card(cases, settings=CardSettings(**settings)).facts["behind"]
    return [(line["group"], line["value"], line["measure"]) for line in behind["named"]]


def test_a_group_that_falls_behind_is_named_and_no_other() -> None:
    assert named(crowd(0, 150, worse=["dark"])) == [("skin tone", "dark", "pass_rate")]


def test_a_group_whose_targets_are_lost_early_is_named() -> None:
    """A target without a measurable candidate, for example refused by the generator, counts as a failure."""
    cases: list[Case | LostTarget] = list(crowd(0, 150))
    dark = [number for number in range(4, 750, 5) if number // 10 % 2]  # half of them, of both ages
    for number in dark:
        one = cases[number]
        cases[number] = LostTarget(one.reference, one.spec if number % 3 else None)
    assert named(cases) == [("skin tone", "dark", "pass_rate")]
    facts = make_card(cases).facts
    line = facts["people"]["skin tone"]["dark"]
    assert (line["people"], line["candidates"], line["lost"]) == (150, 150 - len(dark), len(dark))
    asked = 750 - sum(number % 3 == 0 for number in dark)
    assert facts["counts"]["asks"] == facts["attributes"]["expression"]["smiling"]["asked"] == asked < 750
    assert facts["counts"]["people"] == 750 and facts["counts"]["candidates"] == 750 - len(dark)


def test_an_aim_whose_targets_are_lost_early_is_named() -> None:
    cases: list[Case | LostTarget] = [case(n, aims={"gaze": ("left", "ahead", "right")[n % 3]}) for n in range(300)]
    cases = [LostTarget(one.reference, one.spec) if n % 6 == 0 else one for n, one in enumerate(cases)]
    assert named(cases) == [("gaze", "left", "pass_rate")]


def test_a_group_with_lower_similarity_is_named() -> None:
    cases = crowd(1, 100)
    some = [n for n, one in enumerate(cases) if one.reference.facts["groups"]["skin tone"] == "tan"]
    for n in some:
        worse = case(n, (cases[n].measures.similarity or 0) - 0.1, None, dict(cases[n].reference.facts["groups"]))
        cases[n] = worse
    assert ("skin tone", "tan", "similarity") in named(cases)


def test_without_a_group_that_falls_behind_none_is_named() -> None:
    assert [named(crowd(seed, 60)) for seed in range(20)] == [[]] * 20


def test_a_significant_but_small_gap_is_not_named() -> None:
    cases = crowd(0, 150, worse=["dark"])
    assert named(cases, pass_rate=0.6) == []


def test_groups_of_few_people_are_not_tested() -> None:
    facts = make_card(crowd(0, 20, worse=["dark"])).facts["behind"]
    assert facts["named"] == []
    assert {(line["group"], line["value"]) for line in facts["too_few"]} >= {
        ("skin tone", "dark"),
        ("skin tone", "fair"),
    }
    assert "30" in facts["how"]


def test_many_candidates_of_one_person_count_as_one_person() -> None:
    """Forty failures of one person are no evidence about the group."""
    cases = crowd(0, 29)
    groups = {"skin tone": "dark"}
    cases += [case(9000 + n, 0.2, "too unlike the reference", groups, person="the same") for n in range(40)]
    facts = make_card(cases, settings=CardSettings(least=20)).facts
    assert facts["people"]["skin tone"]["dark"]["people"] == 30
    assert facts["behind"]["named"] == []


def test_aims_that_fail_more_often_are_named() -> None:
    chance = np.random.default_rng(0)
    cases = [
        case(
            n,
            0.7,
            None if chance.random() < (0.3 if n % 4 == 0 else 0.9) else "blurred",
            aims={"gaze": ("left", "ahead", "right", "up")[n % 4]},
        )
        for n in range(400)
    ]
    assert named(cases) == [("gaze", "left", "pass_rate")]


def test_a_group_is_never_guessed() -> None:
    facts = make_card([case(0), case(1)]).facts
    assert set(facts["people"]) == {"skin tone", "age"}
    assert all(set(table) == {UNKNOWN} for table in facts["people"].values())
    assert facts["behind"]["tests"] == 0
    assert groups_of(Reference("a", b"", facts={"groups": "nonsense"})) == {"skin tone": UNKNOWN, "age": UNKNOWN}
    assert groups_of(Reference("a", b"", facts={"groups": {"region": "north"}}))["region"] == "north"


def test_the_groups_of_the_world_match_its_captions() -> None:
    people = sample_people(list(range(40)))
    texts = captions(people, sample_contexts(list(range(40))), style="dense")
    for skin, age, text in zip(people.skin.tolist(), people.age.tolist(), texts, strict=True):
        groups = world_groups(skin, age)
        assert f"{groups['skin tone']} skin" in text
        assert ("young person" in text, "old person" in text) == (groups["age"] == "young", groups["age"] == "old")


# --- files ------------------------------------------------------------------------------------------------------------
class Checker(HTMLParser):
    """Checks that every tag is closed, and records the tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "html"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "html":
            assert self.open.pop() == tag


def card_with_everything() -> Card:
    cases = crowd(0, 40, worse=["dark"])
    cases += [
        case(5000, 0.7, prompt='<script>alert("x")</script>', groups={"<b>": "<i>"}),
        case(5001, 0.9, "poor quality"),
    ]
    about = {"title": "Our <pairs>", "licence": "CC0", "seeds": {"seed": 3}, "models": ["a", "b"]}
    return make_card(cases, [Rejection("x", "import", "no face")], about, {"expression": {"smiling": 1.0}})


def test_card_json_holds_the_facts(tmp_path: Path) -> None:
    card = card_with_everything()
    page = write_card(card, tmp_path)
    assert page == tmp_path / "card.html"
    assert json.loads((tmp_path / "card.json").read_text()) == card.facts


def test_the_page_is_complete_self_contained_and_escaped(tmp_path: Path) -> None:
    text = write_card(card_with_everything(), tmp_path).read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert "script" not in checker.tags
    assert "Our &lt;pairs&gt;" in text
    assert not re.search(r'(src|href)="(?!data:image/jpeg;base64,)', text)
    assert checker.tags.count("img") == 1 + 2  # the contact sheet, and examples of two reasons
    assert "dark" in text[text.index("Groups that fall behind") : text.index("<h2>People")]
    assert "not known" in text


def test_an_empty_build_has_a_card(tmp_path: Path) -> None:
    text = write_card(make_card([]), tmp_path).read_text()
    assert "0 pairs" in text
    assert "was not measured" in text
