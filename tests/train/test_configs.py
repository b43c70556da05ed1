"""Every run file in configs/ takes the first steps of all its stages, at toy size, in fp32 and in bf16."""

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.root import ROOT
from tests.train.tasks.test_diffusers import RECIPES, overrides, tiny_home
from tests.train.tasks.test_tasks import SMALL
from train.assemble import assemble
from train.config import load_run
from train.stages import TASKS, run_stages

BUILDS = {"pairs_model", "pairs_world"}  # for `data_synth build`: tests/data_synth runs them
FOLDER = ROOT / "configs"
RUNS = sorted({path.stem for path in FOLDER.glob("*.yaml")} - BUILDS)
IMAGES = {"images": 4, "batch_size": 2, "accumulation": 1, "warmup_images": 0}  # two steps
TOY: dict[str, Any] = {
    **IMAGES,
    "prefetch": 0,
    "validate_every": 0,
    "report_every_seconds": 0,
    "gates": {},
    "compile": False,
}
PEOPLE = {
    "identities": 16, "pictures": 2, "judge_identities": 8, "judge_pictures": 2, "second_judge_identities": 8,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "autoencoder": {"widths": [8, 8, 16, 32], "crop": 32},
    "recogniser": {"dimensions": 8, "ramp": 4},
    "base": {"widths": [32, 32]},
    "adapter": {"widths": [32, 32], "lora_rank": 2},
}


def _no_validation(*_: Any) -> dict[str, float]:
    return {}


# Validation is tested with each task; here it would take most of the time.
UNVALIDATED = {name: type(task.__name__, (task,), {"validate": _no_validation}) for name, task in SMALL.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny public bases and records, and the world's pictures, shared by all configs."""
    return tiny_home(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="module")
def trained(home: Path) -> Callable[[str, str], Path]:
    """Return a function that runs a config once in a precision and returns the folder of the run."""

    @functools.cache
    def run_once(config: str, precision: str) -> Path:
        output = home / "runs" / f"{config}-{precision}"
        run = load_run(FOLDER / f"{config}.yaml", toy_overrides(config, precision, home))
        if any(stage.initial for stage in run.stages.values()) and not (home / "weights").exists():
            assemble(run_once("weights", "fp32"), home / "weights")
        with pytest.MonkeyPatch.context() as patch:
            for module in ("train.tasks.base", "train.tasks.clip"):
                patch.setattr(f"{module}.make_tokenizers", _copy_tokenizers)
            assert run_stages(run, output, tasks={**TASKS, **UNVALIDATED})
        return output

    return run_once


def _copy_tokenizers(folder: Path) -> None:
    """Copy the shipped tokenizers, because training others takes minutes per config."""
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(ROOT / "weights" / name, folder / name, dirs_exist_ok=True)


def toy_overrides(config: str, precision: str, home: Path) -> list[str]:
    """Return the overrides that make a config tiny; stages on the shipped weights start from tiny ones instead."""
    if config in RECIPES:
        return overrides(home, config, precision=precision, **{"settings.base_precision": precision})
    run = load_run(FOLDER / f"{config}.yaml")
    lines = [f"data.folder={home / 'world'}", "trackers=[]", *(f"data.{key}={value}" for key, value in PEOPLE.items())]
    for name, gallery in run.data.get("galleries", {}).items():
        small = f"records={home / 'records'}" if "records" in gallery else "identities=4"
        lines.append(f"data.galleries.{name}.{small}")
    lines += [f"data.groups.{name}.count=4" for name in run.data.get("groups", {})]
    for name, stage in run.stages.items():
        lines += [f"{name}.{key}={value}" for key, value in {**TOY, "precision": precision}.items()]
        lines += [f"{name}.initial={home / 'weights'}"] if stage.initial else []
        lines += [f"{name}.settings.{key}={value}" for key, value in SIZES.get(stage.task, {}).items()]
        if stage.settings.get("groups"):
            lines.append(f"{name}.settings.group_block={IMAGES['batch_size']}")
    return lines


def test_every_config_is_run_or_is_a_build() -> None:
    assert set(RECIPES) < set(RUNS) and len(RUNS) + len(BUILDS) == len(list(FOLDER.glob("*.yaml")))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", RUNS)
def test_the_first_steps_of_every_stage(config: str, precision: str, trained: Callable[[str, str], Path]) -> None:
    output = trained(config, precision)
    for stage in load_run(FOLDER / f"{config}.yaml").stages:
        rows = [json.loads(line) for line in (output / stage / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if "loss" in row]
        assert losses and all(map(math.isfinite, losses)), stage
        assert all(row.get("skipped", 0) == 0 for row in rows), stage
