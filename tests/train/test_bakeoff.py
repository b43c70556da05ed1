"""The bake-off: equal times for all arms, resumable at any kill, decided by one number with its interval."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from imagine.errors import ConfigError
from tests.root import ROOT
from tests.toy_training import ToyTask
from train import bakeoff as bakeoffs
from train.ablation import FULL, arm_run, link_shared, load_arms
from train.bakeoff import Bakeoff, decided, images_for, main, measured_speed, table, write_table
from train.config import Stage
from train.stages import TASKS, resolved

ARMS = ROOT / "configs" / "bakeoff" / "arms.yaml"
TOYS = {"toy": ToyTask}


@pytest.fixture(scope="module")
def shipped() -> Bakeoff:
    return load_arms(ARMS, Bakeoff)


def test_every_arm_of_the_config_is_valid_and_changes_something(shipped: Bakeoff) -> None:
    plain = arm_run(shipped, FULL, 0)
    for name in shipped.arms:
        run, own = arm_run(shipped, name, 0), shipped.own_stages(name)
        for stage in own:
            resolved(stage, run.stages[stage], TASKS)
        changed = [stage for stage in run.stages if run.stages[stage] != plain.stages[stage]]
        assert set(changed) <= set(own) and bool(changed) == (name != FULL), name
    assert shipped.prompts * shipped.identities == 260


def test_the_arms_compare_what_the_recipe_leaves_open(shipped: Bakeoff) -> None:
    assert set(shipped.arms) >= {
        "full", "plain", "natural_words", "without_glyph", "without_letter_attention", "without_part_loss",
        "early_reader_loss", "more_noise", "small_denoiser", "short_average", "f16c32", "without_equivariance",
    }  # fmt: skip


def write_arms(folder: Path, **changes: Any) -> Path:
    """Write a recipe of two toy stages and a bake-off of two arms; return its file."""
    stage: dict[str, Any] = {
        "task": "toy", "train": {"both": 0.01}, "images": 40, "batch_size": 4, "precision": "fp32",
        "report_every_seconds": 0, "gates": {"score": 1000.0},
    }  # fmt: skip
    recipe = {"stages": {"first": stage, "second": {**stage, "start_from": ["first"]}}, "trackers": []}
    arms: dict[str, Any] = {
        "full": {},
        "slow": {"set": {"second.batch_size": 8}},
        "own": {"stages": ["first", "second"], "set": {"ema": 8}},
    }
    bakeoff = {
        "recipe": "recipe.yaml", "shared": ["first"], "stages": ["second"], "seconds": {"first": 0.3, "second": 0.4},
        "seeds": [0], "judge": "weights", "arms": arms, **changes,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "arms.yaml").write_text(yaml.safe_dump(bakeoff, sort_keys=False))
    return folder / "arms.yaml"


def train_all(bakeoff: Bakeoff, output: Path, minutes: float | None = None) -> bool:
    """Train the shared stage and all arms, without judging them."""
    trainer = bakeoffs._Trainer(bakeoff, output / "shared", minutes, TOYS)
    if not trainer.train(arm_run(bakeoff, FULL, 0), output / "shared", bakeoff.shared):
        return False
    for name in bakeoff.arms:
        run, folder = arm_run(bakeoff, name, 0), output / f"{name}-0"
        link_shared(bakeoff, name, run, output / "shared", folder)
        if not trainer.train(run, folder, bakeoff.own_stages(name)):
            return False
    return True


def read_budgets(output: Path) -> dict[str, str]:
    return {str(path.relative_to(output)): path.read_text() for path in output.rglob("*.budget.json")}


def test_stages_train_for_their_time_and_a_stopped_command_carries_on(tmp_path: Path) -> None:
    bakeoff = load_arms(write_arms(tmp_path), Bakeoff)
    assert not train_all(bakeoff, tmp_path / "out", minutes=0)  # stopped before its first step
    assert not list((tmp_path / "out").rglob("*.budget.json"))
    assert train_all(bakeoff, tmp_path / "out")
    budgets = read_budgets(tmp_path / "out")
    assert set(budgets) == {
        "shared/first.budget.json", "full-0/second.budget.json", "slow-0/second.budget.json",
        "own-0/first.budget.json", "own-0/second.budget.json",
    }  # fmt: skip
    for place, text in budgets.items():
        facts, stage = json.loads(text), place.removesuffix(".budget.json")
        done = json.loads((tmp_path / "out" / stage / "done.json").read_text())
        assert done["images"] == facts["images"] and facts["images"] % 4 == 0
        assert facts["measured"] >= 0.15 * facts["seconds"] and facts["images_per_second"] > 0
    assert (tmp_path / "out/full-0/first/done.json").samefile(tmp_path / "out/shared/first/done.json")
    # Done stages are not trained again; a budget that was fixed before a kill is kept.
    (tmp_path / "out/full-0/second/done.json").unlink()
    assert train_all(bakeoff, tmp_path / "out")
    assert read_budgets(tmp_path / "out") == budgets and (tmp_path / "out/full-0/second/done.json").exists()


def test_images_follow_from_the_time_that_is_left() -> None:
    stage = Stage.model_validate({"task": "toy", "train": {"both": 0.1}, "images": 40, "batch_size": 8})
    assert images_for(stage, 80, 2.0, 40.0, 10.0) == 400
    assert images_for(stage, 80, 20.0, 40.0, 10.0) == 88  # its time is over: one more step


def test_the_speed_is_that_of_compiled_networks(tmp_path: Path) -> None:
    rows = [{"images_per_second": value} for value in (1.0, 39.0, 40.0, 41.0)] + [{"validate/loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert measured_speed(tmp_path / "metrics.jsonl", 100, 10.0) == 40
    assert measured_speed(tmp_path / "missing.jsonl", 100, 10.0) == 10


def test_the_deciding_number_is_a_geometric_mean_with_paired_intervals() -> None:
    torch.manual_seed(0)
    likeness, prompt = (0.3 + 0.6 * torch.rand(20)).tolist(), (0.5 + 0.4 * torch.rand(20)).tolist()
    arm, better = (
        {"sim_gt": likeness, "prompt": prompt},
        {"sim_gt": [1.1 * each for each in likeness], "prompt": prompt},
    )
    mean = (sum(likeness) / 20 * sum(prompt) / 20) ** 0.5
    found = decided([arm])
    assert found["value"] == pytest.approx(mean, rel=1e-5) and found["low"] < mean < found["high"]
    gain = decided([better], [arm])
    assert gain["value"] == pytest.approx((1.1**0.5 - 1) * mean, rel=1e-4)
    assert gain["low"] > 0 and gain["high"] - gain["low"] < 0.3 * (found["high"] - found["low"])
    assert decided([{"sim_gt": [-0.2] * 20, "prompt": prompt}])["value"] == 0


def write_judged(folder: Path, likeness: float, letters: float) -> None:
    place = folder / "evaluation"
    place.mkdir(parents=True)
    rows = [
        {"row": "full", "identity": person, "prompt": 0.8, "sim_gt": likeness + 0.01 * person} for person in range(5)
    ]
    (place / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = {"metrics": {"sim_gt": {"ceiling": 0.8}, "prompt": {"ceiling": 0.9}},
              "attributes": {"letters": {"full": letters}}}  # fmt: skip
    (place / "report.json").write_text(json.dumps(report))


def test_the_table_has_the_best_arm_first_with_its_speed(tmp_path: Path) -> None:
    bakeoff = load_arms(write_arms(tmp_path), Bakeoff)
    write_judged(tmp_path / "full-0", 0.4, 0.1)
    write_judged(tmp_path / "slow-0", 0.5, 0.3)
    (tmp_path / "slow-0" / "second.budget.json").write_text('{"images": 1200, "images_per_second": 30.0}')
    rows = table(bakeoff, tmp_path)
    assert [row["arm"] for row in rows] == ["slow", "full"] and rows[0]["images"] == 1200
    assert rows[0]["difference"]["low"] > 0 and "difference" not in rows[1]
    write_table(bakeoff, tmp_path)
    text = (tmp_path / "bakeoff.md").read_text()
    assert "| slow | 1 |" in text and "| 0.30 | 1,200 | 30 |" in text and "| full | 1 |" in text


def test_the_command_plans_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(ARMS), "--output", str(tmp_path / "out")]
    assert main([*words, "--dry-run", "--arms", "full,f16c32"]) == 0
    out = capsys.readouterr().out
    assert "f16c32" in out and "pictures to judge: 520" in out and "49 min" in out
    assert main([*words, "--arms", "f16c23"]) == 2
    assert "did you mean f16c32" in capsys.readouterr().err
    assert main([*words, "--seeds", "one"]) == 2
    for changes, message in (
        ({"seconds": {"first": 1}}, "give a time for second"),
        ({"seconds": {"first": 1, "second": 1, "third": 1}}, "no arm trains third"),
        ({"judge": None}, "name a folder of weights with a judge"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            load_arms(write_arms(tmp_path, **changes), Bakeoff)
    assert main([str(write_arms(tmp_path, judge=str(tmp_path))), "--output", str(tmp_path / "out")]) == 2
    assert "holds no judge" in capsys.readouterr().err
    cosine = load_arms(write_arms(tmp_path, set={"schedule": "cosine"}), Bakeoff)
    with pytest.raises(ConfigError, match="use trapezoid"):
        bakeoffs._Trainer(cosine, tmp_path, None, TOYS).train(arm_run(cosine, FULL, 0), tmp_path / "x", ["second"])
