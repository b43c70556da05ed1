"""The human study: its trials, the blind store, the results, and the page in a real browser."""

import csv
import hashlib
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from imagine.errors import ConfigError
from imagine.evaluation.study.results import results, to_csv
from imagine.evaluation.study.server import StudyServer
from imagine.evaluation.study.store import FILE, Answer, GoneError, Study, create
from imagine.evaluation.study.trials import PASSES, QUESTIONS, Trial, make_trials
from tests.browser import PHONE, OpenPage, served
from tests.commands import Run, assert_refused
from tests.imagine.evaluation.evaluation_folders import write_evaluation


@pytest.fixture
def evaluations(tmp_path: Path) -> dict[str, Path]:
    return {
        "secret-one": write_evaluation(tmp_path / "one", "one"),
        "secret-two": write_evaluation(tmp_path / "two", "two", 0.3),
    }


@pytest.fixture
def study(tmp_path: Path, evaluations: dict[str, Path]) -> Study:
    create(tmp_path / FILE, make_trials(evaluations, cases=2))
    return Study(tmp_path / FILE, opinions=2)


# --- trials -----------------------------------------------------------------------------------------------------------
def test_every_picture_gets_three_questions_and_every_two_systems_three_more(evaluations: dict[str, Path]) -> None:
    trials = make_trials(evaluations)
    own = [trial for trial in trials if not trial.expected]
    assert (
        len([t for t in own if len(t.systems) == 1]) == 8 * 2 * 3 and len([t for t in own if len(t.systems) == 2]) == 24
    )
    assert {trial.question for trial in own} == set(QUESTIONS)
    checks = [trial for trial in trials if trial.expected]
    assert len(checks) == 8 and {check.expected for check in checks} == {"strong", "fail"}
    for check in checks:
        assert (check.pictures[0] == check.reference) == (check.expected == "strong")
    assert make_trials(evaluations, cases=3) == make_trials(evaluations, cases=3)
    assert len({trial.case for trial in make_trials(evaluations, cases=3) if not trial.expected}) == 3


def test_evaluations_that_do_not_fit_are_refused(tmp_path: Path, evaluations: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="name the folder of an evaluation"):
        make_trials({})
    with pytest.raises(ConfigError, match="holds no finished evaluation"):
        make_trials({"x": tmp_path})
    other = write_evaluation(tmp_path / "other", "other", seed=4)
    with pytest.raises(ConfigError, match="another seed: evaluate both alike"):
        make_trials({**evaluations, "other": other})


# --- the store --------------------------------------------------------------------------------------------------------
def test_the_study_is_blind_and_raters_have_orders_and_sides_of_their_own(study: Study) -> None:
    ann, bob = study.state("Ann"), study.state("Bob")
    assert ann["progress"]["trials"] == 2 * 6 + 2 * 3 + 2 == len(ann["open"])
    assert sorted(ann["open"]) == sorted(bob["open"]) and ann["open"] != bob["open"]
    shown = [(study.trial(n, "Ann"), study.trial(n, "Bob")) for n in ann["open"]]
    assert "secret" not in json.dumps(shown) and "check" not in json.dumps(shown)
    pairs = [(a["pictures"], b["pictures"]) for a, b in shown if a["kind"] == "pair"]
    assert any(a == b[::-1] for a, b in pairs) and all(sorted(a) == sorted(b) for a, b in pairs)
    assert study.picture(shown[0][0]["reference"]).startswith(b"\x89PNG")
    with pytest.raises(GoneError):
        study.picture("0" * 64)
    with pytest.raises(GoneError):
        study.trial(999, "Ann")


def test_answers_are_stored_by_system_whatever_the_side(study: Study) -> None:
    pair = next(n for n in study.state("Ann")["open"] if study.trial(n, "Ann")["kind"] == "pair")
    raters = [f"rater {number}" for number in range(8)]
    for rater in raters:
        study.answer(pair, rater, "left")
        assert study.trial(pair, rater)["mine"] == "left"
    given = {each.rater: (each.answer, each.left) for each in study.answers()}
    assert all(answer == left for answer, left in given.values()) and {a for a, _ in given.values()} == {"a", "b"}
    with pytest.raises(ConfigError, match="give left, tie, right"):
        study.answer(pair, "Ann", "strong")
    with pytest.raises(ConfigError, match="1 to 40 characters"):
        study.answer(pair, "  ", "left")


def test_a_trial_closes_after_its_opinions_and_undo_opens_it(study: Study) -> None:
    first = next(n for n in study.state("Ann")["open"] if study.trial(n, "Ann")["kind"] == "pair")
    study.answer(first, "Bob", "tie")
    study.answer(first, "Cy", "right")
    assert first not in study.state("Ann")["open"]
    study.answer(first, "Cy", "left")  # a changed answer counts once
    assert len(study.answers()) == 2
    assert study.undo("Cy") == first and study.undo("Cy") is None
    assert first in study.state("Ann")["open"]


def test_a_study_can_be_extended_and_another_file_is_refused(
    study: Study, evaluations: dict[str, Path], tmp_path: Path
) -> None:
    study.answer(study.state("Ann")["open"][0], "Ann", _first_answer(study))
    before = study.state("Ann")["progress"]["trials"]
    create(study.database, make_trials(evaluations, cases=2))
    assert study.state("Ann")["progress"]["trials"] == before
    create(study.database, make_trials(evaluations))
    assert study.state("Ann")["progress"]["trials"] > before and len(study.answers()) == 1
    (tmp_path / "x.sqlite").write_text("not a database, but long enough to look like a file")
    with pytest.raises(ConfigError, match="cannot be used"):
        Study(tmp_path / "x.sqlite").state("Ann")
    with pytest.raises(ConfigError, match="There is no study"):
        Study(tmp_path / "nothing.sqlite").state("Ann")


def _first_answer(study: Study) -> str:
    return "tie" if study.trial(study.state("Ann")["open"][0], "Ann")["kind"] == "pair" else "weak"


# --- results ----------------------------------------------------------------------------------------------------------
def answer(rater: str, given: str, case: str, systems: tuple[str, ...] = ("ours",), expected: str = "") -> Answer:
    return Answer(rater, given, case, "identity", systems, expected, "a" if len(systems) == 2 else "", 2.0, "now")


def test_results_on_known_answers() -> None:
    two = ("ours", "theirs")
    answers = [
        *(answer(rater, "strong", f"c{n}") for rater in ("Ann", "Bob") for n in range(4)),
        answer("Ann", "fail", "c4"), answer("Bob", "weak", "c4"),
        *(answer("Ann", given, f"c{n}", two) for n, given in enumerate(("a", "a", "tie", "b"))),
        *(answer("Cy", "fail", f"c{n}") for n in range(5)), answer("Cy", "strong", "k", ("check",), "fail"),
        answer("Ann", "weak", "k", ("check",), "strong"),
    ]  # fmt: skip
    found = results(answers)
    assert found["raters"]["Cy"] == {"answers": 5, "checks": 1, "passed": 0.0, "kept": False}
    assert found["raters"]["Ann"]["kept"] and found["raters"]["Bob"]["passed"] is None
    own = found["standalone"]["ours"]["identity"]
    assert (own["answers"], own["strong"], own["weak"], own["fail"]) == (10, 8, 1, 1)
    assert own["pass"]["value"] == 0.9 and own["pass"]["wilson"] == pytest.approx([0.5958, 0.9821], abs=1e-3)
    low, high = own["pass"]["bootstrap"]
    assert 0.5 < low < 0.9 < high <= 1
    wins = found["head_to_head"]["ours against theirs"]["identity"]
    assert [wins[name]["value"] for name in ("win", "tie", "lose")] == [0.5, 0.25, 0.25]
    agreed = found["agreement"]["standalone"]["identity"]
    assert (
        agreed["items"] == 5
        and agreed["share"] == pytest.approx(0.8)
        and agreed["pairs"][0]["raters"] == ["Ann", "Bob"]
    )
    assert results([])["standalone"] == {}
    lines = list(csv.DictReader(io.StringIO(to_csv([answer("=Ann", "a", "c0", two)]))))
    assert lines[0]["rater"] == "'=Ann" and lines[0]["system_b"] == "theirs" and lines[0]["answer"] == "a"


# --- the server and the page ------------------------------------------------------------------------------------------
@pytest.fixture
def address(study: Study) -> Iterator[str]:
    with served(StudyServer(study, port=0)) as address:
        yield address


def test_the_server_refuses_what_is_not_its_page(address: str) -> None:
    def status(path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if body is not None else {}
        request = urllib.request.Request(address.rstrip("/") + path, data, {**kind, **headers})
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["error"]

    assert status("/api/state?rater=Ann")[0] == 200
    assert status("/api/state")[0] == 400 and status("/nothing")[0] == 404 and status("/api/answers")[0] == 405
    assert status("/api/state?rater=Ann", Host="evil.example")[0] == 403
    assert status("/api/answers", {"rater": "Ann", "trial": 1, "answer": "x"}, Origin="http://evil.example")[0] == 403
    assert status("/api/answers", {"rater": "Ann", "trial": 10_000, "answer": "tie"})[0] == 404
    assert status("/api/answers", {"rater": "Ann", "trial": 1, "answer": "strong", "seconds": -1})[0] == 400
    code, sentence = status("/api/answers", {"rater": "Ann", "trial": 1, "answer": "perfect"})
    assert code == 400 and sentence.startswith("There is no answer 'perfect'")
    assert status("/api/answers", {"rater": "Ann", "trial": 1, "answer": "strong", "seconds": 1.5})[0] == 200


def ready(page: Page) -> Page:
    page.wait_for_selector("body:not([aria-busy])")
    return page


def test_a_rater_answers_everything_in_the_browser(open_page: OpenPage, address: str, study: Study) -> None:
    page = open_page(address)
    expect(page.locator("#who-dialog")).to_be_visible()
    page.fill("#name", "Ann")
    page.keyboard.press("Enter")
    expect(page.locator("#trial")).to_be_visible()
    ready(page)
    total = study.state("Ann")["progress"]["trials"]
    kinds = set()
    for number in range(total):
        kinds.add(page.text_content("#first-name"))
        assert page.evaluate("document.getElementById('first').naturalWidth") == 48
        page.keyboard.press("1" if number % 2 else "3")
        ready(page)
    expect(page.locator("#finished")).to_be_visible()
    assert kinds == {"Left", "Picture"} and len(study.answers()) == total
    assert page.text_content("#counts") == f"{total} of {total} answered"
    page.keyboard.press("u")
    ready(page)
    expect(page.locator("#trial")).to_be_visible()
    page.click("#answer-2")
    ready(page)
    assert {each.answer for each in study.answers()} <= {*PASSES, "a", "tie", "b"}
    assert all(each.seconds >= 0 for each in study.answers())


def test_the_page_fits_a_phone_and_shows_prompts_as_text(
    open_page: OpenPage, address: str, study: Study, evaluations: dict[str, Path]
) -> None:
    markup = "<img src=x onerror=\"document.title='owned'\"> & more"
    picture = evaluations["secret-one"] / "pictures" / "full" / "000_00.png"
    create(study.database, [Trial("z", "appeal", markup, ("secret-one",), picture, (picture,))])
    page = open_page(f"{address}?rater=Bob", viewport=PHONE, has_touch=True)
    ready(page)
    for _ in range(study.state("Bob")["progress"]["open"]):
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert page.locator("#answer-3").bounding_box()["y"] < PHONE["height"]  # type: ignore[index]
        if page.text_content("#prompt") == f"Prompt: {markup}":
            break
        page.tap("#answer-1")
        ready(page)
    assert page.text_content("#prompt") == f"Prompt: {markup}" and page.title() != "owned"


# --- the command ------------------------------------------------------------------------------------------------------
def test_the_command_makes_a_study_and_reports_it(run: Run, tmp_path: Path, evaluations: dict[str, Path]) -> None:
    folder, pictures = tmp_path / "study", [f"--pictures={name}={path}" for name, path in evaluations.items()]
    code, out, err = run("study", folder, *pictures, "--cases", "2", "--results")
    assert (code, err) == (0, "") and (folder / FILE).is_file()
    study = Study(folder / FILE)
    files = (evaluations["secret-one"] / "pictures" / "reference").iterdir()
    references = {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    for number in study.state("Ann")["open"]:
        study.answer(number, "Ann", "left" if study.trial(number, "Ann")["kind"] == "pair" else "strong")
    code, out, _ = run("study", folder, "--results")  # Ann passes everything, another person too
    assert code == 0 and "Left out, because they failed attention checks: Ann." in out
    for number in study.state("Bob")["open"]:
        trial = study.trial(number, "Bob")
        is_stranger = trial["kind"] == "single" and trial["pictures"][0] in references - {trial["reference"]}
        study.answer(number, "Bob", "left" if trial["kind"] == "pair" else "fail" if is_stranger else "strong")
    code, out, _ = run("study", folder, "--results")
    assert code == 0 and "secret-one" in out and "100 %" in out.replace("100%", "100 %") and "first wins" in out
    assert json.loads((folder / "results.json").read_text())["raters"]["Ann"]["checks"] == 2
    assert len((folder / "answers.csv").read_text().splitlines()) == 1 + len(study.answers())
    assert_refused(*run("study", tmp_path / "none", "--results"))
    assert_refused(*run("study", folder, "--pictures", "ours", "--results"))
