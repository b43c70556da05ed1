"""The shipped judge on pictures whose scores are known: real, copied, of strangers, and with other prompts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from imagine.evaluation import breakdown
from imagine.evaluation.cases import Cases, Judged, JudgedReal, judge_pictures, judge_real_pictures, make_cases
from imagine.evaluation.evaluate import run
from imagine.evaluation.judge import Judge
from imagine.evaluation.report import to_pil
from imagine.evaluation.scores import TABLE, other_metrics, score, summarise, weights
from imagine.evaluation.suites import PORTRAITS
from imagine.evaluation.systems.finished import FinishedPictures
from imagine.world import render

PEOPLE, GALLERY = 8, 40
PROMPTS = (PORTRAITS[0], PORTRAITS[4], PORTRAITS[10])  # expression, clothes, letters


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.from_pretrained()


@pytest.fixture(scope="module")
def cases() -> Cases:
    return make_cases(PROMPTS, PEOPLE, seed=0, gallery=GALLERY)


@pytest.fixture(scope="module")
def real(cases: Cases, judge: Judge) -> JudgedReal:
    return judge_real_pictures(cases, judge, scenes=True)


@pytest.fixture(scope="module")
def rows(cases: Cases, judge: Judge, real: JudgedReal) -> dict[str, Judged]:
    """Pictures of the person as asked ("full"), of the person with another prompt ("shuffled"), and the real rows."""
    order = torch.arange(len(cases)).view(PEOPLE, -1).roll(1, dims=1).flatten()  # the previous prompt of the person
    full = judge_pictures(judge, len(cases), lambda a, b: (drawn(cases)[a:b], None))
    return {"full": full, "shuffled": full[order], **real.rows}


def drawn(cases: Cases) -> Tensor:
    """Return real renders of every case, in 8 bits, as a pipeline's pictures are."""
    each = cases.people[: cases.identities].repeat(len(cases.prompts))
    return (render(each, cases.ceilings).images * 255).round() / 255


def means(cases: Cases, rows: dict[str, Judged], real: JudgedReal, row: str) -> dict[str, float]:
    counts = weights(cases, rows[row], real)
    values = score(cases, rows[row], real)
    return {name: float((values[name] * own).sum() / own.sum()) for name, own in counts.items()}


def test_real_renders_score_at_the_ceiling(cases: Cases, rows: dict[str, Judged], real: JudgedReal) -> None:
    full, ceiling = (means(cases, rows, real, row) for row in ("full", "ceiling"))
    for name, value in full.items():
        assert value == pytest.approx(ceiling[name], abs=0.06), name
    assert ceiling["sim_gt"] > 0.4 and ceiling["prompt"] > 0.8


def test_a_copied_reference_is_the_reference_and_a_copy(
    cases: Cases, rows: dict[str, Judged], real: JudgedReal
) -> None:
    copy, ceiling = (means(cases, rows, real, row) for row in ("copy", "ceiling"))
    assert copy["sim_ref"] == pytest.approx(1, abs=1e-4)
    assert copy["copy_paste"] == pytest.approx(1, abs=1e-3) and ceiling["copy_paste"] < 0.4
    assert copy["leakage"] > 0.8 > ceiling["leakage"]
    assert copy["letters"] == 0


def test_a_random_person_scores_chance(cases: Cases, rows: dict[str, Judged], real: JudgedReal) -> None:
    other, ceiling = (means(cases, rows, real, row) for row in ("other", "ceiling"))
    assert other["rank1"] <= 0.15  # chance among 40 people is 0.025
    assert abs(other["sim_gt"]) < 0.35 < ceiling["sim_gt"]
    assert other["prompt"] == pytest.approx(ceiling["prompt"], abs=0.12)  # strangers follow the prompt as well


def test_a_shuffled_prompt_lowers_the_prompt_score_only(
    cases: Cases, rows: dict[str, Judged], real: JudgedReal
) -> None:
    full, shuffled = (means(cases, rows, real, row) for row in ("full", "shuffled"))
    assert shuffled["prompt"] < full["prompt"] - 0.4
    assert shuffled["sim_gt"] == pytest.approx(full["sim_gt"], abs=0.15)


def test_two_recognisers_agree_and_groups_are_broken_down(
    cases: Cases, rows: dict[str, Judged], real: JudgedReal
) -> None:
    agreed = breakdown.agreement(rows, real)["traits"]
    assert (agreed["correlation"] or 0) > 0.4 and (agreed["kappa"] or 0) > 0.3
    table = (*TABLE, *other_metrics(["traits"]))
    scores = {row: score(cases, judged, real, table) for row, judged in rows.items()}
    counts = weights(cases, rows["full"], real, table)
    summary = summarise(scores, counts, table, 0)
    for name in ("sim_gt_traits", "rank1_traits"):
        assert summary["metrics"][name]["floor"] < summary["metrics"][name]["value"], name
    found = breakdown.people_table(cases.people[:PEOPLE], scores, counts, 0)
    for trait in ("skin", "age", "hair_style", "hair_colour"):
        assert sum(cell["people"] for cell in found["people_groups"][trait].values()) == PEOPLE
    shares = [
        (cell["sim_gt"]["value"] / cell["sim_gt"]["ceiling"], trait, word)
        for trait, groups in found["people_groups"].items()
        for word, cell in groups.items()
        if cell["people"] >= breakdown.FEWEST
    ]
    assert (found["worst_group"]["of_ceiling"], found["worst_group"]["trait"], found["worst_group"]["group"]) == min(
        shares
    )


def test_numbers_of_whole_rows(cases: Cases, rows: dict[str, Judged], real: JudgedReal) -> None:
    found = breakdown.distribution_table(cases, rows, real)
    assert found["full"]["kernel"]["value"] < found["copy"]["kernel"]["value"]
    assert found["full"]["frechet"]["value"] == pytest.approx(found["ceiling"]["frechet"]["value"], rel=0.2)
    spread = breakdown.diversity_table(cases, [rows["full"], rows["full"]], real, 0)
    assert spread is not None and spread["value"] == pytest.approx(0, abs=1e-5) and spread["ceiling"] > 0.01
    assert breakdown.diversity_table(cases, [rows["full"]], real, 0) is None
    disturbed = breakdown.disturbance_table(cases, {**rows, "detached": rows["full"]}, real, 0)
    assert disturbed is not None and disturbed["value"] == pytest.approx(0, abs=1e-5)
    assert 0 < disturbed["ceiling"] < disturbed["floor"]


def test_finished_pictures_are_judged_and_missing_ones_are_failures(cases: Cases, judge: Judge, tmp_path: Path) -> None:
    two = make_cases(PORTRAITS[:2], 2, seed=0, gallery=3)
    for case, picture in enumerate(drawn(two)):
        big = to_pil(picture).resize((256, 256), Image.Resampling.NEAREST)
        if case != 3:
            big.save(tmp_path / f"{case // 2:03}_{case % 2:02}.jpg", quality=95)
    summary: dict[str, Any] = run(
        FinishedPictures(tmp_path), tmp_path / "report", identities=2, prompts=2, judge=judge, gallery=3
    )
    assert next(iter(summary["rows"])) == "full" and "detached" not in summary["rows"]
    assert summary["unreadable"] == {"../001_01.png": "There is no picture 001_01.png."}
    assert summary["faces"]["full"] <= 0.75
    assert summary["people"]["prompt"][0] > summary["people"]["prompt"][1]
    (tmp_path / "001_01.jpg").write_bytes((tmp_path / "001_00.jpg").read_bytes())  # a picture that is added counts
    again = run(FinishedPictures(tmp_path), tmp_path / "report", identities=2, prompts=2, judge=judge, gallery=3)
    assert again["unreadable"] == {} and again["faces"]["full"] > summary["faces"]["full"]
