"""Shortcut-rerouted training: the side path is told the truth, dropped at inference, and without effect when off."""

import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.root import ROOT
from tests.stopping import StopsOnce
from train.cache.pictures import Gallery
from train.config import load_run
from train.data.denoiser_inputs import GalleryCache
from train.data.sources import DrawnPairs
from train.run.checkpoint import read_tensors
from train.stages import run_stages
from train.task import TaskContext
from train.tasks.adapter import AdapterBatch, AdapterSettings, AdapterTask
from train.tasks.shortcut import shortcut_batch, shortcut_without_training

WEIGHTS = ROOT / "weights"
SIZES = {"widths": [32, 32], "lora_rank": 2, "drop_vision": 0.0}
PEOPLE = {"identities": 4, "pictures": 2}


class Small(StopsOnce, AdapterTask):
    VALIDATION_PEOPLE: ClassVar[int] = 2
    DRAWING_STEPS: ClassVar[int] = 1

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        return {}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shortcut")


def with_tokenizers(folder: Path) -> Path:
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(WEIGHTS / name, folder / "cache" / name, dirs_exist_ok=True)
    return folder


def built(home: Path, **settings: Any) -> Small:
    """Return a task that is ready for its first batch, with the shipped autoencoder."""
    torch.manual_seed(0)
    context = TaskContext(
        "adapter", 3, torch.device("cpu"), with_tokenizers(home / "stage"),
        {"folder": str(home / "data"), **PEOPLE}, WEIGHTS,
    )  # fmt: skip
    task = Small(AdapterSettings(**{**SIZES, **settings}), context)
    for module in task.modules.values():
        module.eval().requires_grad_(False)
    with torch.no_grad():
        task.prepare()
    return task


@pytest.fixture(scope="module")
def task(home: Path) -> Small:
    return built(home, shortcut=1.0)


def test_off_and_untrained_side_paths_change_nothing(home: Path, task: Small) -> None:
    plain = built(home)
    assert "shortcut" not in plain.modules and plain.batch(0, 4).shortcut is None
    for name, module in plain.modules.items():
        own = task.modules[name].state_dict()
        assert all(torch.equal(value, own[key]) for key, value in module.state_dict().items()), name
    with torch.no_grad():
        batch = task.batch(0, 4)
        wanted = plain.loss(plain.batch(0, 4), 0).per_sample
        assert torch.equal(task.loss(batch, 0).per_sample, wanted)
        gates = opened(task)
        try:
            assert not torch.allclose(task.loss(batch, 0).per_sample, wanted)
            vision = task.vision_tokens(batch.crops)
            noise, t = task.noise(batch.latents, 3, 0)
            dropped = AdapterBatch(**{**vars(batch), "shortcut": None})  # as at inference
            assert torch.equal(task.prediction(dropped, vision, noise, t), plain.prediction(dropped, vision, noise, t))
        finally:
            for gate, value in gates:
                gate.copy_(value)


@torch.no_grad()
def opened(task: Small) -> list[tuple[Tensor, Tensor]]:
    """Open the gates of the side path, and return them with their values before."""
    assert task.shortcut is not None
    gates: list[tuple[Tensor, Tensor]] = [
        (p, p.clone()) for name, p in task.shortcut.named_parameters() if name.endswith("gate")
    ]
    for gate, _ in gates:
        gate.fill_(0.3)
    return gates


def test_the_side_path_is_told_the_targets_pose_and_expression(task: Small) -> None:
    cache = next(iter(task.gallery_caches.values()))
    name = next(iter(task.gallery_caches))
    rows = torch.arange(8)
    drawn = DrawnPairs([name] * 8, rows.flip(0), rows, ["dense"] * 8)
    told = shortcut_batch(task.gallery_caches, drawn, 1.0, 0, 0)
    gallery = cache.pictures.gallery
    assert isinstance(gallery, Gallery)
    contexts = gallery.contexts(rows)
    assert torch.equal(told.features[:, 0], contexts.yaw) and told.strength.eq(1).all()
    assert torch.equal(told.features[:, 4:].argmax(1), contexts.expression)
    half = shortcut_batch(task.gallery_caches, drawn, 0.5, 0, 0).strength
    assert 0 < half.sum() < 8
    part = DrawnPairs([name] * 4, rows[4:], rows[4:], ["dense"] * 4)
    assert torch.equal(shortcut_batch(task.gallery_caches, part, 0.5, 0, 4).strength, half[4:])


class _Records:
    """The pictures of a gallery that knows no contexts."""

    gallery: ClassVar[list[int]] = [0]


def test_records_have_no_known_pose() -> None:
    cache: Any = GalleryCache(_Records(), None, None)  # type: ignore[arg-type]
    drawn = DrawnPairs(["photos"] * 2, torch.arange(2), torch.arange(2), ["dense"] * 2)
    told = shortcut_batch({"photos": cache}, drawn, 1.0, 0, 0)
    assert told.strength.eq(0).all() and told.features.eq(0).all()


def test_the_side_path_learns_alone(task: Small) -> None:
    own = task.parts()["shortcut"]
    before = [p.detach().clone() for p in own]
    for parameter in own:
        parameter.requires_grad_(True)
    optimiser, batch, losses = torch.optim.AdamW(own, 1e-2), task.batch(0, 4), []
    for _ in range(8):
        loss = task.loss(batch, 0).per_sample.mean()
        losses.append(float(loss.detach()))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.99 * losses[0], losses
    assert all(p.grad is None for name, m in task.modules.items() if name != "shortcut" for p in m.parameters())
    with torch.no_grad():
        for parameter, value in zip(own, before, strict=True):
            parameter.copy_(value)
            parameter.grad = None
            parameter.requires_grad_(False)


RUN = """
trackers: []
stages:
  adapter:
    task: adapter
    train: {vision_branch: 0.01, vision_projection: 1.0e-3, shortcut: 0.01}
    fresh: [unet, text_adapter, image_encoder, adapter, shortcut]
    images: 6
    batch_size: 2
    precision: fp32
    ema: 4
    report_every_seconds: 0
"""


def trained(home: Path, output: Path) -> bool:
    (home / "run.yaml").write_text(RUN)
    with_tokenizers(output / "adapter")
    lines = [f"data.{key}={value}" for key, value in {"folder": home / "data", **PEOPLE}.items()]
    lines += [f"adapter.initial={WEIGHTS}", "adapter.settings.shortcut=0.5"]
    lines += [f"adapter.settings.{key}={value}" for key, value in SIZES.items()]
    return run_stages(load_run(home / "run.yaml", lines), output, resume=True, tasks={"adapter": Small})


def test_it_is_kept_for_later_stages_and_not_exported_and_resumes(home: Path, tmp_path: Path) -> None:
    assert trained(home, tmp_path / "straight")
    StopsOnce.stop_at = 2
    assert not trained(home, tmp_path / "stopped")
    assert trained(home, tmp_path / "stopped")
    one, other = (
        read_tensors(tmp_path / name / "adapter" / "weights.safetensors")[0] for name in ("straight", "stopped")
    )
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    assert any(key.startswith("shortcut.") for key in one)
    exported = tmp_path / "straight" / "adapter" / "export"
    assert "shortcut" not in "".join(path.name for path in exported.rglob("*"))
    tensors = read_tensors(exported / "adapter" / "adapter.safetensors")[0]
    assert tensors and not any("shortcut" in key for key in tensors)


def test_an_untrained_frozen_side_path_is_reported() -> None:
    assert "add shortcut to `train`" in shortcut_without_training(1.0, ("vision_branch",), False)[0]
    assert not shortcut_without_training(1.0, ("shortcut",), False)
    assert not shortcut_without_training(1.0, ("vision_branch",), True)
    assert not shortcut_without_training(0.0, ("vision_branch",), False)
