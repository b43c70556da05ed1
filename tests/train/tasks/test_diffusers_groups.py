"""Adapter training on SDXL and Stable Diffusion 1.5 with records of several people, and what the stock pipelines do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from imagine.adapter.adapter import Adapter
from imagine.errors import ConfigError
from imagine.people.faces import KnownBoxesFinder
from imagine.pipeline.layout import trained_people
from imagine.records import VISION
from imagine.stock.people import PLACED_NOTE
from imagine.stock.pipelines import personalised_class
from tests import tiny, tiny_ip, tiny_stock
from tests.group_records import records
from tests.stopping import StopsOnce
from tests.train.data.test_recorded import written
from train.config import load_run
from train.run.checkpoint import read_tensors
from train.selftest import self_test
from train.stages import run_stages
from train.task import TaskContext
from train.tasks.diffusers import DiffusersSettings, DiffusersTask
from train.tasks.diffusers_inputs import DiffusersBatch

CPU = torch.device("cpu")
TRAINED = ("vision_encoder", "vision_branch", "vision_router", "vision_projection", "lora")
RUN = """
defaults: {task: diffusers_adapter, precision: fp32, prefetch: 0, clip: 0, report_every_seconds: 0, batch_size: 2}
trackers: []
stages:
  together:
    train: {vision_encoder: 1.0e-3, vision_branch: 0.01, vision_router: 0.01, vision_projection: 1.0e-3, lora: 0.01}
    images: 12
"""


class Stopping(StopsOnce, DiffusersTask):
    """A task that can stop the run once, at an image."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("groups")
    for xl, name in ((True, "xl"), (False, "sd15")):
        tiny_stock.stock(xl).save_pretrained(home / name)
    tiny_ip.encoder().save_pretrained(home / "vision")
    save_file(tiny_ip.tensors("plus", tiny_stock.unet(True)), home / "ip.safetensors")
    written(home / "records", records())
    written(home / "boxes", records(masks=False))
    return home


def settings_of(home: Path, base: str = "xl", **more: Any) -> dict[str, Any]:
    given = {"base": str(home / base), "vision": str(home / "vision"), "lora_rank": 2, "resolution": 32}
    given |= {"drop_text": 0.0, "drop_vision": 0.0, "validation_images": 2, "drawings": 1, "drawing_steps": 1}
    return {**given, "groups": {"two": 0.5, "three": 0.2}, "group_block": 2, **more}


def data_of(home: Path, base: str = "xl", name: str = "records") -> dict[str, Any]:
    address = str(home / name)
    return {
        "folder": str(home / "data" / base / name), "galleries": {"photos": {"records": address}},
        "sources": {"real": {"gallery": "photos", "target": "self", "captions": {"dense": 1.0}}},
        "groups": {
            "two": {"people": 2, "records": address, "captions": {"dense": 0.5, "rewritten": 0.5}},
            "three": {"people": 3, "records": address},
        },
    }  # fmt: skip


def built(home: Path, base: str = "xl", name: str = "records", trains: Any = (), **more: Any) -> DiffusersTask:
    """Return a task that is ready for its first batch."""
    context = TaskContext("stage", 3, CPU, home / "stage", data_of(home, base, name), trains=trains)
    torch.manual_seed(0)
    task = DiffusersTask(DiffusersSettings(**settings_of(home, base, **more)), context)
    task.check()
    with torch.no_grad():
        for module in task.modules.values():
            module.eval().requires_grad_(False)
        task.prepare()
    return task


@pytest.fixture(scope="module", params=["sd15", "xl"])
def task(home: Path, request: pytest.FixtureRequest) -> DiffusersTask:
    return built(home, request.param)


def first_image(task: DiffusersTask, name: str | None) -> int:
    return next(first for first in range(0, 400, 2) if task.blocks.gallery_of(first, 2) == name)


@pytest.mark.parametrize(("name", "people", "shape"), [("two", 2, (14, 20)), ("three", 3, (12, 22))])
def test_a_batch_of_several_people_has_their_crops_masks_and_canvas(
    task: DiffusersTask, name: str, people: int, shape: tuple[int, int]
) -> None:
    first = first_image(task, name)
    batch = task.batch(first, 2)
    assert batch.people is not None and batch.crops.shape[:3] == (2, people, 3)
    assert batch.latents.shape == (2, 4, *shape) and batch.faces.shape == (2, 1, *shape)
    assert batch.people.masks.shape == (2, people, *shape) and batch.people.known.eq(1).all()
    assert batch.people.masks.flatten(2).amax(2).gt(0.9).all()
    assert batch.sizes[:, 4:].tolist() == [[2 * side for side in shape]] * 2
    half = task.batch(first + 1, 1)
    assert torch.equal(half.latents, batch.latents[1:]) and torch.equal(half.crops, batch.crops[1:])


def test_a_batch_of_one_person_is_that_of_a_stage_without_groups(home: Path, task: DiffusersTask) -> None:
    first = first_image(task, None)
    alone = built(home, task.base.folder.name, groups={})
    one, other = task.batch(first, 2), alone.batch(first, 2)
    assert one.people is None and other.people is None and one.states.keys() == other.states.keys()
    for name in ("latents", "sizes", "faces", "crops", "strength"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    weights = {name: value for name, value in task.adapter.state_dict().items() if ".router." not in name}
    assert weights.keys() == alone.adapter.state_dict().keys()
    alone.adapter.load_state_dict(weights)
    assert torch.equal(task.loss(one, first).per_sample, alone.loss(other, first).per_sample)


def trainable(task: DiffusersTask) -> list[torch.nn.Parameter]:
    parameters = [p for part in TRAINED for p in task.parts()[part]]
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = None
    return parameters


def router_gradients(task: DiffusersTask, batch: DiffusersBatch, first: int) -> list[Tensor]:
    trainable(task)
    task.loss(batch, first).per_sample.mean().backward()
    return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in task.parts()["vision_router"]]


def test_the_loss_falls_on_one_batch_and_the_routers_learn_the_masks(home: Path) -> None:
    task = built(home, "sd15")
    first = first_image(task, "two")
    batch, optimiser = task.batch(first, 2), torch.optim.AdamW(trainable(task), 1e-2)
    losses, routed = [], []
    for _ in range(12):
        loss = task.loss(batch, first)
        losses.append(float(loss.per_sample.detach().mean()))
        routed.append(float(torch.as_tensor(loss.metrics["router"]).detach()))
        optimiser.zero_grad(set_to_none=True)
        loss.per_sample.mean().backward()
        optimiser.step()
    assert losses[-1] < 0.97 * losses[0] and routed[-1] < 0.9 * routed[0], (losses, routed)


def test_gradient_checkpointing_gives_the_routers_the_same_gradients(home: Path) -> None:
    task = built(home, "sd15", gradient_checkpointing=True)
    first = first_image(task, "two")
    batch = task.batch(first, 2)
    for module in task.modules.values():
        module.train()  # without checkpoints, training mode changes nothing here
    found = router_gradients(task, batch, first)
    task.denoiser.disable_gradient_checkpointing()
    task.vision.tower.set_grad_checkpointing(False)
    plain = router_gradients(task, batch, first)
    assert any(bool(each.any()) for each in plain)
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(found, plain, strict=True))


def test_batches_of_one_person_give_the_routers_no_gradient(task: DiffusersTask) -> None:
    first = first_image(task, None)
    trainable(task)
    loss = task.loss(task.batch(first, 2), first)
    loss.per_sample.mean().backward()
    assert not any(p.grad is not None and bool(p.grad.any()) for p in task.parts()["vision_router"])
    assert "router" not in loss.metrics


def test_people_whose_reference_is_dropped_are_nobody(home: Path) -> None:
    task = built(home, "sd15", drop_person=0.5)
    torch.nn.init.ones_(task.adapter.parts()["vision_branch"][-1])
    seen = set()
    for first in range(0, 60, 2):
        if task.blocks.gallery_of(first, 2) != "three":
            continue
        batch = task.batch(first, 2)
        assert batch.people is not None
        present = batch.people.present
        seen |= set(present.sum(1).tolist())
        assert torch.equal(batch.people.masks.flatten(2).any(2), present)
        with torch.no_grad():
            vision, record = task.vision_tokens(batch), dict[str, list[Tensor]]()
            noise, steps = task.noise(batch.latents, 0, 0)
            errors = task.errors(batch, vision, noise, steps, record)
            changed = torch.where(present.repeat_interleave(vision.values.shape[1] // 3, 1)[..., None], 0, 9.0)
            other = task.errors(batch, type(vision)(vision.values + changed, vision.mask), noise, steps)
        assert errors.isfinite().all() and torch.allclose(errors, other, atol=1e-6)
        for (shares,) in record.values():
            assert (shares[:, :3].exp().amax(2) > 0).eq(present).all()
        assert task.loss(batch, first).per_sample.isfinite().all()
    assert seen >= {0, 1, 2}


def test_boxes_without_masks_train_the_routers_inside_the_faces(home: Path) -> None:
    task = built(home, "xl", "boxes")
    first = first_image(task, "two")
    batch = task.batch(first, 2)
    assert batch.people is not None and 0 < float(batch.people.known.mean()) < 0.5
    trainable(task)
    loss = task.loss(batch, first)
    loss.per_sample.mean().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in task.parts()["vision_router"])


def test_validation_tells_how_well_people_are_kept_apart(task: DiffusersTask, tmp_path: Path) -> None:
    with torch.no_grad():
        numbers = task.validate(tmp_path, 0)
    for name in ("two", "three"):
        assert numbers[f"{name} loss"] > 0 and 0 <= numbers[f"{name} router iou"] <= 1
        assert numbers[f"{name} exchanged ratio"] == pytest.approx(1, abs=0.2)  # the gates start at zero
        assert (tmp_path / f"{name}.png").stat().st_size > 500
    task.show(task.batch(first_image(task, "three"), 2), tmp_path / "first.png")
    assert (tmp_path / "first.png").stat().st_size > 500


def test_concatenation_is_the_baseline_without_a_router(home: Path, tmp_path: Path) -> None:
    task = built(home, "sd15", people="concatenate", drawings=0)
    assert not task.parts()["vision_router"]
    first = first_image(task, "two")
    loss = task.loss(task.batch(first, 2), first)
    assert loss.per_sample.isfinite().all() and loss.metrics["router"] == 0
    with torch.no_grad():
        assert "two router iou" not in task.validate(tmp_path, 0)


def run_of(home: Path, base: str, **more: Any) -> Any:
    folder = home / "runs"
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(RUN)
    run = load_run(folder / "run.yaml")
    stage = run.stages["together"]
    given = settings_of(home, base, sources={"real": 1.0}, drop_person=0.2, **more)
    stage = stage.model_copy(update={"settings": given})
    return run.model_copy(update={"data": data_of(home, base), "stages": {"together": stage}})


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """A finished run on SDXL."""
    assert run_stages(run_of(home, "xl"), home / "out", tasks={"diffusers_adapter": Stopping})
    return home / "out"


def test_a_resumed_run_equals_a_straight_run(home: Path, trained: Path, tmp_path: Path) -> None:
    StopsOnce.stop_at = 6
    for done in (False, True):
        assert run_stages(run_of(home, "xl"), tmp_path, tasks={"diffusers_adapter": Stopping}) == done
    one, other = (read_tensors(each / "together" / "weights.safetensors")[0] for each in (trained, tmp_path))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_trained_router_tells_people_apart_in_a_stock_pipeline_without_a_layout(home: Path, trained: Path) -> None:
    exported = trained / "together" / "export"
    pipe = personalised_class(type(tiny_stock.stock(True))).from_pretrained(
        home / "xl", vision_encoder=str(exported / "image_encoder")
    )
    pipe.finder = KnownBoxesFinder([tiny.BOX])
    pipe.set_progress_bar_config(disable=True)
    pipe.load_adapter(exported / "adapter")
    spec = pipe.adapter.branch_specs[0]
    assert spec.router and spec.name == VISION and trained_people(pipe.adapter.metadata) == 3
    ann, bob = tiny.photo(1), tiny.photo(2)
    call: dict[str, Any] = {
        "num_inference_steps": 2, "height": 16, "width": 24, "output_type": "pt", "prompt": "{a} hugs {b}",
    }  # fmt: skip

    def drawn(a: Any, b: Any, **more: Any) -> Any:
        return pipe(reference={"a": a, "b": b}, generator=tiny.generator(0), **{**call, **more})

    out = drawn(ann, bob)
    assert PLACED_NOTE not in out.notes and out.images.shape[-2:] == (16, 24)
    assert torch.equal(out.images, drawn(ann, bob).images)
    assert not torch.equal(out.images, drawn(bob, ann).images)
    assert not torch.equal(out.images, drawn(ann, bob, layout="left to right").images)
    pipe.save_pretrained(home / "saved")
    again = type(pipe).from_pretrained(home / "saved", finder=pipe.finder)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(reference={"a": ann, "b": bob}, generator=tiny.generator(0), **call).images, out.images)


def test_an_ip_adapter_becomes_an_adapter_with_a_router(home: Path) -> None:
    task = built(home, "xl", ip_adapter=home / "ip.safetensors")
    assert task.adapter.branch_specs[0].router and task.parts()["vision_router"]
    first = first_image(task, "two")
    assert task.loss(task.batch(first, 2), first).per_sample.isfinite().all()


def test_a_self_test_reaches_the_routers(home: Path, tmp_path: Path) -> None:
    (outcome,) = self_test(run_of(home, "sd15"), tmp_path, steps=30)
    assert outcome.passed, outcome.sentence


def test_settings_that_cannot_work_are_refused(home: Path) -> None:
    for more, message in (
        ({"groups": {"two": 0.7, "three": 0.6}}, "sum to more than 1"),
        ({"groups": {}, "people": "concatenate"}, "has no effect without groups"),
        ({"groups": {}, "drop_person": 0.1}, "drop_person has no effect without groups"),
    ):
        with pytest.raises(ValueError, match=message):
            DiffusersSettings(**settings_of(home, **more))
    with pytest.raises(ConfigError, match="five"):
        built(home, groups={"five": 0.1})
    data = data_of(home)
    context = TaskContext("stage", 3, CPU, home / "stage", data, trains=("lora",))
    task = DiffusersTask(DiffusersSettings(**settings_of(home)), context)
    assert any("vision_router does not train" in warning for warning in task.check())
    data["groups"]["two"] = {"people": 2, "count": 4}
    with pytest.raises(ConfigError, match="a public base trains on records"):
        task.check()
    data["groups"]["two"] = {"people": 2, "count": 4, "records": str(home / "records")}
    with pytest.raises(ConfigError, match="count has no effect beside records"):
        task.check()
    data["groups"]["two"] = {"people": 2, "records": str(home / "nothing")}
    with pytest.raises(ConfigError, match="there are no records at"):
        task.check()


def test_the_adapter_is_saved_with_its_routers(trained: Path, home: Path) -> None:
    saved = Adapter.load(trained / "together" / "export" / "adapter", tiny_stock.unet(True))
    assert saved.parts()["vision_router"] and saved.branch_specs[0].router
