"""Tests of the adapter's training on pictures of several people."""

import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch

from imagine import world
from imagine.adapter.adapter import Adapter
from imagine.errors import ConfigError
from imagine.networks.models import build_autoencoder
from imagine.pipeline import layout
from imagine.pipeline.layout import trained_people
from imagine.world import VERSION
from tests.toy_training import run_in_processes, stderr_of
from train.__main__ import DONE
from train.config import Run, Stage
from train.data.language import make_tokenizers
from train.data.order import spread
from train.run.checkpoint import read_tensors, write_json, write_tensors
from train.stages import run_stages
from train.task import TaskContext
from train.tasks.adapter import AdapterSettings, AdapterTask
from train.tasks.autoencoder import AutoencoderTask
from train.tasks.groups import GroupBlocks

GROUPS = {"two": {"people": 2, "count": 8}, "three": {"people": 3, "count": 6}}
SETTINGS: dict[str, Any] = {
    "widths": [32, 32], "lora_rank": 2, "groups": {"two": 0.3, "three": 0.2}, "group_block": 4,
    "sources": {"synthetic": 1},
}  # fmt: skip


class SmallAdapter(AdapterTask):
    VALIDATION_PEOPLE: ClassVar[int] = 4
    DRAWING_STEPS: ClassVar[int] = 2


TASKS: dict[str, Any] = {"adapter": SmallAdapter, "autoencoder": AutoencoderTask}
SHARDS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@functools.cache
def home() -> Path:
    """Return a folder for all tests of this file, with tokenizers and an autoencoder."""
    folder = Path(tempfile.mkdtemp(prefix="imagine-groups-"))
    make_tokenizers(folder / "stage" / "cache", sentences=150)
    torch.manual_seed(0)
    build_autoencoder(32, (8, 8, 16, 32)).save_pretrained(folder / "autoencoder" / "vae")
    (folder / "autoencoder" / "latents.json").write_text(json.dumps({"mean": [0.0] * 32, "std": [1.0] * 32}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _tidy() -> Iterator[None]:
    yield
    shutil.rmtree(home())


@functools.cache
def task(people: Literal["router", "concatenate"] = "router") -> SmallAdapter:
    torch.manual_seed(0)
    data = {"folder": str(home() / "data"), "identities": 8, "pictures": 2, "groups": GROUPS}
    context = TaskContext(
        "adapter", 3, torch.device("cpu"), home() / "stage", data, None, {"autoencoder": home() / "autoencoder"}
    )
    found = SmallAdapter(AdapterSettings(**SETTINGS, people=people), context)
    found.prepare()
    return found


def first_image(name: str | None) -> int:
    """Return the first image of a block that shows a gallery of several people, or (None) one person."""
    blocks = GroupBlocks(SETTINGS["groups"], SETTINGS["group_block"])
    return next(first for first in range(0, 400, 4) if blocks.gallery_of(first, 4) == name)


def test_a_share_of_the_blocks_shows_several_people() -> None:
    which = spread(torch.arange(1000), [0.3, 0.2])
    assert torch.bincount(which).tolist() == pytest.approx([300, 200, 500], abs=3)
    blocks = GroupBlocks({"two": 0.5}, 4)
    assert [blocks.gallery_of(first, 2) for first in (0, 2)] == [blocks.gallery_of(0, 4)] * 2
    with pytest.raises(ConfigError, match="a batch of 4 images starts at image 6 and crosses a block: set group_block"):
        blocks.gallery_of(6, 4)
    assert GroupBlocks({}, 4).gallery_of(6, 4) is None


@pytest.mark.parametrize(("name", "people", "width"), [("two", 2, 12), ("three", 3, 16), (None, 1, 8)])
def test_batches_have_a_crop_and_a_mask_for_each_person(name: str | None, people: int, width: int) -> None:
    first = first_image(name)
    batch = task().batch(first, 4)
    assert batch.people == people and batch.crops.shape[:3] == (4, people, 3)
    assert batch.latents.shape == (4, 32, 8, width) and batch.faces.shape == batch.weights.shape == (4, 1, 8, width)
    assert batch.masks.shape == ((4, people, 16, 2 * width) if people > 1 else (4, 0))
    if people > 1:
        assert (batch.masks.sum(1) <= 1.01).all() and (batch.masks.flatten(2).amax(2) > 0.9).all()
        half = task().batch(first + 2, 2)
        assert torch.equal(half.latents, batch.latents[2:]) and torch.equal(half.crops, batch.crops[2:])


def test_the_crops_show_the_people_of_the_masks_in_the_same_order() -> None:
    batch, cache = task().batch(first_image("two"), 4), task().groups["two"]
    everything = cache.pictures.take(torch.arange(8)).latents
    rows = (batch.latents[:, None] == everything[None]).flatten(2).all(2).float().argmax(1)
    portraits = task().gallery_caches["train"]
    references = cache.pictures.gallery.references(rows)
    wanted = portraits.crops(references.flatten(), torch.full((8, 2), 0.5)).unflatten(0, (4, 2))
    assert (batch.crops - wanted).abs().mean() < 0.12 < (batch.crops - wanted.roll(1, 1)).abs().mean()


def test_losses_of_groups_reach_the_routers_and_those_of_portraits_do_not() -> None:
    here = task()
    parameters = here.parts()["vision_router"]
    for name, reached in (("two", True), (None, False)):
        first = first_image(name)
        loss = here.loss(here.batch(first, 4), first)
        assert loss.per_sample.shape == (4,) and loss.per_sample.isfinite().all()
        loss.per_sample.mean().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters) == reached
        assert ("router" in loss.metrics) == reached
        for p in here.parts()["vision_router"]:
            p.grad = None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # PyTorch causes it itself
def test_only_pictures_of_one_person_run_compiled_code() -> None:
    found = task.__wrapped__()  # not the shared one, which stays uncompiled
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    found.unet.compile(backend=keep)
    for name, is_compiled in (("two", False), (None, True)):
        first = first_image(name)
        found.loss(found.batch(first, 4), first)
        assert bool(graphs) == is_compiled


def test_validation_tells_how_well_the_routers_find_each_person(tmp_path: Path) -> None:
    with torch.no_grad():
        numbers = task().validate(tmp_path, 0)
    for name in GROUPS:
        assert numbers[f"{name} loss"] > 0 and 0 <= numbers[f"{name} router iou"] <= 1
        assert numbers[f"{name} exchanged ratio"] == pytest.approx(1, abs=0.2)  # the gates start at zero


def test_the_adapters_file_says_how_many_people_it_was_trained_with(tmp_path: Path) -> None:
    task().export(tmp_path)
    saved = Adapter.load(tmp_path / "adapter", task().unet)
    assert trained_people(saved.metadata) == 3
    assert saved.metadata["world"] == VERSION


def test_pictures_of_several_people_have_the_canvas_of_the_world() -> None:
    for people in (1, 2, 3, 4):
        assert layout.canvas_shape(people, 128) == world.canvas_shape(people, 128)


def test_concatenation_is_the_baseline_without_a_router(tmp_path: Path) -> None:
    baseline = task("concatenate")
    assert "vision_router" not in baseline.parts()
    first = first_image("two")
    loss = baseline.loss(baseline.batch(first, 4), first)
    assert loss.per_sample.isfinite().all() and loss.metrics["router"] == 0
    with torch.no_grad():
        assert "two router iou" not in baseline.validate(tmp_path, 0)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="sum to more than 1"):
        AdapterSettings(groups={"two": 0.7, "three": 0.6})
    with pytest.raises(ValueError, match="has no effect without groups"):
        AdapterSettings(people="concatenate")
    unknown = AdapterSettings(**{**SETTINGS, "groups": {"five": 0.1}})
    with pytest.raises(ConfigError, match="five"):
        SmallAdapter(unknown, task().context).check()


def several_people(output: Path, **settings: Any) -> Run:
    """Return a run in `output`, where the autoencoder is done, of an adapter stage with blocks of 1, 2 and 3 people."""
    shutil.copytree(home() / "autoencoder", output / "autoencoder" / "export")
    write_tensors(output / "autoencoder" / "weights.safetensors", {"vae_of_the_export.shape": torch.zeros(1)}, {})
    write_json(output / "autoencoder" / "done.json", {"images": 4, "from": {}, "validation": {}})
    shutil.copytree(home() / "stage" / "cache", output / "adapter" / "cache")
    (output / "run.yaml").write_text("stages: {}\n")  # the folder of a run
    autoencoder = {"task": "autoencoder", "train": {"decoder": 1e-3}, "images": 4}
    trained = ("vision_encoder", "vision_branch", "vision_router", "vision_projection", "lora")
    adapter = {
        "task": "adapter", "start_from": ["autoencoder"], "train": dict.fromkeys(trained, 1e-3), "images": 24,
        "batch_size": 4, "precision": "fp32", "warmup_images": 0, "report_every_seconds": 0, "settings": SETTINGS,
    }  # fmt: skip
    data = {"folder": str(home() / "data"), "identities": 8, "pictures": 2, "groups": GROUPS}
    stages = {
        "autoencoder": Stage.model_validate(autoencoder),
        "adapter": Stage.model_validate({**adapter, **settings}),
    }
    return Run(data=data, stages=stages, trackers=())


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "adapter" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in lines if "loss" in row]


@functools.cache
def straight() -> Path:
    """Return the folder of a run in one process."""
    output = home() / "straight"
    assert run_stages(several_people(output), output, only=["adapter"], tasks=TASKS)
    return output


@pytest.mark.parametrize("environment", [{}, SHARDS], ids=["DDP", "FSDP"])
def test_two_processes_take_the_same_steps_with_several_people(tmp_path: Path, environment: dict[str, str]) -> None:
    blocks = GroupBlocks(SETTINGS["groups"], SETTINGS["group_block"])
    assert {blocks.gallery_of(first, 4) for first in range(0, 24, 4)} == {None, "two", "three"}
    run = several_people(tmp_path / "run")
    ended = run_in_processes(run, tmp_path / "run", environment, tasks=TASKS)
    assert ended == [DONE, DONE], stderr_of(tmp_path / "run")
    assert len(losses(straight())) == 6
    torch.testing.assert_close(losses(tmp_path / "run"), losses(straight()), rtol=0, atol=1e-4)
    one, two = (read_tensors(each / "adapter" / "weights.safetensors")[0] for each in (straight(), tmp_path / "run"))
    assert any("router" in name for name in one)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-3)
