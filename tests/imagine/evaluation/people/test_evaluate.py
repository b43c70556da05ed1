"""Tests of the suite `people`: sentences, real pictures, judging, and whole runs of pipelines that are right or wrong.

`Oracle` returns real renders, of the right people in the right places or not, so that its scores are known.
"""

import html as markup
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from imagine.errors import ConfigError
from imagine.evaluation import cases as portrait_cases
from imagine.evaluation import evaluate, metrics, report
from imagine.evaluation.judge import Judge, Reader
from imagine.evaluation.metrics.several import PATTERNS
from imagine.evaluation.people import cases as group_cases
from imagine.evaluation.people import evaluate as group_evaluate
from imagine.evaluation.people import judging as group_judging
from imagine.evaluation.people import scores as group_scores
from imagine.evaluation.people.cases import GroupCases, make_group_cases
from imagine.evaluation.people.judging import (
    JudgedGroup,
    JudgedPerson,
    identify,
    judge_groups,
    portrait_squares,
    same_person_threshold,
)
from imagine.evaluation.people.suites import GROUP_SUITES, NAMES, AskedPerson, GroupPrompt
from imagine.evaluation.suites import PORTRAITS
from imagine.networks.recogniser import Recogniser
from imagine.people.faces import KnownBoxesFinder
from imagine.records import FaceBox
from imagine.request import read_requests
from imagine.world import (
    VERSION,
    attributes,
    canvas_shape,
    render,
    sample_contexts,
    sample_people,
    seeds,
)
from imagine.world.captions import PHRASES, STYLE_PHRASES, garment
from imagine.world.group_captions import ORDINALS, PLACES
from imagine.world.groups import group_contexts
from imagine.world.vocabulary import ATTRIBUTES, FRAMINGS, TRAITS
from tests import tiny

PAIRS, PROMPTS = 2, 3
SUITE = GROUP_SUITES["people"]
SENTENCES = [(count, prompt) for count, prompts in SUITE.items() for prompt in prompts]


@pytest.fixture(scope="module")
def shipped() -> Judge:
    return Judge.from_pretrained()


@pytest.fixture(scope="module")
def quick() -> Judge:
    """A small random judge that finds two faces in every picture."""
    torch.manual_seed(0)
    reader = Reader({**ATTRIBUTES, "letters": ()}, TRAITS, size=64, widths=(8, 8, 8, 16), hidden=16)
    finder = KnownBoxesFinder([FaceBox(20, 30, 40, 50, 1.0), FaceBox(110, 30, 40, 50, 1.0)])
    return Judge(Recogniser(size=32, widths=(8, 8, 8, 16), dimensions=8), reader, finder=finder)


class Oracle:
    """A pipeline that draws real pictures of the people of its references, or makes one mistake.

    mistake: "order": everyone in the place of another; "twice": {a} in all places; "strangers": other people;
    "deaf": the same picture for exchanged references.
    """

    def __init__(self, mistake: str = "", killed_after: int | None = None) -> None:
        self.components: dict[str, Any] = {"unet": torch.nn.Linear(2, 2)}
        torch.nn.init.ones_(self.components["unet"].weight)
        torch.nn.init.zeros_(self.components["unet"].bias)
        self.config: dict[str, Any] = {"default_steps": 4}
        self.unet, self.vae_scale_factor = SimpleNamespace(config=SimpleNamespace(sample_size=8)), 16
        self.mistake, self.killed_after = mistake, killed_after
        self.sets = {count: make_group_cases(SUITE[count][:PROMPTS], count, groups, 0) for count, groups in SIZES}
        self.photos = {
            report.to_pil(picture).tobytes(): (count, row)
            for count, cases in self.sets.items()
            for row, picture in enumerate(render(cases.people, cases.references).images)
        }
        self.drawn: list[str] = []
        self.exchanges = 0

    def set_progress_bar_config(self, disable: bool) -> None:
        assert disable

    def enroll(self, photos: Sequence[Image.Image], on_no_face: str) -> tuple[int, int]:
        assert on_no_face == "whole"  # a reference without a face must not stop the run
        return self.photos[photos[0].tobytes()]

    def __call__(
        self, prompts: list[str], reference: list[dict[str, tuple[int, int]]], generator: list[torch.Generator],
        output_type: str, height: int, width: int,
    ) -> SimpleNamespace:  # fmt: skip
        assert output_type == "pil"
        images = []
        for prompt, people, source in zip(prompts, reference, generator, strict=True):
            if self.killed_after is not None and len(self.drawn) >= self.killed_after:
                raise KeyboardInterrupt
            self.drawn.append(prompt)
            cases = self.sets[len(people)]
            assert (height, width) == canvas_shape(cases.count, 128)
            case = source.initial_seed() - 500_000 * (cases.count - 2)  # the seed of the noise, at seed 0
            assert prompt == cases.prompt(case).text
            rows = [people[name][1] for name in NAMES[: cases.count]]
            assert sorted(rows) == cases.members(torch.tensor([case]))[0].tolist()
            self.exchanges += rows[0] > rows[-1]
            images.append(self.picture(cases, case, exchanged=rows[0] > rows[-1]))
        return SimpleNamespace(images=images)

    def picture(self, cases: GroupCases, case: int, exchanged: bool) -> Image.Image:
        people = cases.strangers if self.mistake == "strangers" else cases.people
        if self.mistake == "twice":
            people = people[torch.arange(len(people)) // cases.count * cases.count]
        if self.mistake == "order":
            exchanged = not exchanged
        elif self.mistake == "deaf":
            exchanged = False
        return report.to_pil(cases.render(torch.tensor([case]), people, exchanged).images[0])


SIZES = ((2, PAIRS), (3, -(-PAIRS // 2)))


def evaluated(pipeline: Any, output: Path, judge: Judge, **options: Any) -> dict[str, Any]:
    settings = {"identities": PAIRS, "prompts": PROMPTS, "batch": 4, "threshold_people": 30} | options
    return group_evaluate.run(pipeline, output, judge=judge, **settings)


@pytest.fixture(scope="module")
def straight(shipped: Judge, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, Oracle]:
    folder, oracle = tmp_path_factory.mktemp("straight"), Oracle()
    return evaluated(oracle, folder, shipped), folder, oracle


@pytest.fixture
def same_truths(straight: tuple[dict[str, Any], Path, Oracle], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give later runs the threshold that the straight run measured, which depends on the judge only."""
    monkeypatch.setattr(group_evaluate, "same_person_threshold", lambda *_: straight[0]["threshold"])


# --- the sentences ----------------------------------------------------------------------------------------------------
def test_there_are_five_sentences_for_two_and_for_three_people_and_two_of_them_leave_the_places_out() -> None:
    assert {count: len(prompts) for count, prompts in SUITE.items()} == {2: 5, 3: 5}
    for count, prompts in SUITE.items():
        assert [prompt.has_places for prompt in prompts].count(False) == 2
        assert prompts[0].has_places  # the exchange is judged by it
        for prompt in prompts:
            assert len(prompt.people) == count
            if prompt.has_places:
                assert sorted(person.place or 0 for person in prompt.people) == list(range(count))
    assert any([person.place for person in prompt.people] != [0, 1] for prompt in SUITE[2] if prompt.has_places)


@pytest.mark.parametrize(("count", "prompt"), SENTENCES, ids=[prompt.text[:40] for _, prompt in SENTENCES])
def test_each_person_is_asked_in_the_phrases_of_the_world(count: int, prompt: GroupPrompt) -> None:
    phrases = {**PHRASES, "style": STYLE_PHRASES}
    opening, people = prompt.text.split(": ")
    assert opening.split(" people")[0].endswith({2: "two", 3: "three"}[count])
    for name, word in prompt.picture.items():
        assert word in ATTRIBUTES[name] and any(phrase in opening for phrase in phrases[name][word])
    assert not prompt.has_places or all(place in people for place in PLACES[count])
    for part, name, person in zip(people.split("; "), NAMES, prompt.people, strict=False):
        place = "" if person.place is None else f" {PLACES[count][person.place]}"
        assert part.startswith(f"{{{name}}}{place}, ")
        assert garment({"letters": "", **person.asked}) in part
        for attribute in {"expression", "headwear"} & set(person.asked):
            assert any(phrase in part for phrase in PHRASES[attribute][person.asked[attribute]])
        assert all(word in ATTRIBUTES[attribute] for attribute, word in person.asked.items())


def test_names_become_numbers_in_the_order_of_the_references() -> None:
    for count, prompt in SENTENCES:
        (request,) = read_requests([prompt.text], [dict.fromkeys(NAMES[:count], "photo")])
        assert [person.name for person in request.people] == list(NAMES[:count])
        assert all(f"the {ordinal} person" in request.sentence for ordinal in ORDINALS[:count])


# --- the real pictures ------------------------------------------------------------------------------------------------
def test_everyone_is_held_out_and_in_one_group_only() -> None:
    sets = [make_group_cases(SUITE[count], count, 4, 0) for count in (2, 3)]
    traits = torch.cat([table.skin for cases in sets for table in (cases.people, cases.strangers)])
    assert len(traits.unique()) == len(traits) == 2 * (8 + 12)
    again = make_group_cases(SUITE[2], 2, 2, 0)
    assert torch.equal(again.people.skin, sets[0].people.skin[:4])  # the same people in a smaller run
    assert not torch.equal(make_group_cases(SUITE[2], 2, 4, 1).people.skin, sets[0].people.skin)
    zoom = torch.cat([table.zoom for cases in sets for table in (cases.references, cases.truths, cases.contexts)])
    assert len(zoom.unique()) == len(zoom)


def seeds_of(module: Any, make: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Return the seeds of all people and of all contexts that `make` samples through `module`."""
    people: list[int] = []
    contexts: list[int] = []

    def sampled_people(some: Sequence[int]) -> Any:
        people.extend(some)
        return sample_people([0])

    def sampled_contexts(_: Any, some: Sequence[int]) -> Any:
        contexts.extend(some)
        return sample_contexts([0])

    with monkeypatch.context() as patch:
        patch.setattr(module, "sample_people", sampled_people)
        patch.setattr(module, "contexts_for", sampled_contexts)
        make()
    return people, contexts


@pytest.mark.parametrize("seed", [0, 9])
def test_no_person_and_no_picture_belongs_to_another_evaluation(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_cases, "sample_groups", lambda *_: None)
    sizes = ((2, 1000), (3, 500))
    groups = seeds_of(group_cases, lambda: [make_group_cases(SUITE[n], n, m, seed) for n, m in sizes], monkeypatch)
    portraits = seeds_of(portrait_cases, lambda: portrait_cases.make_cases(PORTRAITS, 1000, seed), monkeypatch)
    threshold = set(range(group_judging._THRESHOLD_SEED, group_judging._THRESHOLD_SEED + 600))
    for own, other in zip(groups, portraits, strict=True):
        assert len(set(own)) == len(own)
        assert set(own).isdisjoint(threshold | set(other)) and threshold.isdisjoint(other)
        assert min(own) >= seeds.HELD_OUT.start and max(own) < seeds.HELD_OUT.stop - 5_000  # the validations' people


@pytest.mark.parametrize("count", [2, 3])
def test_real_pictures_show_what_the_sentences_ask_in_the_places_they_ask(count: int) -> None:
    cases = make_group_cases(SUITE[count], count, 2, 0)
    for case in range(len(cases)):
        prompt, places = cases.prompt(case), cases.places[case].tolist()
        rows = case * count + torch.tensor(places).argsort()  # from left to right, as `render_groups` takes them
        contexts = group_contexts(cases.contexts[rows], cases.arrangements[[case]])
        shown = attributes(cases.people[cases.members(torch.tensor([case]))[0]], contexts)
        for person, place in zip(prompt.people, places, strict=True):
            assert person.place in (None, place)
            wanted = {**prompt.picture, **person.asked}
            assert {name: shown[place][name] for name in wanted} == wanted
    drawn = cases.render(torch.arange(2), cases.people)
    assert drawn.images.shape[2:] == canvas_shape(count, 128)
    # With exchanged references, somebody else stands in the first place, dressed as before.
    other = cases.render(torch.arange(2), cases.people, exchanged=True)
    assert not torch.equal(other.images, drawn.images)
    assert (other.images[0, :, -8:] - drawn.images[0, :, -8:]).abs().mean() < 0.01


# --- judging ----------------------------------------------------------------------------------------------------------
def identified(*rows: list[float], threshold: float = 0.5) -> tuple[list[int | None], list[bool], bool]:
    found = identify(torch.tensor(rows), threshold)
    return found.columns, found.present, found.doubled


def test_faces_go_to_people_so_that_the_sum_is_largest() -> None:
    # Taken alone, both people prefer the first face.
    assert identified([0.9, 0.8], [0.85, 0.1])[0] == [1, 0]
    assert identified([0.9, 0.1], [0.2, 0.7]) == ([0, 1], [True, True], False)


def test_a_person_is_present_above_the_threshold_and_only_as_the_most_similar_of_the_group() -> None:
    assert identified([0.9, 0.1], [0.2, 0.5])[1] == [True, False]
    assert identified([0.9, 0.8], [0.2, 0.7]) == ([0, 1], [True, False], True)  # the second face shows the first person


def test_a_person_is_doubled_only_by_faces_above_the_threshold() -> None:
    assert identified([0.9, 0.4], [0.1, 0.2])[2] is False
    assert identified([0.9, 0.6], [0.1, 0.2])[2] is True
    assert identified([0.9, 0.6, 0.1], [0.1, 0.2, 0.9])[2] is True


def test_without_faces_nobody_is_present_and_with_one_only_one_person() -> None:
    assert identified([], []) == ([None, None], [False, False], False)
    assert identified([0.7], [0.9]) == ([None, 0], [False, True], False)


def people(*centres: float | None, **read: str) -> JudgedGroup:
    """Return a picture whose people stand at these distances from the left; None: not present."""
    each = [JudgedPerson(0.9, c, True, read) if c is not None else JudgedPerson(0.1, 5.0, False, {}) for c in centres]
    return JudgedGroup(tuple(each), len(each), False)


def test_assigned_needs_everyone_in_the_places_of_the_sentence() -> None:
    placed = GroupPrompt("", {}, (AskedPerson({}, 1), AskedPerson({}, 0), AskedPerson({}, 2)))
    anywhere = GroupPrompt("", {}, (AskedPerson({}),) * 3)
    assert group_scores.is_assigned(placed, people(50, 10, 90))
    assert not group_scores.is_assigned(placed, people(10, 50, 90))
    assert group_scores.is_assigned(anywhere, people(10, 50, 90))
    assert not group_scores.is_assigned(anywhere, people(10, None, 90))
    assert not group_scores.is_assigned(placed, people(50, None, 90))


def test_people_exchange_only_if_all_are_present_and_change_places() -> None:
    assert group_scores.has_exchanged(people(10, 90), people(80, 20))
    assert not group_scores.has_exchanged(people(10, 90), people(20, 80))
    assert not group_scores.has_exchanged(people(10, 90), people(None, 20))


def test_attributes_of_a_missing_person_are_wrong() -> None:
    prompt = GroupPrompt(
        "", {}, (AskedPerson({"clothes": "suit", "headwear": "cap"}), AskedPerson({"clothes": "suit"}))
    )
    assert group_scores.attributes_found(prompt, people(10, 90, clothes="suit", headwear="cap")) == 3
    assert group_scores.attributes_found(prompt, people(10, 90, clothes="suit", headwear="none")) == 2
    assert group_scores.attributes_found(prompt, people(None, 90, clothes="suit", headwear="cap")) == 1


def test_missing_faces_stay_in_the_denominators() -> None:
    cases = make_group_cases(SUITE[2][:1], 2, 3, 0)
    asked = dict(cases.prompts[0].people[0].asked)
    row = group_scores.JudgedRow([people(10, 90, **asked), people(None, 90), people(None, None)], [])
    counts = group_scores.count_groups(cases, row)
    assert {name: (c.tolist(), t.tolist()) for name, (c, t) in counts.items()} == {
        "present": ([2, 1, 0], [2, 2, 2]),
        "doubled": ([0, 0, 0], [1, 1, 1]),
        "assigned": ([1, 0, 0], [1, 1, 1]),
        "attributes": ([3, 0, 0], [6, 6, 6]),  # the other person was asked for something else in each attribute
    }


def test_the_square_of_a_portrait_is_the_portrait() -> None:
    contexts = sample_contexts(range(40)).replace(framing=FRAMINGS.index("portrait"), zoom=1, shift_x=0, shift_y=0)
    contexts = contexts.replace(roll=0, yaw=0, pitch=0)
    drawn = render(sample_people(range(40)), contexts)
    squares = portrait_squares(drawn.images, drawn.boxes, 128)
    assert (squares - drawn.images).abs().mean() < 0.01
    assert (squares.roll(4, -2) - drawn.images).abs().mean() > 0.02  # the measure sees a shift of four pixels


def test_a_square_is_as_large_as_the_head_and_repeats_the_edge() -> None:
    image = torch.arange(96.0).view(1, 1, 1, 96).expand(1, 3, 64, 96) / 96
    (left, small) = portrait_squares(image.repeat(2, 1, 1, 1), torch.tensor([[0, 20, 20, 26], [40, 25, 16, 13.0]]), 32)
    assert torch.allclose(left[:, :, :8], left[0, 0, 0].expand(3, 32, 32)[:, :, :8], atol=1e-5)
    assert left[0, 0, 0].item() == 0 and left[0, 5, -1].item() > 0.3
    spread = (small.amax(-1) - small.amin(-1)).mean() * 96
    assert spread.item() == pytest.approx(31 / 32 * 13 / 0.416, abs=1.5)


def test_the_threshold_misses_five_percent_of_pairs(quick: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    angles = torch.linspace(0, 1.5, 101)
    sides = iter([torch.tensor([[1.0, 0.0]]).repeat(101, 1), torch.stack((angles.cos(), angles.sin()), 1)])
    monkeypatch.setattr(group_judging, "embed_portraits", lambda *_: next(sides))
    threshold = same_person_threshold(quick, 101)
    assert (angles.cos() < threshold - 1e-6).sum() == 5 and threshold == pytest.approx(float(angles[95].cos()))


def test_the_threshold_does_not_depend_on_the_random_state(quick: Judge) -> None:
    one = same_person_threshold(quick, 6)
    torch.manual_seed(5)
    assert same_person_threshold(quick, 6) == one < 1


def test_the_ratio_of_groups_of_different_sizes_has_an_interval() -> None:
    counts, totals = torch.tensor([4, 0, 6, 3]), torch.tensor([4, 4, 9, 9])
    low, high = metrics.bootstrap_ratio(counts, totals)
    assert 0 <= low < 13 / 26 < high <= 1
    assert metrics.bootstrap_ratio(totals, 2 * totals) == (0.5, 0.5)
    assert metrics.bootstrap_ratio(counts, torch.ones(4)) == metrics.bootstrap(counts.float())


def test_judging_does_not_depend_on_the_batch(quick: Judge) -> None:
    cases = make_group_cases(SUITE[2][:1], 2, 3, 0)
    numbers = torch.arange(3)

    def pictures(some: Tensor) -> Tensor:
        return cases.render(some, cases.people).images

    truths = torch.nn.functional.normalize(torch.randn(3, 2, 8), dim=-1)
    one, three = (judge_groups(quick, numbers, pictures, truths, -1.0, batch) for batch in (1, 3))
    assert [[p.read for p in group.people] for group in one] == [[p.read for p in group.people] for group in three]
    assert [group.order for group in one] == [group.order for group in three]
    assert any(person.read for group in one for person in group.people)


# --- whole runs -------------------------------------------------------------------------------------------------------
def test_a_perfect_pipeline_scores_like_the_ceiling(straight: tuple[dict[str, Any], Path, Oracle]) -> None:
    summary, _, oracle = straight
    for name, numbers in summary["metrics"].items():
        # The picture files round values to 8 bits.
        assert numbers["value"] == pytest.approx(numbers["ceiling"], abs=0.1), name
    assert summary["metrics"]["present"]["ceiling"] > 0.6 > 0.3 > summary["metrics"]["present"]["floor"]
    assert summary["metrics"]["assigned"]["floor"] < 0.1
    assert summary["metrics"]["attributes"]["floor"] < summary["metrics"]["attributes"]["ceiling"]
    assert oracle.exchanges == PAIRS


def test_people_in_the_wrong_places_are_present_but_not_assigned(
    straight: tuple[dict[str, Any], Path, Oracle], shipped: Judge, same_truths: None, tmp_path: Path
) -> None:
    summary = evaluated(Oracle("order"), tmp_path, shipped, prompts=PROMPTS)["metrics"]
    right = straight[0]["metrics"]
    assert summary["present"]["value"] > 0.6 * right["present"]["value"]
    # Only the sentence without places, one of three, can be right.
    assert summary["assigned"]["value"] < 0.5 < right["assigned"]["value"] + 0.2
    assert summary["attributes"]["value"] < 0.6 * right["attributes"]["value"]  # everyone wears the other's clothes
    assert summary["swap"]["value"] > 0.3 > 0.1 > right["swap"]["value"]


def test_one_person_in_all_places_is_doubled(
    straight: tuple[dict[str, Any], Path, Oracle], shipped: Judge, same_truths: None, tmp_path: Path
) -> None:
    summary = evaluated(Oracle("twice"), tmp_path, shipped)["metrics"]
    assert summary["doubled"]["value"] > 0.5 > 0.2 > straight[0]["metrics"]["doubled"]["value"]
    assert summary["present"]["value"] <= 0.5 and summary["assigned"]["value"] == 0 == summary["exchanged"]["value"]
    assert summary["dominance"]["value"] > 0.2 > 0.1 > straight[0]["metrics"]["dominance"]["value"]


def test_strangers_score_like_the_floor(shipped: Judge, same_truths: None, tmp_path: Path) -> None:
    summary = evaluated(Oracle("strangers"), tmp_path, shipped)["metrics"]
    for name in group_scores.METRICS:
        assert summary[name]["value"] == pytest.approx(summary[name]["floor"], abs=0.1), name


def test_a_pipeline_that_ignores_the_exchange_fails_the_exchange_only(
    straight: tuple[dict[str, Any], Path, Oracle], shipped: Judge, same_truths: None, tmp_path: Path
) -> None:
    summary = evaluated(Oracle("deaf"), tmp_path, shipped)["metrics"]
    assert summary["exchanged"]["value"] == 0 < straight[0]["metrics"]["exchanged"]["value"]
    assert summary["assigned"] == straight[0]["metrics"]["assigned"]


def test_the_report_has_the_documented_fields(straight: tuple[dict[str, Any], Path, Oracle]) -> None:
    summary, folder, _ = straight
    stored = json.loads((folder / "report.json").read_text())
    assert stored == json.loads(json.dumps(summary))
    facts = {name: stored[name] for name in ("suite", "identities", "prompts", "seed", "world", "groups")}
    assert facts == {
        "suite": "people", "identities": PAIRS, "prompts": PROMPTS, "seed": 0, "world": VERSION,
        "groups": {"2": PAIRS, "3": 1},
    }  # fmt: skip
    assert stored["notes"] == [] and 0 < stored["threshold"] < 1 and "commit" in stored
    asked = ["present", "doubled", "assigned", "attributes", "exchanged"]
    assert list(stored["metrics"]) == [*asked, *PATTERNS]
    assert sum(stored["metrics"][name]["value"] for name in PATTERNS) == pytest.approx(1)
    assert 0 < stored["tolerance"] < 1 and len(stored["people"]["present"]) == PAIRS + 1
    for table in (stored["metrics"], stored["by_people"]["2"], stored["by_people"]["3"]):
        for numbers in table.values():
            assert set(numbers) == {"value", "low", "high", "ceiling", "floor"}
            assert 0 <= numbers["low"] <= numbers["value"] <= numbers["high"] <= 1
    assert "exchanged" not in stored["by_people"]["3"]
    assert list(stored["rows"]) == ["full", "ceiling", "other"]
    assert {"expression", "clothes", "clothes_colour", "headwear", "scene"} <= set(stored["attributes"])
    assert stored["attributes"]["expression"]["asked"] == PAIRS * PROMPTS * 2 + PROMPTS * 3
    page = (folder / "report.html").read_text()
    assert all(markup.escape(report.TITLES[name]) in page for name in stored["metrics"])
    assert "data:image/jpeg;base64," in page and "3 people" in page


def test_the_folder_holds_every_picture_and_its_line(straight: tuple[dict[str, Any], Path, Oracle]) -> None:
    _, folder, _ = straight
    lines = [json.loads(line) for line in (folder / "pictures.jsonl").read_text().splitlines()]
    assert len(lines) == PAIRS * PROMPTS + PROMPTS
    assert all((folder / line["file"]).is_file() for line in lines)
    assert [person["name"] for person in lines[-1]["people"]] == ["a", "b", "c"]
    assert {path.name for path in (folder / "pictures" / "exchanged").iterdir()} == {"2_000_00.png", "2_001_00.png"}
    assert len(list((folder / "pictures" / "reference").iterdir())) == 2 * PAIRS + 3
    with Image.open(folder / "samples.png") as sheet:
        assert sheet.width > 5 * 192


def test_an_interrupted_run_resumes_to_the_same_report(quick: Judge, tmp_path: Path) -> None:
    one, two, three = Oracle(), Oracle(killed_after=6), Oracle()
    whole = evaluated(one, tmp_path / "one", quick, threshold_people=4)
    with pytest.raises(KeyboardInterrupt):
        evaluated(two, tmp_path / "two", quick, threshold_people=4)
    resumed = evaluated(three, tmp_path / "two", quick, threshold_people=4, batch=3)
    assert len(three.drawn) == len(one.drawn) - 6 == 11 - 6  # batches of four and of two were complete
    assert {**whole, "costs": 0} == {**resumed, "costs": 0}
    with pytest.raises(ConfigError, match="other prompts: choose another --output"):
        evaluated(Oracle(), tmp_path / "two", quick, prompts=2)


def test_a_real_pipeline_takes_the_suite_through_the_common_entry(
    quick: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_evaluate, "same_person_threshold", lambda *_: 0.5)
    short = {count: (replace(SUITE[count][0], text=tiny.GROUP_SENTENCES[count]),) for count in (2, 3)}
    monkeypatch.setattr(group_evaluate, "GROUP_SUITES", {"people": short})  # the tiny encoders read few tokens
    options = {"num_inference_steps": 2}
    summary = evaluate.run(
        tiny.pipeline(), tmp_path, suite="people", identities=2, prompts=1, judge=quick, options=options
    )
    assert summary["threshold"] == 0.5 and summary["options"] == options
    with Image.open(tmp_path / "pictures" / "full" / "3_000_00.png") as image:
        assert image.size == (64, 32)
    with Image.open(tmp_path / "pictures" / "exchanged" / "2_001_00.png") as image:
        assert image.size == (48, 32)


@pytest.mark.parametrize("wrong", [{"identities": 1}, {"identities": 1001}, {"prompts": 0}, {"prompts": 6}])
def test_wrong_counts_are_one_sentence(quick: Judge, tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be evaluated: .*\.$"):
        evaluated(SimpleNamespace(), tmp_path, quick, **wrong)
    assert not list(tmp_path.iterdir())


def test_a_judge_without_a_finder_is_refused_before_anything_is_drawn(quick: Judge, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a judge with a face finder"):
        evaluated(SimpleNamespace(), tmp_path, Judge(quick.recogniser, quick.reader))
    assert not list(tmp_path.iterdir())


def test_an_unknown_suite_names_all_suites(quick: Judge, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose from portraits, people"):
        evaluate.run(SimpleNamespace(), tmp_path, suite="persons", judge=quick)
