"""`--dry-run` on diffusion transformers: a step with its activations, as the task computes it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from imagine.blueprints.published import published_base, published_vision_encoder
from imagine.planning.meter import profiled_peak
from imagine.planning.networks import build
from tests import tiny_flow_bases, tiny_stock
from tests.root import ROOT
from tests.train.data.test_recorded import records, written
from tests.train.tasks.test_diffusers_transformers import RATES, built, settings_of
from train.config import Run, Stage, load_run
from train.plan import StagePlan, format_plan, plan
from train.run import parts

GIB = 2**30
BASES = ("flux2", "flux")  # their text always has the planned length; others' depends on the captions


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("plans")
    for name in BASES:
        tiny_flow_bases.pipeline(name).save_pretrained(home / name)
    tiny_stock.encoder().save_pretrained(home / "vision")
    written(home / "records", records())
    return home


def planned(home: Path, base: str, **more: Any) -> StagePlan:
    data = {
        "folder": str(home / "data"), "galleries": {"photos": {"records": str(home / "records")}},
        "sources": {"real": {"gallery": "photos", "target": "self", "captions": {"dense": 1.0}}},
    }  # fmt: skip
    stage = {
        "task": "diffusers_adapter", "train": RATES, "images": 4, "batch_size": 2, "precision": "fp32", "ema": 0,
        "settings": settings_of(home, base, **more),
    }  # fmt: skip
    (one,) = plan(Run(data=data, stages={"one": Stage.model_validate(stage)}), home / "run")
    return one


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("base", BASES)
def test_the_plan_of_a_step_agrees_with_the_step(home: Path, base: str, recomputed: bool) -> None:
    """Parameters are equal; the memory of a forward and backward pass, by the allocator, agrees within 15 %."""
    one = planned(home, base, gradient_checkpointing=recomputed)
    task = built(home, base, gradient_checkpointing=recomputed)
    chosen = parts.choose(task.parts(), RATES, "one")
    parts.freeze_all_but(task.modules, chosen)
    for module in task.modules.values():
        module.train(recomputed)
    batch = task.batch(0, 2)
    measured = profiled_peak(lambda: torch.autograd.backward(task.loss(batch, 0).per_sample.mean()))
    assert one.step is not None and one.step.trained == one.trained == parts.sizes(chosen)
    assert one.step.frozen == one.frozen
    assert one.step.memory["activations and gradients"] == pytest.approx(measured, rel=0.15)
    assert "of a card's memory" in format_plan([one])


def public_folder(folder: Path, name: str) -> Path:
    """Write the configurations of a public base as its publisher does, without weights."""
    base = published_base(name)
    networks = build(base)  # so that values that are defaults are written too
    index = {"_class_name": base.pipeline, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    for part, component in base.components.items():
        (folder / part).mkdir(parents=True)
        library = "transformers" if part.startswith("text_encoder") else "diffusers"
        index[part] = [library, component.kind]
        config: Any = networks.models[part].config
        values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        (folder / part / "config.json").write_text(json.dumps(values, default=str))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("recipe", "name", "trains", "frozen", "card"),
    [("flux2_klein_1gpu", "flux2-klein-4b", 826, 3876, 24), ("zimage_8gpu", "z-image", 944, 6155, 80)],
)
def test_the_shipped_recipes_are_planned_from_public_configurations(
    recipe: str, name: str, trains: int, frozen: int, card: int, tmp_path: Path
) -> None:
    """What the header of the recipe counts is what the plan counts; the step fits the card that it is made for."""
    base, (vision, records_folder) = public_folder(tmp_path / name, name), (tmp_path / "vision", tmp_path / "records")
    vision.mkdir()
    encoder = published_vision_encoder()
    (vision / "config.json").write_text(json.dumps({**encoder.config, "_class_name": encoder.kind}))
    written(records_folder, records())
    lines = [f"data.folder={tmp_path / 'data'}", f"real.settings.base={base}", f"real.settings.vision={vision}"]
    run = load_run(ROOT / "configs" / f"{recipe}.yaml", lines)
    lines += [f"data.galleries.{each}.records={records_folder}" for each in run.data["galleries"]]
    lines += ["real.batch_size=8"] if recipe.endswith("8gpu") else []  # one of eight processes
    run = load_run(ROOT / "configs" / f"{recipe}.yaml", lines)
    (one,) = plan(run.model_copy(update={"stages": {"real": run.stages["real"]}}), tmp_path / "run")
    assert round(sum(one.trained.values()) / 1e6) == trains and round(one.frozen / 1e6) == frozen
    assert one.step is not None and one.step.trained == one.trained and one.step.frozen == one.frozen
    assert one.step.memory["activations and gradients"] > 0 and one.step.peak < card * GIB
    assert one.hours_on["a100"] > 0
