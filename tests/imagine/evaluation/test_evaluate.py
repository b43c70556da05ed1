"""Tests of the evaluation: formulas on constructed embeddings, intervals, cases, resuming, and the report.

The pipelines here are perfect or completely wrong: `Oracle` returns real renders, so that the pipeline's row must equal
a row with known scores.
"""

import html as markup
import json
import math
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from imagine.errors import ConfigError
from imagine.evaluation import cases, evaluate, metrics, report, scores
from imagine.evaluation.judge import Judge, Reader
from imagine.evaluation.runs import folder as run_folder
from imagine.evaluation.suites import PORTRAITS, SUITES, contexts_for, load_suite, suite_version
from imagine.networks.recogniser import Recogniser
from imagine.world import VERSION, attributes, render, sample_people, seeds
from imagine.world.captions import PHRASES, STYLE_PHRASES
from imagine.world.vocabulary import ATTRIBUTES, TRAITS
from tests import tiny

PEOPLE, PROMPTS = 3, 4


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    reader = Reader({**ATTRIBUTES, "letters": ()}, TRAITS, size=64, widths=(8, 8, 8, 16), hidden=16)
    return Judge(Recogniser(size=32, widths=(8, 8, 8, 16), dimensions=8), reader)


class Oracle:
    """A pipeline that returns the pictures of the ceiling row, or (`copies`) the references."""

    def __init__(self, copies: bool = False, killed_after: int | None = None) -> None:
        self.components: dict[str, Any] = {"unet": torch.nn.Linear(2, 2)}
        torch.nn.init.ones_(self.components["unet"].weight)
        torch.nn.init.zeros_(self.components["unet"].bias)
        self.config = {"default_steps": 4}
        self.copies, self.killed_after = copies, killed_after
        self.cases = cases.make_cases(PORTRAITS[:PROMPTS], PEOPLE, seed=0, gallery=6)
        self.enrolled: list[bytes] = []
        self.drawn: list[str] = []

    def set_progress_bar_config(self, disable: bool) -> None:
        assert disable

    def enroll(self, photos: Sequence[Image.Image], on_no_face: str) -> Image.Image:
        assert on_no_face == "whole"  # a reference without a face must not stop the run
        self.enrolled.append(photos[0].tobytes())
        return photos[0]

    def __call__(
        self, prompts: list[str], reference: Any, generator: list[torch.Generator], output_type: str
    ) -> SimpleNamespace:
        if self.killed_after is not None and len(self.drawn) >= self.killed_after:
            raise KeyboardInterrupt
        assert output_type == "pil"
        assert len(generator) == len(prompts)
        self.drawn += prompts
        numbers = [generator_.initial_seed() for generator_ in generator]  # the index of the case, at seed 0
        if reference is None:  # the base alone draws another person
            stranger = sample_people([seeds.HELD_OUT.start + 900_000] * len(numbers))
            return SimpleNamespace(images=_images(stranger, self.cases.ceilings[numbers]))
        if self.copies:
            return SimpleNamespace(images=reference)
        who = self.cases.people[self.cases.person[numbers]]
        return SimpleNamespace(images=_images(who, self.cases.ceilings[numbers]))


def _images(people: Any, contexts: Any) -> list[Image.Image]:
    return [report.to_pil(picture) for picture in render(people, contexts).images]


def evaluated(pipeline: Oracle, output: Path, judge: Judge, **options: Any) -> dict[str, Any]:
    settings = {"identities": PEOPLE, "prompts": PROMPTS, "batch": 3, "gallery": 6} | options
    return evaluate.run(pipeline, output, judge=judge, **settings)


@pytest.fixture(scope="module")
def straight(judge: Judge, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("straight")
    return evaluated(Oracle(), folder, judge), folder


# --- formulas ---------------------------------------------------------------------------------------------------------
def at(*degrees: float) -> Tensor:
    """Return unit vectors in the plane at these angles."""
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_angles_and_similarity_on_constructed_embeddings() -> None:
    assert metrics.similarity(at(0, 0, 0), at(0, 60, 180)).tolist() == pytest.approx([1, 0.5, -1], abs=1e-6)
    assert metrics.angle(at(0, 0), at(60, 180)).tolist() == pytest.approx([math.pi / 3, math.pi], abs=1e-3)


@pytest.mark.parametrize(
    ("output", "expected"),
    [(40, -1.0), (0, 1.0), (20, 0.0), (30, -0.5), (-10, 1.0)],
    ids=["the truth", "the reference", "halfway", "nearer to the truth", "beyond the reference"],
)
def test_copy_paste_on_constructed_embeddings(output: float, expected: float) -> None:
    score = metrics.copy_paste(at(output), truth=at(40), reference=at(0))
    assert score.tolist() == pytest.approx([expected], abs=2e-3)


def test_copy_paste_is_finite_if_truth_and_reference_agree() -> None:
    score = metrics.copy_paste(at(30), truth=at(10), reference=at(10))
    assert score.tolist() == pytest.approx([0.0], abs=1e-4)
    assert metrics.copy_paste(at(1), at(0.01), at(0), smallest=1.0).abs().item() < 1e-2


def test_rank1_needs_the_right_person() -> None:
    gallery = at(0, 90, 180)
    assert metrics.rank1(at(10, 80, 170, 100), gallery, torch.tensor([0, 1, 1, 1])).tolist() == [1, 1, 0, 1]


def test_found_compares_every_letter() -> None:
    asked = {"letters": "HI", "scene": "beach", "gaze": "left"}
    read = {"letters": "HJ", "scene": "beach"}
    assert metrics.found(asked, read) == {"letters": False, "scene": True, "gaze": False}


def test_only_unrequested_attributes_of_the_reference_can_leak() -> None:
    asked = {"expression": "sad", "scene": "beach", "clothes": "suit", "headwear": "cap"}
    reference = {"expression": "smiling", "scene": "beach", "clothes": "hoodie", "headwear": "none"}
    read = {"expression": "smiling", "scene": "beach", "clothes": "suit", "headwear": "none"}
    assert metrics.leaked(asked, reference, read) == {"expression": True, "clothes": False}


def test_bootstrap_interval_matches_the_normal_approximation() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    low, high = metrics.bootstrap(values)
    error = float(values.std()) / math.sqrt(len(values))
    assert low == pytest.approx(float(values.mean()) - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(float(values.mean()) + 1.96 * error, abs=0.3 * error)
    assert metrics.bootstrap(values) == (low, high)
    assert metrics.bootstrap(torch.full((5,), 0.25)) == (0.25, 0.25)


# --- the suite --------------------------------------------------------------------------------------------------------
def test_the_suite_is_large_and_its_first_prompts_request_every_attribute() -> None:
    assert len(PORTRAITS) >= 65
    assert len({prompt.text for prompt in PORTRAITS}) == len(PORTRAITS)
    assert {name for prompt in PORTRAITS[:13] for name in prompt.asked} == {*ATTRIBUTES, "letters"}
    assert len(SUITES["portraits"][0].asked) >= 1
    with pytest.raises(ConfigError, match="portraits"):
        load_suite("portrait")


def test_sentences_use_the_phrases_of_the_world() -> None:
    phrases = {**PHRASES, "style": STYLE_PHRASES}
    for prompt in PORTRAITS:
        for name, word in prompt.asked.items():
            said = phrases.get(name, {}).get(word, (f'"{word}"' if name == "letters" else word,))
            assert any(phrase in prompt.text for phrase in said), (prompt.text, name, word)


def test_contexts_show_the_requested_attributes_and_are_plain_otherwise() -> None:
    asked = [prompt.asked for prompt in PORTRAITS]
    contexts = contexts_for(asked, range(seeds.HELD_OUT.start, seeds.HELD_OUT.start + len(asked)))
    shown = attributes(sample_people(range(len(asked))), contexts)
    for wanted, row in zip(asked, shown, strict=True):
        assert {name: row[name] for name in wanted} == dict(wanted)
        if "style" not in wanted:
            assert row["style"] == "photo"
        if "headwear" not in wanted:
            assert row["headwear"] == "none"
        if "letters" in wanted:
            assert row["clothes"] in ("t-shirt", "hoodie")
        else:
            assert row["letters"] == ""


def test_people_are_held_out_and_no_picture_is_used_twice() -> None:
    chosen = cases.make_cases(PORTRAITS[:PROMPTS], PEOPLE, seed=0, gallery=6)
    assert (len(chosen), len(chosen.people), chosen.person.tolist()) == (12, 6, [0] * 4 + [1] * 4 + [2] * 4)
    held_out = sample_people(range(seeds.HELD_OUT.start, seeds.HELD_OUT.start + 6))
    assert torch.equal(chosen.people.skin, held_out.skin)
    zoom = torch.cat([getattr(chosen, name).zoom for name in ("references", "gallery", "truths", "ceilings")])
    assert len(zoom.unique()) == len(zoom)
    assert not torch.equal(cases.make_cases(PORTRAITS[:1], PEOPLE, seed=1, gallery=6).people.skin, held_out.skin)


# --- whole runs -------------------------------------------------------------------------------------------------------
def test_a_perfect_pipeline_scores_like_the_ceiling(straight: tuple[dict[str, Any], Path]) -> None:
    rows = straight[0]["rows"]
    for name in rows["full"]:
        # The picture files round values to 8 bits, and one of the 12 pictures may find another of the 6 people.
        close = 0.1 if name == "rank1" else 0.05
        assert rows["full"][name]["value"] == pytest.approx(rows["ceiling"][name]["value"], abs=close), name
    assert rows["detached"]["sim_gt"]["value"] < rows["full"]["sim_gt"]["value"]


def test_a_copying_pipeline_scores_like_the_copy_row(judge: Judge, tmp_path: Path) -> None:
    summary = evaluated(Oracle(copies=True), tmp_path, judge, rows=("full",))
    for name, numbers in summary["rows"]["full"].items():
        assert numbers["value"] == pytest.approx(summary["rows"]["copy"][name]["value"], abs=0.05), name
    assert summary["rows"]["full"]["sim_ref"]["value"] > summary["rows"]["ceiling"]["sim_ref"]["value"]
    assert "detached" not in summary["rows"]


def test_the_version_of_the_suite_is_that_of_the_prompts_in_use() -> None:
    assert [suite_version(count) for count in (1, 13, 63, 64, 65)] == [1, 1, 1, 2, 2]
    assert PORTRAITS[63].asked["letters"] == "GO" and suite_version() == 2


def test_the_report_has_the_documented_fields(straight: tuple[dict[str, Any], Path]) -> None:
    summary, folder = straight
    stored = json.loads((folder / "report.json").read_text())
    assert stored == json.loads(json.dumps(summary))
    facts = {name: stored[name] for name in ("suite", "identities", "prompts", "seed", "gallery")}
    assert facts == {"suite": "portraits", "identities": 3, "prompts": 4, "seed": 0, "gallery": 6}
    assert stored["world"] == VERSION and stored["notes"] == [] and stored["suite_version"] == 1
    assert set(stored["metrics"]) == {
        *scores.MAIN, "leakage", "sim_gt_traits", "rank1_traits",
    }  # fmt: skip  # no prompt asks for letters
    for numbers in stored["metrics"].values():
        assert set(numbers) == {"value", "low", "high", "ceiling", "floor"}
        assert numbers["low"] <= numbers["value"] <= numbers["high"]
    assert list(stored["rows"]) == ["full", "detached", "ceiling", "other", "copy"]
    assert stored["metrics"]["copy_paste"]["floor"] == stored["rows"]["copy"]["copy_paste"]["value"]
    assert stored["attributes"]["yaw"]["asked"] == PEOPLE
    assert set(stored["leakage"]["all"]) == {"possible", *stored["rows"]}


def test_the_commit_is_none_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "PACKAGE", tmp_path / "imagine")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run_folder.commit() is None


def test_the_commit_is_never_that_of_another_repository_and_marks_changed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        known = ["git", "-c", "user.name=somebody", "-c", "user.email=somebody@example.org", *words]
        return subprocess.run(known, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    file, installed = (tmp_path / folder / "imagine" / "evaluate.py" for folder in (".", "venv/site-packages"))
    for each in (file, installed):
        each.parent.mkdir(parents=True)
        each.write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "First.")
    monkeypatch.setattr(run_folder, "PACKAGE", file.parent)
    assert run_folder.commit() == git("rev-parse", "HEAD")
    file.write_text("changed")
    assert run_folder.commit() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setattr(run_folder, "PACKAGE", installed.parent)
    assert run_folder.commit() is None


def test_every_picture_has_its_line(straight: tuple[dict[str, Any], Path]) -> None:
    folder = straight[1]
    lines = [json.loads(line) for line in (folder / "pictures.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * PEOPLE * PROMPTS
    assert all((folder / line["file"]).is_file() for line in lines)
    assert lines[5]["text"] == PORTRAITS[1].text
    assert lines[5]["asked"] == PORTRAITS[1].asked
    mean = sum(line["sim_gt"] for line in lines[: PEOPLE * PROMPTS]) / (PEOPLE * PROMPTS)
    assert mean == pytest.approx(straight[0]["metrics"]["sim_gt"]["value"], abs=1e-3)


def test_the_page_shows_every_row_and_attribute(straight: tuple[dict[str, Any], Path]) -> None:
    summary, folder = straight
    page = (folder / "report.html").read_text()
    titles = [report.TITLES[name] for name in summary["metrics"]]
    for title in (*titles, *report.ROW_TITLES.values()):
        assert markup.escape(title) in page
    for name in (*summary["attributes"], *summary["groups"]):
        assert f"<td>{name.replace('_', ' ')}</td>" in page
    value = summary["metrics"]["sim_gt"]["value"]
    assert f"<td>{value:.3f}</td>" in page
    assert (folder / "samples.png").is_file()


def test_an_interrupted_run_resumes_to_the_same_report(
    straight: tuple[dict[str, Any], Path], judge: Judge, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluated(Oracle(killed_after=9), tmp_path, judge)
    again = Oracle()
    summary = evaluated(again, tmp_path, judge)
    assert len(again.drawn) == 2 * PEOPLE * PROMPTS - 9
    for name in ("metrics", "rows", "attributes", "groups", "leakage"):
        assert summary[name] == straight[0][name]
    finished = Oracle(killed_after=0)
    assert evaluated(finished, tmp_path, judge)["metrics"] == summary["metrics"]
    assert finished.enrolled == []


def test_a_real_pipeline_is_evaluated_the_same_in_any_batch(judge: Judge, tmp_path: Path) -> None:
    pipeline = tiny.pipeline()
    settings: dict[str, Any] = {"identities": 2, "prompts": 2, "gallery": 3, "judge": judge}
    summary = evaluate.run(pipeline, tmp_path / "one", batch=4, options={"num_inference_steps": 2}, **settings)
    again = evaluate.run(pipeline, tmp_path / "two", batch=1, options={"num_inference_steps": 2}, **settings)
    for row in ("full", "detached"):
        for name in scores.MAIN:
            one, two = summary["rows"][row][name]["value"], again["rows"][row][name]["value"]
            assert one == pytest.approx(two, abs=0.02), (row, name)
    pictures = {
        row: [run_folder.read_picture(path) for path in sorted((tmp_path / "one" / "pictures" / row).iterdir())]
        for row in ("full", "detached")
    }
    differ = [not torch.equal(a, b) for a, b in zip(pictures["full"], pictures["detached"], strict=True)]
    assert all(differ)  # the reference affects the picture
    assert torch.equal(pipeline.components["unet"].conv_in.weight, tiny.pipeline().components["unet"].conv_in.weight)


def test_another_evaluation_is_not_mixed_in(straight: tuple[dict[str, Any], Path], judge: Judge) -> None:
    changed = Oracle()
    torch.nn.init.zeros_(changed.components["unet"].weight)
    with pytest.raises(ConfigError, match="other weights: choose another --output"):
        evaluated(changed, straight[1], judge)
    slower = Oracle()
    slower.config = {"default_steps": 5}
    with pytest.raises(ConfigError, match="other weights"):
        evaluated(slower, straight[1], judge)
    with pytest.raises(ConfigError, match="other seed"):
        evaluated(Oracle(), straight[1], judge, seed=1)


@pytest.mark.parametrize(
    "wrong",
    [{"identities": 1}, {"identities": 1001}, {"prompts": 0}, {"prompts": 999}, {"rows": ("ful",)}, {"rows": ()}],
)
def test_wrong_counts_and_rows_are_one_sentence(judge: Judge, tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be (evaluated|drawn): .*\.$"):
        evaluated(Oracle(), tmp_path, judge, **wrong)
    assert not list(tmp_path.iterdir())


def a_file(folder: Path) -> Path:
    (folder / "taken").write_text("")
    return folder / "taken"


def below_a_file(folder: Path) -> Path:
    return a_file(folder) / "below"


def cut_note(folder: Path) -> Path:
    (folder / "evaluation.json").write_text("{")
    return folder


def other_note(folder: Path) -> Path:
    (folder / "evaluation.json").write_text("[7]")
    return folder


@pytest.mark.parametrize("make", [a_file, below_a_file, cut_note, other_note])
def test_an_output_that_cannot_be_used_is_one_sentence(
    judge: Judge, tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    with pytest.raises(ConfigError, match=r"--output( folder)?\.$") as caught:
        evaluated(Oracle(), make(tmp_path), judge)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_written_is_one_sentence_and_one_that_cannot_be_read_is_listed(
    judge: Judge, tmp_path: Path
) -> None:
    (tmp_path / "pictures").write_text("in the way of a folder")
    with pytest.raises(ConfigError, match="cannot be written"):
        evaluated(Oracle(), tmp_path, judge)
    (tmp_path / "pictures").unlink()
    (tmp_path / "pictures" / "full").mkdir(parents=True)
    (tmp_path / "pictures" / "full" / "000_00.png").write_text("no picture")
    summary = evaluated(Oracle(), tmp_path, judge)
    assert list(summary["unreadable"]) == ["pictures/full/000_00.png"]
    assert "delete it, and the run draws it again" in summary["unreadable"]["pictures/full/000_00.png"]
    assert summary["notes"][0].startswith("1 picture could not be read and counts")
    line = json.loads((tmp_path / "pictures.jsonl").read_text().splitlines()[0])
    assert (line["readable"], line["prompt"], line["sim_gt"], line["rank1"], line["copy_paste"]) == (False, 0, 0, 0, 0)
    assert "000_00.png" in (tmp_path / "report.html").read_text()


def test_every_seed_gives_noise_and_the_noise_is_pinned() -> None:
    assert run_folder.generator_for(3, 5).initial_seed() == 3 * 1_000_003 + 5
    last = 2**63 - 1  # the largest that the command line accepts
    assert run_folder.generator_for(last, 5).initial_seed() != run_folder.generator_for(last, 6).initial_seed()


# --- contact sheets ---------------------------------------------------------------------------------------------------
def test_a_contact_sheet_places_every_picture_under_its_header() -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("#ff0000", "#0000ff"))
    rows = [[report.Cell(red), report.Cell(blue, [("yes", True)])], [report.Cell(blue), report.Cell(red)]]
    sheet = report.contact_sheet(["one", "a header of several words"], rows, side=40)
    colours: dict[tuple[int, ...], int] = {(255, 0, 0): 0, (0, 0, 255): 0}
    for count, colour in sheet.getcolors(sheet.width * sheet.height) or []:
        if isinstance(colour, tuple) and colour in colours:
            colours[colour] = count
    assert colours == {(255, 0, 0): 2 * 40 * 40, (0, 0, 255): 2 * 40 * 40}


def test_conversion_to_pil_and_back_is_exact() -> None:
    picture = torch.arange(3 * 4 * 5).view(3, 4, 5) / 255
    assert torch.equal(report.to_tensor(report.to_pil(picture)), picture)
