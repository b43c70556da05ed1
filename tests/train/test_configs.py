"""Every run file in configs/ takes the first steps of all its stages, at toy size, in fp32 and in bf16."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.root import ROOT
from tests.train.tasks.test_diffusers import RECIPES, overrides, tiny_home
from tests.train.tasks.test_tasks import SMALL
from train.config import Run, load_run
from train.stages import TASKS, run_stages

BUILDS = {"pairs_model", "pairs_world"}  # for `data_synth build`: tests/data_synth runs them
FOLDER = ROOT / "configs"
RUNS = sorted({path.stem for path in FOLDER.glob("*.yaml")} - BUILDS)
IMAGES = {"images": 4, "batch_size": 2, "accumulation": 1, "warmup_images": 0}  # two steps
TOY: dict[str, Any] = {**IMAGES, "prefetch": 0, "validate_every": 0, "report_every_seconds": 0}
PEOPLE = {"identities": 4, "pictures": 2, "judge_identities": 8, "judge_pictures": 2}
SIZES = {"autoencoder": {"widths": [8, 8, 16, 32], "crop": 32}, "recogniser": {"dimensions": 8, "ramp": 4}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny public bases and records, and the world's pictures and tokenizers, shared by all configs."""
    home = tiny_home(tmp_path_factory.mktemp("configs"))
    return home


@pytest.fixture(autouse=True)
def _shipped_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the tokenizers that the shipped encoders were trained with; training others takes minutes per config."""
    monkeypatch.chdir(ROOT)  # `initial: weights` is a path from here
    for module in ("train.tasks.base", "train.tasks.clip"):
        monkeypatch.setattr(f"{module}.make_tokenizers", _copy_tokenizers)


def _copy_tokenizers(folder: Path) -> None:
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(ROOT / "weights" / name, folder / name, dirs_exist_ok=True)


def world_overrides(run: Run, home: Path, precision: str) -> list[str]:
    """Return the overrides that make a run of the portrait world tiny; on shipped weights it keeps its networks."""
    lines = [f"data.folder={home / 'world'}", "trackers=[]", *(f"data.{key}={value}" for key, value in PEOPLE.items())]
    for name, gallery in run.data.get("galleries", {}).items():
        small = f"records={home / 'records'}" if "records" in gallery else "identities=4"
        lines.append(f"data.galleries.{name}.{small}")
    for name, stage in run.stages.items():
        lines += [f"{name}.{key}={value}" for key, value in {**TOY, "precision": precision}.items()]
        if stage.initial is None:
            sizes = SIZES.get(stage.task, {"widths": [32, 32]} if "widths" in stage.settings else {})
            sizes |= {"lora_rank": 2} if "lora" in stage.train else {}
            lines += [f"{name}.settings.{key}={value}" for key, value in sizes.items()]
    return lines


def test_every_config_is_run_or_is_a_build() -> None:
    assert set(RECIPES) < set(RUNS) and len(RUNS) + len(BUILDS) == len(list(FOLDER.glob("*.yaml")))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", RUNS)
def test_the_first_steps_of_every_stage(config: str, precision: str, home: Path, tmp_path: Path) -> None:
    path = FOLDER / f"{config}.yaml"
    if config in RECIPES:
        lines = overrides(home, config, precision=precision, **{"settings.base_precision": precision})
    else:
        lines = world_overrides(load_run(path), home, precision)
    run = load_run(path, lines)
    assert run_stages(run, tmp_path, tasks={**TASKS, **SMALL})
    for stage in run.stages:
        rows = [json.loads(line) for line in (tmp_path / stage / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if "loss" in row]
        assert losses and all(map(math.isfinite, losses)), stage
        assert all(row.get("skipped", 0) == 0 for row in rows), stage
