"""`imagine evaluate`: what it announces and prints, and what it refuses."""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from imagine.cli.evaluate import Announcement, duration
from imagine.evaluation import evaluate
from imagine.evaluation.people import evaluate as group_evaluate
from imagine.evaluation.people.suites import GROUP_SUITES
from tests import tiny
from tests.commands import Run, assert_refused, terminal


@pytest.fixture
def short(weights: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of an evaluation of four pictures, two people with one prompt in two rows."""
    monkeypatch.setattr(evaluate, "run", functools.partial(evaluate.run, gallery=3, options={"num_inference_steps": 2}))
    return ["evaluate", "--weights", weights, "--identities", "2", "--prompts", "1"]


def test_the_number_of_pictures_and_the_time_are_announced(run: Run, short: list[Any], tmp_path: Path) -> None:
    code, out, err = run(*short, "--output", tmp_path)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "Drawing 4 pictures. The first batch will show how long that takes."
    assert re.fullmatch(r"Drawing takes [\d.]+ s a picture: about \d+ seconds left\.", lines[1])
    assert re.search(r"^metric +value +95 % interval +ceiling +floor$", out, re.MULTILINE)
    assert re.search(r"^Rank-1.* {2,}\d\.\d{3} +\d\.\d{3} to \d\.\d{3} ", out, re.MULTILINE)
    assert lines[-1] == f"Report: {tmp_path / 'report.html'}"
    (tmp_path / "pictures" / "full" / "000_00.png").unlink()
    out = run(*short, "--output", tmp_path)[1]
    assert out.startswith("Drawing 1 picture; an earlier run drew the other 3.")
    assert run(*short, "--output", tmp_path)[1].startswith("An earlier run drew all 4 pictures.")


def test_progress_appears_on_a_terminal(
    run: Run, short: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(monkeypatch) as progress:
        code, out, _ = run(*short, "--output", tmp_path)
    assert code == 0 and out.startswith("Drawing 4 pictures.")
    stages = ["loading the model", "rendering the references", "drawing", "judging the gallery", "judging row detached"]
    assert all(stage in progress[0] for stage in stages) and "0/4" in progress[0]


def test_json_comes_alone(run: Run, short: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as progress:
        code, out, _ = run(*short, "--output", tmp_path, "--json")
    assert code == 0 and progress == [""] and json.loads(out)["identities"] == 2


def test_the_suite_of_several_people_prints_its_metrics(
    run: Run, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {n: (replace(GROUP_SUITES["people"][n][0], text=text),) for n, text in tiny.GROUP_SENTENCES.items()}
    monkeypatch.setattr(group_evaluate, "GROUP_SUITES", {"people": short})
    monkeypatch.setattr(group_evaluate, "same_person_threshold", lambda *_: 0.5)
    options = ["--weights", weights, "--suite", "people", "--identities", "2", "--prompts", "1"]
    code, out, err = run("evaluate", *options, "--output", tmp_path)
    assert (code, err) == (0, "") and out.startswith("Drawing 5 pictures.")  # 2 pairs, both exchanged, 1 triple
    for name in ("Present", "Doubled", "Assigned", "Attributes", "Exchanged"):
        assert re.search(rf"^{name}: .* {{2,}}\d\.\d{{3}} +\d\.\d{{3}} to \d\.\d{{3}} ", out, re.MULTILINE), name
    code, _, err = run("evaluate", *options[:-1], "6", "--output", tmp_path)
    assert code == 2 and "6 prompts cannot be evaluated" in err


def test_the_time_left_follows_from_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    clock = iter([100.0, 132.0])
    monkeypatch.setattr("imagine.cli.evaluate.time", SimpleNamespace(monotonic=lambda: next(clock)))
    announcement = Announcement(lambda *_: None, printed.append)
    for done in (26, 42, 58):
        announcement("drawing", done, 1326)
    assert printed == [
        "Drawing 1,300 pictures; an earlier run drew the other 26. The first batch will show how long that takes.",
        "Drawing takes 2 s a picture: about 43 minutes left.",
    ]
    assert [duration(each) for each in (42, 1200, 10_000)] == ["42 seconds", "20 minutes", "2.8 hours"]


def test_evaluate_checks_its_output_before_it_loads_anything(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    for output in (tmp_path / "model_index.json", tmp_path / "model_index.json" / "below"):
        code, out, err = run("evaluate", "--weights", tmp_path, "--output", output)
        assert_refused(code, out, err)
        assert "choose another" in err and "JSON" not in err
