"""The ablation: its arms, the table with its intervals, and drawing without a text encoder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from imagine.errors import ConfigError
from tests import tiny
from tests.root import ROOT
from train import ablation as ablations
from train.ablation import FULL, WithoutBranches, arm_run, difference, load_ablation, main, table, write_table
from train.config import Run
from train.stages import TASKS, resolved

ARMS = ROOT / "configs" / "ablation" / "arms.yaml"
LOADED = load_ablation(ARMS)


def settings_of(run: Run) -> dict[str, Any]:
    """Return every setting of the arm's own stages and its data, by address."""
    flat = {f"data.{key}": json.dumps(value, sort_keys=True) for key, value in run.data.items()}
    for name, stage in run.stages.items():
        if name not in LOADED.shared:
            shown = stage.model_dump(mode="json")
            flat |= {f"{key}": json.dumps(value, sort_keys=True) for key, value in shown.items() if key != "settings"}
            flat |= {f"settings.{key}": json.dumps(value) for key, value in shown["settings"].items()}
    return flat


@pytest.mark.parametrize("name", LOADED.arms)
def test_every_arm_is_valid_and_changes_what_it_says(name: str) -> None:
    run = arm_run(LOADED, name, 1)
    stages = {stage: resolved(stage, run.stages[stage], TASKS) for stage in run.stages}
    own = [stage for stage in stages if stage not in LOADED.shared]
    assert own and all(stages[stage].seed == 1 for stage in own)
    full = arm_run(LOADED, FULL, 1)
    assert sum(stages[stage].images for stage in own) == sum(
        full.stages[stage].images for stage in full.stages if stage not in LOADED.shared
    )
    changed = {key for key, value in settings_of(run).items() if settings_of(full).get(key) != value}
    if name != FULL and LOADED.arms[name].stages is None:
        wanted = {key if not key.startswith("data.") else "data.sources" for key in LOADED.arms[name].set}
        assert changed == wanted, name


def test_the_arms_of_the_issue_are_there() -> None:
    assert set(LOADED.arms) >= {
        "full", "without_synpairs", "without_multi_stage", "concatenated_attention", "frozen_vision_encoder",
        "without_clip", "without_t5", "without_byt5", "without_zero_init", "without_lora", "without_likeness_loss",
        "with_preview_loss", "with_alignment_loss", "with_localisation", "with_drop_token",
    }  # fmt: skip
    assert len(LOADED.seeds) >= 2


def test_intervals_are_of_the_difference_per_person() -> None:
    torch.manual_seed(0)
    people = torch.randn(40)  # people differ a lot, the arms little
    found = difference([(people + 0.1).tolist()] * 2, [people.tolist()] * 2)
    assert found["value"] == pytest.approx(0.1, abs=1e-6) and found["low"] == pytest.approx(0.1, abs=1e-5)
    unclear = difference([torch.randn(40).tolist()], [torch.randn(40).tolist()])
    assert unclear["low"] < 0 < unclear["high"]


def write_judged(folder: Path, scores: list[tuple[float, float]]) -> None:
    """Write an evaluation's pictures.jsonl with two pictures for each person."""
    place = folder / "evaluation"
    place.mkdir(parents=True)
    rows = [
        {"row": "full", "identity": person, "prompt": prompt, "sim_gt": likeness, "copy_paste": 0.0, "rank1": 1.0}
        for person, (prompt, likeness) in enumerate(scores) for _ in range(2)
    ]  # fmt: skip
    (place / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "report.json").write_text("{}")


def test_the_table_compares_signs_with_the_paper(tmp_path: Path) -> None:
    base = [(0.6 + 0.01 * n, 0.4 + 0.01 * n) for n in range(10)]
    for seed in LOADED.seeds:
        write_judged(tmp_path / f"full-{seed}", base)
    write_judged(tmp_path / "without_synpairs-0", [(prompt - 0.2, likeness + 0.1) for prompt, likeness in base])
    write_judged(tmp_path / "without_multi_stage-0", [(prompt + 0.2, likeness) for prompt, likeness in base])
    rows = {row["arm"]: row for row in table(LOADED, tmp_path)}
    assert set(rows) == {"full", "without_synpairs", "without_multi_stage"}
    assert rows["without_synpairs"]["prompt"]["value"] == pytest.approx(-0.2)
    assert rows["without_synpairs"]["signs"] == {"prompt": "agrees", "identity": "agrees"}
    assert rows["without_multi_stage"]["signs"] == {"prompt": "differs", "identity": "not clear"}
    write_table(LOADED, tmp_path)
    text = (tmp_path / "ablation.md").read_text()
    assert "| without_synpairs | 1 |" in text and "-23.8, +12.2" in text and "prompt agrees" in text


def test_a_text_encoder_can_be_left_out_while_drawing() -> None:
    pipe = tiny.pipeline(5)
    persona = pipe.enroll([tiny.photo(1)])
    prompts = ["a person smiling on a beach", "an old woman"]

    def drawn(system: Any) -> torch.Tensor:
        pictures = system(prompts, reference=[persona] * 2, generator=[tiny.generator(1), tiny.generator(2)],
                          num_inference_steps=2, output_type="pt").images  # fmt: skip
        assert isinstance(pictures, torch.Tensor)
        return pictures

    whole = drawn(pipe)
    assert torch.equal(drawn(WithoutBranches(pipe, [])), whole)
    without = {name: drawn(WithoutBranches(pipe, [name])) for name in ("clip", "t5")}
    assert all(not torch.equal(pictures, whole) for pictures in without.values())
    empty = pipe.encode_prompt(["", ""])
    seeds = [tiny.generator(1), tiny.generator(2)]
    options: dict[str, Any] = {"generator": seeds, "num_inference_steps": 2, "output_type": "pt"}
    same = pipe(prompt_embeds=empty, reference=[persona] * 2, **options).images
    assert torch.equal(drawn(WithoutBranches(pipe, ["clip", "t5", "byt5"])), same)


def test_shared_stages_are_linked_once(tmp_path: Path) -> None:
    shared = tmp_path / "shared" / "likeness"
    shared.mkdir(parents=True)
    (shared / "done.json").write_text("{}")
    small = LOADED.model_copy(update={"shared": ("likeness",)})
    run = arm_run(small, FULL, 0)
    for _ in range(2):
        ablations.link_shared(small, FULL, run, tmp_path / "shared", tmp_path / "full-0")
    place = tmp_path / "full-0"
    assert (place / "likeness" / "done.json").samefile(shared / "done.json") and (place / "run.yaml").exists()


def test_the_command_plans_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(ARMS), "--output", str(tmp_path / "out")]
    assert main([*words, "--dry-run", "--arms", "full,without_lora", "--seeds", "3"]) == 0
    out = capsys.readouterr().out
    assert "without_lora" in out and "1,326" in out  # 2 arms x 51 people x 13 prompts
    assert main([*words, "--arms", "without_lorra"]) == 2
    assert "did you mean without_lora" in capsys.readouterr().err
    assert main([*words, "--seeds", "one"]) == 2
    assert main([str(tmp_path / "none.yaml"), "--output", str(tmp_path)]) == 2
    with pytest.raises(ConfigError, match="the arms must include full"):
        wrong = tmp_path / "wrong.yaml"
        wrong.write_text("recipe: r.yaml\nstages: [real]\narms: {other: {}}\n")
        load_ablation(wrong)
