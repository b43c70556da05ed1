"""Comparing systems by their reports: paired differences, adjusted tests, the page, and reports that do not fit."""

import json
from pathlib import Path

import pytest

from imagine.errors import ConfigError
from imagine.evaluation.compare import compare
from tests.commands import Run, assert_refused
from tests.imagine.evaluation.evaluation_folders import write_evaluation


def test_systems_are_compared_over_the_same_people(tmp_path: Path) -> None:
    ours = write_evaluation(tmp_path / "a", "ours", 0.2)
    same, worse = write_evaluation(tmp_path / "b", "same", 0.2), write_evaluation(tmp_path / "c", "worse")
    found = compare([ours, same, worse], tmp_path / "out")
    own = found["differences"]["sim_gt"]
    assert (found["first"], list(found["systems"])) == ("ours", ["ours", "same", "worse"])
    assert own["same"]["value"] == 0 and own["same"]["p"] == 1
    assert own["worse"]["value"] == pytest.approx(0.2) and own["worse"]["low"] == pytest.approx(0.2)
    assert own["worse"]["p"] == pytest.approx(2 / 2**4) and own["worse"]["p_adjusted"] == pytest.approx(4 / 2**4)
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == json.loads(json.dumps(found))
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "ours − worse" in page and "+0.200" in page and "2.05e+03" in page


def test_reports_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    ours = write_evaluation(tmp_path / "a", "ours")
    with pytest.raises(ConfigError, match="name at least two"):
        compare([ours])
    with pytest.raises(ConfigError, match="another prompts, seed: evaluate both alike"):
        compare([ours, write_evaluation(tmp_path / "b", "b", seed=1, prompts=3)])
    with pytest.raises(ConfigError, match="another suite_version: evaluate"):
        compare([ours, write_evaluation(tmp_path / "second", "second", suite_version=2)])
    assert compare([ours, write_evaluation(tmp_path / "first", "first", suite_version=1)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no report of this version"):
        compare([ours, tmp_path / "empty"])
    twin = write_evaluation(tmp_path / "c" / "a", "ours")
    with pytest.raises(ConfigError, match="Two folders are named a"):
        compare([ours, twin])


def test_the_command_prints_the_differences(run: Run, tmp_path: Path) -> None:
    ours, other = write_evaluation(tmp_path / "a", "ours", 0.1), write_evaluation(tmp_path / "b", "other")
    code, out, err = run("compare", ours, other, "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == [
        "metric",
        "ours",
        "minus",
        "difference",
        "95",
        "%",
        "interval",
        "adjusted",
        "p",
    ]
    assert "+0.100" in out and out.splitlines()[-1] == f"Page: {tmp_path / 'out' / 'compare.html'}"
    assert_refused(*run("compare", ours))
