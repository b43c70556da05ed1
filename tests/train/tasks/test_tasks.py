"""Tests of every task of the portrait world at tiny sizes: batches, losses, gradients of all parts, and exports."""

import contextlib
import dataclasses
import functools
import importlib
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from imagine.adapter.adapter import FILE_NAME, Adapter
from imagine.errors import ConfigError, WeightsError
from imagine.evaluation.judge import Reader
from imagine.networks import encoders
from imagine.networks.encoders import VisionEncoder
from imagine.networks.recogniser import Recogniser, TransformerRecogniser, load_recogniser
from imagine.people.finder import load_finder
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.records import Tokens
from imagine.world.seeds import JUDGE, SECOND_JUDGE
from tests.root import ROOT
from tests.toy_training import run_in_processes, start_training, stderr_of
from train.__main__ import DONE
from train.assemble import assemble
from train.cache.latents import autoencoder_of, load_autoencoder, squared_error
from train.cache.sentences import SentenceStore
from train.config import Run, load_run
from train.data.language import copy_tokenizers, load_text_encoders, make_tokenizers
from train.data.portraits import data_settings
from train.initial_weights import load_initial
from train.run.checkpoint import read_tensors, write_tensors
from train.stages import TASKS, run_stages
from train.task import Task, TaskContext
from train.tasks.adapter import AdapterSettings, AdapterTask
from train.tasks.autoencoder import AutoencoderSettings, AutoencoderTask
from train.tasks.base import BaseSettings, BaseTask
from train.tasks.clip import ClipTask
from train.tasks.finder import FinderTask
from train.tasks.likeness import LikenessTask
from train.tasks.likeness_loss import LikenessNetwork
from train.tasks.reader import ReaderTask
from train.tasks.recogniser import RecogniserSettings, RecogniserTask

CHAIN = ("autoencoder", "clip", "base", "adapter")
ADAPTER_PARTS = ("vision_encoder", "vision_branch", "vision_projection", "lora")
DENOISER = {"widths": [32, 32]}
SETTINGS: dict[str, dict[str, Any]] = {
    "autoencoder": {"widths": [8, 8, 16, 32], "crop": 32},
    "clip": {},
    "recogniser": {"dimensions": 8, "ramp": 4},
    "reader": {},
    "finder": {},
    "base": DENOISER,
    "likeness": {},
    "adapter": {**DENOISER, "lora_rank": 2},
}


class SmallClip(ClipTask):
    """Validates on few people, because rendering two pictures of 500 takes longer than all other tests here."""

    HELD_OUT_PEOPLE: ClassVar[int] = 4


class SmallRecogniser(RecogniserTask):
    HELD_OUT_PEOPLE: ClassVar[int] = 4


class SmallReader(ReaderTask):
    HELD_OUT_PICTURES: ClassVar[int] = 6


class SmallBase(BaseTask):
    VALIDATION_PEOPLE: ClassVar[int] = 4
    DRAWING_STEPS: ClassVar[int] = 2


class SmallAdapter(AdapterTask):
    VALIDATION_PEOPLE: ClassVar[int] = 4
    DRAWING_STEPS: ClassVar[int] = 2


class SmallLikeness(LikenessTask):
    VALIDATION_PEOPLE: ClassVar[int] = 4


class SmallFinder(FinderTask):
    RENDERED: ClassVar[int] = 4
    HELD_OUT_PICTURES: ClassVar[int] = 2


SMALL: dict[str, Any] = {
    "autoencoder": AutoencoderTask,
    "clip": SmallClip,
    "recogniser": SmallRecogniser,
    "reader": SmallReader,
    "finder": SmallFinder,
    "base": SmallBase,
    "likeness": SmallLikeness,
    "adapter": SmallAdapter,
}


@functools.cache
def home() -> Path:
    """Return a folder for all tests of this file, so that galleries and tokenizers are built once."""
    folder = Path(tempfile.mkdtemp(prefix="imagine-tasks-"))
    make_tokenizers(folder / "tokenizers", sentences=150)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _tidy() -> Iterator[None]:
    yield
    shutil.rmtree(home())


def data() -> dict[str, Any]:
    sizes = {"identities": 8, "pictures": 2, "judge_identities": 8, "judge_pictures": 2, "second_judge_identities": 8}
    return {"folder": str(home() / "data"), **sizes}


def with_tokenizers(stage: Path) -> Path:
    """Copy tokenizers into the cache of a stage's folder, as an interrupted run leaves it, and return the folder."""
    shutil.copytree(home() / "tokenizers", stage / "cache", dirs_exist_ok=True)
    return stage


@functools.cache
def trained() -> Path:
    """Train the chain from autoencoder to adapter, two steps each, from a run file, and return the run's folder."""
    output = home() / "run"
    parts = {name: dict.fromkeys(SMALL[name].PARTS, 1e-3) for name in CHAIN}
    parts["adapter"] = dict.fromkeys(ADAPTER_PARTS, 1e-3)  # on the frozen base
    starts = {"base": ["autoencoder", "clip"], "adapter": ["autoencoder", "clip", "base"]}
    stages = {
        name: {"task": name, "train": parts[name], "start_from": starts.get(name, []), "settings": SETTINGS[name]}
        for name in CHAIN
    }
    stages["clip"]["muon"] = ["vision", "text"]
    defaults = {"images": 4, "batch_size": 2, "precision": "fp32", "ema": 4, "report_every_seconds": 0}
    content = {"data": data(), "defaults": defaults, "stages": stages}
    (home() / "run.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for name in CHAIN:
        with_tokenizers(output / name)
    assert run_stages(load_run(home() / "run.yaml"), output, resume=True, tasks=SMALL)
    return output


@functools.cache
def built(name: str) -> Any:
    """Return the task, ready for its first batch; base, adapter and likeness use the chain's autoencoder."""
    earlier = {"autoencoder": trained() / "autoencoder" / "export"} if name in ("base", "adapter", "likeness") else {}
    task_class = SMALL[name]
    torch.manual_seed(0)
    folder = with_tokenizers(home() / "built" / name)
    context = TaskContext(name, 3, torch.device("cpu"), folder, data(), None, earlier)
    task: Task = task_class(task_class.Settings(**SETTINGS[name]), context)
    for module in task.modules.values():
        module.eval().requires_grad_(False)
    with torch.no_grad():
        task.prepare()
    return task


def leaves(record: Any) -> Iterator[Any]:
    """Yield every tensor and text in a batch, in order."""
    if dataclasses.is_dataclass(record):
        record = [getattr(record, field.name) for field in dataclasses.fields(record)]
    if isinstance(record, dict):
        record = list(record.values())
    if isinstance(record, (list, tuple)):
        for item in record:
            yield from leaves(item)
    else:
        yield record


def same(one: Any, two: Any) -> bool:
    pairs = zip(leaves(one), leaves(two), strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b) for a, b in pairs)


def test_the_small_tasks_are_the_ones_that_runs_use() -> None:
    assert SMALL.keys() == SETTINGS.keys() == TASKS.keys() - {"diffusers_adapter"}  # see test_diffusers.py
    for name in SMALL:
        address = TASKS[name]
        module, _, class_name = address.partition(":")
        assert issubclass(SMALL[name], getattr(importlib.import_module(module), class_name))


@pytest.mark.parametrize("name", list(SMALL))
def test_batches_are_functions_of_images_seen(name: str) -> None:
    task = built(name)
    batch = task.batch(40, 4)
    torch.rand(1)  # batches must not depend on the global generator
    assert same(batch, task.batch(40, 4))
    assert not same(batch, task.batch(44, 4))
    floats = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    assert floats and all(leaf.isfinite().all() for leaf in floats)


@pytest.mark.parametrize("name", list(SMALL))
def test_every_image_is_a_function_of_its_own_number(name: str) -> None:
    """Otherwise micro-batches would depend on gradient accumulation and on the number of processes."""
    task = built(name)
    whole, first, second = task.batch(40, 4), task.batch(40, 2), task.batch(42, 2)
    if name == "clip":  # its `crops` are row numbers within the batch
        second = dataclasses.replace(second, crops=second.crops + 2)
    both = [list(leaves(half)) for half in (first, second)]
    words = [[leaf for leaf in half if isinstance(leaf, str)] for half in both]
    assert [leaf for leaf in leaves(whole) if isinstance(leaf, str)] == words[0] + words[1]
    tensors = [[leaf for leaf in half if isinstance(leaf, Tensor)] for half in both]
    together = [leaf for leaf in leaves(whole) if isinstance(leaf, Tensor)]
    for all_rows, one, two in zip(together, *tensors, strict=True):
        assert len(all_rows) == len(one) + len(two)
        for part, rows in ((one, all_rows[: len(one)]), (two, all_rows[len(one) :])):
            # Tokens are padded to the longest caption of their own batch.
            width = slice(None) if part.dim() < 2 else slice(part.shape[1])
            assert torch.equal(rows[:, width] if part.dim() > 1 else rows, part)


@pytest.mark.parametrize("name", list(SMALL))
def test_losses_are_finite_and_reach_every_part(name: str) -> None:
    task = built(name)
    parts = task.parts()
    assert set(parts) <= set(task.PARTS)
    own = {id(p) for module in task.modules.values() for p in module.parameters()}
    trained_here = [p for parameters in parts.values() for p in parameters]
    assert len({id(p) for p in trained_here}) == len(trained_here) and {id(p) for p in trained_here} <= own
    before = [p.detach().clone() for p in trained_here]
    try:
        with torch.no_grad():
            for parameter in trained_here:  # gates and gains that are initialised to zero block gradients at first
                parameter.add_(0.02 * torch.randn_like(parameter))
        for parameter in trained_here:
            parameter.requires_grad_(True)
        loss = task.loss(task.batch(40, 4), 40)
        assert loss.per_sample.shape == (4,)
        assert loss.per_sample.isfinite().all()
        assert all(torch.as_tensor(value).isfinite().all() for value in loss.metrics.values())
        loss.per_sample.mean().backward()
        for part, parameters in parts.items():
            reached = [p for p in parameters if p.grad is not None and p.grad.abs().sum() > 0]
            assert len(reached) > 0.5 * len(parameters), part
            assert all(p.grad.isfinite().all() for p in reached if p.grad is not None), part
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained_here, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None
                parameter.requires_grad_(False)


@pytest.mark.parametrize("name", list(SMALL))
def test_losses_are_functions_of_batch_and_images_seen(name: str) -> None:
    task = built(name)
    batch = task.batch(8, 2)
    with torch.no_grad():
        first = task.loss(batch, 8).per_sample
        torch.rand(1)
        assert torch.equal(first, task.loss(batch, 8).per_sample)


@pytest.mark.parametrize("name", ["recogniser", "reader", "finder"])
def test_the_judges_tasks_validate_and_export_files_that_the_judge_loads(name: str, tmp_path: Path) -> None:
    task = built(name)
    with torch.no_grad():
        numbers = task.validate(tmp_path, 0)
        task.export(tmp_path)
        task.show(task.batch(0, 4), tmp_path / "first_batch.png")
    assert (tmp_path / "first_batch.png").stat().st_size > 1000
    assert numbers and all(abs(value) < float("inf") for value in numbers.values())
    load: Any = {"recogniser": Recogniser.load, "reader": Reader.load, "finder": load_finder}[name]
    loaded, own = load(tmp_path / name), task.modules[name]
    assert loaded.state_dict().keys() == own.state_dict().keys()
    for key, value in own.state_dict().items():
        assert torch.allclose(loaded.state_dict()[key].float(), value.float(), atol=2e-3, rtol=2e-3), key


def test_the_second_recogniser_is_another_network_trained_on_other_people(tmp_path: Path) -> None:
    context = TaskContext("second_recogniser", 3, torch.device("cpu"), tmp_path, data())
    settings = {**SETTINGS["recogniser"], "people": "second_judge", "architecture": "transformer"}
    task = SmallRecogniser(RecogniserSettings(**settings), context)
    with torch.no_grad():
        task.prepare()
    first = built("recogniser")
    assert isinstance(first, RecogniserTask)
    seeds = [each.pictures.gallery.first_seed for each in (first, task)]
    assert seeds[1] - seeds[0] >= 2_000_000 and seeds[1] in JUDGE and seeds[1] in SECOND_JUDGE
    assert "second_recogniser" in task.modules and "recogniser" not in task.modules  # each loads its own weights
    task.loss(task.batch(0, 2), 8).per_sample.sum().backward()
    assert all(parameter.grad is not None for parameter in task.recogniser.parameters())
    with torch.no_grad():
        numbers = task.validate(tmp_path, 8)
    task.export(tmp_path)
    loaded = load_recogniser(tmp_path / "recogniser")
    assert isinstance(loaded, TransformerRecogniser)
    assert loaded.config["limit"] == pytest.approx(numbers["limit"], abs=1e-4) and 0 < numbers["mistaken"] <= 1
    with pytest.raises(ConfigError, match="judge_identities"):
        data_settings({"judge_identities": 3_000_000})  # they would reach the second recogniser's people


def test_the_finders_batches_hold_zero_to_four_people() -> None:
    images, boxes, valid = built("finder").batch(0, 64)
    assert images.shape == (64, 3, 128, 128)
    assert set(valid.sum(1).tolist()) == {0, 1, 2, 3, 4}
    assert (boxes[valid][:, 2:] > 0).all()


def test_a_micro_batch_of_whole_pictures_alone_has_a_loss() -> None:
    task = built("clip")
    mixed = task.settings
    task.settings = mixed.model_copy(update={"whole_share": 1.0})
    try:
        batch = task.batch(0, 2)
        loss = task.loss(batch, 0)
    finally:
        task.settings = mixed
    assert len(batch.crops) == 0 and loss.per_sample.isfinite().all() and "caption_hits" in loss.metrics


def test_the_base_pairs_captions_with_pictures_and_drops_some() -> None:
    batch = built("base").batch(0, 64)
    assert batch.latents.shape == (64, 32, 8, 8)
    assert batch.sentences.clip.mask is not None and batch.sentences.t5.mask is not None
    lengths = batch.sentences.clip.mask.sum(1)
    assert 0 < (lengths == 2).sum() < 20  # dropped captions: start and end tokens alone
    assert lengths.max() > 40 and (lengths[lengths > 2] < 15).any()  # dense captions, and terse ones


def test_cached_sentences_equal_the_encoders_outputs() -> None:
    task = built("base")
    rows, styles = torch.tensor([1, 5, 2, 1]), ["dense", "rewritten", "terse", "dense"]
    store = task.gallery_caches["train"].sentences
    dropped = torch.tensor([False, False, False, True])
    got = store.take(rows, styles, dict.fromkeys(("clip", "t5", "byt5"), dropped))
    texts = store.gallery.captions(rows, styles)
    assert " skin" in texts[0] and texts[2].startswith("person") and texts[0] == texts[3]
    with torch.no_grad():
        for tokens, encode in ((got.clip, task.text.encode_clip), (got.t5, task.text.encode_t5)):
            assert tokens.mask is not None
            for row, text in enumerate((*texts[:3], "")):
                wanted = encode([text])
                length = int(tokens.mask[row].sum())
                assert length == wanted.mask.sum()
                assert torch.allclose(tokens.values[row, :length], wanted.values[0, :length], atol=5e-3), text
    assert got.letters == [encoders.quoted(text) for text in texts[:3]] + [""]
    again = store.take(rows, styles, {"t5": dropped})  # only one branch drops the last caption
    assert again.clip.mask is not None and again.t5.mask is not None
    assert torch.equal(again.clip.values[0, :8], got.clip.values[0, :8])
    assert again.clip.mask[3].sum() == again.clip.mask[0].sum() and again.t5.mask[3].sum() < again.t5.mask[0].sum()
    assert again.letters[3] == again.letters[0]
    shifted = got.shifted()
    assert torch.equal(shifted.clip.values[1], got.clip.values[0]) and shifted.letters[1] == got.letters[0]


def test_each_process_caches_its_sentences_in_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, rows, caption_styles = built("base"), torch.tensor([1, 5]), ["terse", "dense"]
    gallery = task.gallery_caches["train"].pictures.gallery
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    taken = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        store = SentenceStore(gallery, task.text, tmp_path)
        assert store.t5.missing([3, 16]) == [3, 16]  # the other process has cached them, but in its own files
        taken.append(store.take(rows, caption_styles))
    assert torch.equal(taken[0].t5.values, taken[1].t5.values)
    assert len(list(tmp_path.glob("t5-*.f16"))) == len(list(tmp_path.glob("clip-*.f16"))) == 2


def test_the_pooled_sentence_changes_the_prediction() -> None:
    task = built("base")
    batch = task.batch(0, 2)
    noise, t = task.noise(batch.latents, 0, 0)
    with torch.no_grad():
        task.unet.class_embedding.linear_2.weight.add_(0.1)
        try:
            one = task.predict(noise, t, batch.sentences)
            other = dataclasses.replace(
                batch.sentences, clip=Tokens(torch.zeros_like(batch.sentences.clip.values), batch.sentences.clip.mask)
            )
            assert task.unet.config.class_embed_type == "projection"
            assert not torch.allclose(one, task.predict(noise, t, other))
        finally:
            task.unet.class_embedding.linear_2.weight.sub_(0.1)


def test_a_task_can_omit_a_text_branch() -> None:
    whole = built("base")
    settings = BaseSettings(widths=(32, 32), pooled=False, text_branches=("byt5",))
    task = SmallBase(settings, dataclasses.replace(whole.context, folder=with_tokenizers(home() / "built" / "byt5")))
    assert {spec.name for spec in task.text_adapter.branch_specs} == {"byt5"}
    batch = whole.batch(0, 4)
    without_t5 = dataclasses.replace(
        batch.sentences, t5=Tokens(torch.zeros_like(batch.sentences.t5.values), batch.sentences.t5.mask)
    )
    noise, t = task.noise(batch.latents, 0, 0)
    with torch.no_grad():
        assert torch.equal(task.predict(noise, t, batch.sentences), task.predict(noise, t, without_t5))
        assert not torch.equal(whole.predict(noise, t, batch.sentences), whole.predict(noise, t, without_t5))
    assert task.encode_texts(["a person"])[1].keys() == {"byt5"}
    without_byt5 = SmallBase(settings.model_copy(update={"text_branches": ("t5",)}), task.context)
    assert without_byt5.parts()["byt5"] == [] and len(without_byt5.parts()["text_adapter"]) > 0
    for wrong in (["byt5"], [], ["t5", "t5"]):
        with pytest.raises(ValueError, match=r"pooled to false|each once"):
            BaseSettings.model_validate({"text_branches": wrong})


def test_a_stage_can_start_from_a_folder_of_weights(tmp_path: Path) -> None:
    task = built("clip")
    fresh = SMALL["clip"](SMALL["clip"].Settings(), dataclasses.replace(task.context, seed=9))
    folder = trained() / "clip" / "export"
    assert set(load_initial(fresh.modules, folder)) == {"image_encoder", "text_encoder", "text_encoder_2"}
    wanted = read_tensors(trained() / "clip" / "weights.safetensors")[0]
    for name in ("image_encoder", "text_encoder", "text_encoder_2"):
        for path, value in fresh.modules[name].state_dict().items():
            assert torch.allclose(value, wanted[f"{name}.{path}"], atol=1e-6), path
    with pytest.raises(WeightsError, match="There is no folder"):
        load_initial(fresh.modules, tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="no weights that this stage can start from"):
        load_initial(fresh.modules, tmp_path)


def test_tensors_that_match_a_pattern_stay_random() -> None:
    task = built("clip")
    fresh = SMALL["clip"](SMALL["clip"].Settings(), dataclasses.replace(task.context, seed=9))
    folder, vision = trained() / "clip" / "export", fresh.modules["image_encoder"]
    before = {path: value.clone() for path, value in vision.state_dict().items()}
    kept = [path for path in before if path.endswith(".bias")]
    for parameter in vision.parameters():
        parameter.data.add_(1.0)  # so that no value is the same by chance
    load_initial(fresh.modules, folder, fresh=["image_encoder.*.bias"])
    wanted = read_tensors(trained() / "clip" / "weights.safetensors")[0]
    assert 0 < len(kept) < len(before)
    for path, value in vision.state_dict().items():
        expected = before[path] + 1.0 if path in kept else wanted[f"image_encoder.{path}"]
        assert torch.allclose(value, expected, atol=1e-6), path


def test_a_stage_takes_the_tokenizers_of_its_initial_weights(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert not copy_tokenizers([tmp_path / "nowhere"], here) and not here.exists()
    for folder, mark in ((here, "one"), (there, "two")):
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            (folder / name).mkdir(parents=True)
            (folder / name / "tokenizer.json").write_text(mark)
    assert copy_tokenizers([here, there, tmp_path / "nowhere"], tmp_path / "stage")
    assert (tmp_path / "stage" / "tokenizer_2" / "tokenizer.json").read_text() == "two"
    assert copy_tokenizers([here], tmp_path / "stage")  # a stage that has its tokenizers keeps them
    assert (tmp_path / "stage" / "tokenizer_2" / "tokenizer.json").read_text() == "two"


@pytest.mark.parametrize("kind", ["clip", "base"])
def test_text_encoders_are_built_with_the_tokenizers_of_their_weights(kind: str, tmp_path: Path) -> None:
    small, first, later = built(kind), tmp_path / "first", tmp_path / "later"
    wanted = small.text.t5_tokenizer.get_vocab()  # of 150 sentences; a stage without weights would read 3,000
    context = dataclasses.replace(small.context, folder=first, initial=home() / "tokenizers", earlier={})
    assert SMALL[kind](small.settings, context).text.t5_tokenizer.get_vocab() == wanted
    context = dataclasses.replace(context, folder=later, initial=None, earlier={"first": first / "export"})
    assert SMALL[kind](small.settings, context).text.t5_tokenizer.get_vocab() == wanted


def test_the_adapters_references_are_mostly_other_pictures_of_the_targets_people() -> None:
    task = built("adapter")
    batch = task.batch(0, 64)
    gallery_cache = task.gallery_caches["train"]
    gallery = gallery_cache.pictures.gallery
    everybody = gallery_cache.latents.take(torch.arange(len(gallery)))
    rows = (batch.latents[:, None] == everybody[None]).flatten(2).all(2).float().argmax(1)
    real = rows % gallery.pictures == 0
    assert 0 < real.sum() < 32  # fewer than half of the targets are their own reference
    assert set(batch.strength.tolist()) == {0.0, 1.0}
    assert batch.crops.shape[:3] == (64, 1, 3) and batch.faces.shape == (64, 1, 8, 8)
    assert set(batch.faces.unique().tolist()) == {0.0, 1.0}
    assert all(0.1 < here.mean() < 0.9 for here in batch.faces)


def test_the_loss_weights_faces_and_letters_more() -> None:
    task = built("base")
    rows = torch.arange(len(task.gallery_caches["train"].pictures.gallery))
    faces, letters = task.gallery_caches["train"].faces(rows), task.gallery_caches["train"].letters(rows)
    wordless = task.gallery_caches["train"].pictures.gallery.contexts(rows).letters[:, 0] == 0
    assert wordless.any() and not wordless.all() and torch.equal(letters.flatten(1).amax(1) == 0, wordless)
    assert not (letters * faces)[:, :, :3].any()  # words are in the lower part of the picture
    settings = task.settings.model_copy(update={"letter_weight": 11.0, "face_weight": 3.0})
    task.settings, before = settings, task.settings
    batch = task.batch(0, 16)
    task.settings = before
    assert set(batch.weights.unique().tolist()) <= {1.0, 3.0, 11.0, 13.0} and (batch.weights > 10).any()
    assert torch.equal(task.batch(0, 16).weights, 1 + (before.face_weight - 1) * batch.faces)
    prediction = torch.zeros_like(batch.latents)
    wanted = prediction + (batch.weights > 10)  # the error is at the letters alone
    shares = ((batch.weights > 10) * batch.weights).flatten(1).sum(1) / batch.weights.flatten(1).sum(1)
    assert torch.allclose(squared_error(prediction, wanted, batch.weights), shares)


def test_a_letter_weight_without_effect_on_records_gives_a_warning(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").touch()
    task = built("base")
    mine = {
        "galleries": {"mine": {"records": str(tmp_path)}},
        "sources": {"mine": {"gallery": "mine", "target": "self"}},
    }
    settings = task.settings.model_copy(update={"sources": {"mine": 1.0}, "letter_weight": 20.0})
    recorded = SmallBase(settings, dataclasses.replace(task.context, data={**data(), **mine}))
    assert [warning.split(":")[0] for warning in recorded.check()] == ["letter_weight has no effect"]
    rendered = SmallBase(task.settings.model_copy(update={"letter_weight": 20.0}), task.context)
    assert rendered.check() == []
    plain = SmallBase(settings.model_copy(update={"letter_weight": 1.0}), recorded.context)
    assert plain.check() == []


def test_a_stage_can_train_on_the_shipped_autoencoder() -> None:
    folder = ROOT / "weights"
    found = load_autoencoder(folder)
    latents = found.vae.encode(torch.zeros(1, 3, 128, 128)).latent
    assert latents.shape[1] * found.patch**2 == len(found.mean) == len(found.std) and latents.dtype == torch.float32
    context = TaskContext("base", 3, torch.device("cpu"), with_tokenizers(home() / "built" / "base"), data(), folder)
    assert autoencoder_of(context) == folder
    nowhere = SmallBase(BaseSettings(widths=(32, 32)), dataclasses.replace(context, initial=None))
    with pytest.raises(ConfigError, match="needs an autoencoder"):
        nowhere.prepare()
    with pytest.raises(ConfigError, match=r"needs an autoencoder, and .*tokenizers holds none"):
        autoencoder_of(dataclasses.replace(context, initial=home() / "tokenizers"))


def test_the_autoencoder_can_train_on_shrunk_latents_and_export_its_packing(tmp_path: Path) -> None:
    context = TaskContext("autoencoder", 3, torch.device("cpu"), tmp_path, data())
    settings = AutoencoderSettings(latent_channels=2, widths=(8, 8), patch=2, equivariance=0.5)
    task = AutoencoderTask(settings, context)
    task.prepare()
    loss = task.loss(task.batch(0, 2), 0)
    assert loss.metrics["equivariance"] > 0 and loss.per_sample.isfinite().all()
    plain = AutoencoderTask(settings.model_copy(update={"equivariance": 0.0}), context)
    plain.vae.load_state_dict(task.vae.state_dict())
    plain.prepare()
    without = plain.loss(plain.batch(0, 2), 0).per_sample
    assert torch.allclose(without + 0.5 * loss.metrics["equivariance"], loss.per_sample, atol=0.2)
    assert (loss.per_sample > without).all()
    task.export(tmp_path)
    found = load_autoencoder(tmp_path)
    assert found.patch == 2 and found.mean.shape == (8,)


def test_the_decoder_can_train_with_a_loss_on_the_vision_encoders_features() -> None:
    weights, plain = ROOT / "weights", built("autoencoder")
    settings = AutoencoderSettings(faces=0.5, features=1.0)
    with pytest.raises(ConfigError, match="name a folder of weights as its initial"):
        AutoencoderTask(settings, plain.context)
    task = AutoencoderTask(settings, dataclasses.replace(plain.context, initial=weights))
    assert set(load_initial(task.modules, weights)) == {"vae", "image_encoder"}
    task.pictures = plain.pictures
    batch = task.batch(0, 8)
    assert 0 < batch.on_face.sum() < 8
    with torch.no_grad():
        loss = task.loss(batch, 0)
        task.settings = settings.model_copy(update={"features": 0.0})
        without_features = task.loss(batch, 0).per_sample
        assert torch.equal(loss.per_sample > without_features, batch.on_face)
        faces = batch.crops[batch.on_face]
        assert task._feature_loss(faces, faces).max() < 1e-9
        assert (task._feature_loss(faces.roll(1, 0), faces) > task._feature_loss(0.95 * faces, faces)).all()


@pytest.mark.parametrize("name", [*SMALL, "features"])
def test_every_task_takes_a_step_in_bf16(name: str) -> None:
    if name == "features":
        weights, plain = ROOT / "weights", built("autoencoder")
        settings = AutoencoderSettings(faces=0.5, features=1.0)
        task: Any = AutoencoderTask(settings, dataclasses.replace(plain.context, initial=weights))
        load_initial(task.modules, weights)
        task.pictures = plain.pictures
    else:
        task = built(name)
    for module in task.modules.values():
        module.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        per_sample = task.loss(task.batch(0, 8), 0).per_sample
    per_sample.mean().backward()
    gradients = [each.grad for group in task.parts().values() for each in group if each.grad is not None]
    assert torch.isfinite(per_sample).all()
    assert gradients and all(torch.isfinite(each).all() for each in gradients)


def test_a_chain_of_stages_trains_to_the_end() -> None:
    output = trained()
    for name in CHAIN:
        assert (output / name / "done.json").exists(), name
        saved = {path.split(".")[0] for path in read_tensors(output / name / "weights.safetensors")[0]}
        task = built(name)
        trained_parts = ADAPTER_PARTS if name == "adapter" else task.PARTS
        in_parts = {id(p) for part in trained_parts for p in task.parts()[part]}
        trains = {m for m, network in task.modules.items() if any(id(p) in in_parts for p in network.parameters())}
        assert saved == trains, name
    assert "unet" in built("adapter").modules and "unet" not in saved  # the adapter's base is frozen
    for name in ("autoencoder", "base", "adapter"):
        assert list((output / name / "samples").rglob("*.png")), name
    for name in CHAIN:  # the grid of the first batch is not blank
        with Image.open(output / name / "first_batch.png") as sheet:
            assert len(sheet.convert("RGB").getcolors(1 << 20) or []) > 50, name
    with pytest.raises(ConfigError, match="base has batch_size 2, not 4"):
        run_stages(load_run(home() / "run.yaml", ["base.batch_size=4"]), output, tasks=SMALL)


def test_later_stages_start_from_the_weights_of_earlier_ones() -> None:
    """Muon and AdamW move a weight by about the learning rate per step, so two steps leave it near its start."""
    clip = read_tensors(trained() / "clip" / "weights.safetensors")[0]
    found = read_tensors(trained() / "adapter" / "weights.safetensors")[0]
    shared = [path for path in found if path in clip and found[path].ndim == 2]
    assert shared
    for path in shared:
        assert (found[path] - clip[path]).abs().max() < 0.02, path


def test_exports_load_through_the_public_loaders_with_averaged_weights() -> None:
    def weights(stage: str, module: str) -> dict[str, Tensor]:
        tensors = read_tensors(trained() / stage / "weights.safetensors")[0]
        return {p.removeprefix(f"{module}."): v for p, v in tensors.items() if p.startswith(f"{module}.")}

    found = load_autoencoder(trained() / "autoencoder" / "export")
    assert found.mean.shape == found.std.shape == (32,) and (found.std > 0).all()
    base = trained() / "adapter" / "export"  # an adapter's export includes its base
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    text = load_text_encoders(base)
    adapter = trained() / "adapter" / "export"
    loaded: list[tuple[Any, str, str]] = [
        (found.vae, "autoencoder", "vae"),
        (unet, "base", "unet"),
        (Adapter.load(base / "text_adapter", unet), "base", "text_adapter"),
        (text.clip, "clip", "text_encoder"),
        (text.t5, "clip", "text_encoder_2"),
        (text.byt5, "base", "text_encoder_3"),
        (VisionEncoder.from_pretrained(adapter / "image_encoder"), "adapter", "image_encoder"),
        (Adapter.load(adapter / "adapter", unet), "adapter", "adapter"),
    ]
    for module, stage, name in loaded:
        state, wanted = module.state_dict(), weights(stage, name)
        assert wanted and set(wanted) <= set(state), name
        for path, value in wanted.items():
            assert torch.allclose(state[path].float(), value.float(), atol=1e-2, rtol=1e-2), (name, path)
    clip, branches = text.encode(['a person with the letters "SKY"'])
    assert clip.values.isfinite().all() and set(branches) == {"t5", "byt5"}


def test_a_run_can_be_assembled_into_a_folder_of_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assemble(trained(), tmp_path / "weights", defaults={"default_steps": 3})
    assert "not fully trained" not in caplog.text
    pipe = ImaginePipeline.from_pretrained(tmp_path / "weights")
    assert pipe.config.default_steps == 3
    wanted = read_tensors(trained() / "adapter" / "weights.safetensors")[0]
    assert pipe.adapter is not None
    for path, value in pipe.adapter.state_dict().items():
        assert torch.allclose(value.float(), wanted[f"adapter.{path}"], atol=1e-2, rtol=1e-2), path
    run = tmp_path / "run"
    shutil.copytree(trained(), run)
    shutil.copytree(run / "autoencoder" / "export", run / "decoder" / "export")  # as if a stage had trained it further
    (run / "decoder" / "export" / "latents.json").write_text(json.dumps({"mean": [0.5] * 32, "std": [2.0] * 32}))
    (run / "adapter" / "done.json").unlink()  # as if the last stage had been stopped
    assemble(run, tmp_path / "decoded")
    assert "not fully trained; the weights come from its stage adapter" in caplog.text
    assert ImaginePipeline.from_pretrained(tmp_path / "decoded").config.latents_mean == [0.5] * 32
    with pytest.raises(WeightsError, match=r"adapter holds no best weights. Set best_by"):
        assemble(run, tmp_path / "best", best=True)
    shutil.copytree(run / "adapter" / "export", run / "adapter" / "best")
    file = run / "adapter" / "best" / "adapter" / FILE_NAME
    tensors, facts = read_tensors(file)
    write_tensors(file, {name: torch.full_like(value, 0.5) for name, value in tensors.items()}, facts)
    (tmp_path / "decoded" / "README.md").write_text("a card")
    (tmp_path / "decoded" / "adapter" / "old.txt").touch()
    assemble(run, tmp_path / "decoded", best=True)
    best = ImaginePipeline.from_pretrained(tmp_path / "decoded").adapter
    assert best is not None and all((value == 0.5).all() for value in best.parameters())
    names = {path.name for path in (tmp_path / "decoded").iterdir()}
    assert "README.md" in names and not [name for name in names if name.startswith(".")]
    assert not (tmp_path / "decoded" / "adapter" / "old.txt").exists()
    with pytest.raises(WeightsError, match="no export of the stage nobody"):
        assemble(trained(), tmp_path / "other", stage="nobody")
    with pytest.raises(WeightsError, match="is not the folder of a run"):
        assemble(tmp_path, tmp_path / "other", initial=trained() / "autoencoder" / "export")


def likeness_stages() -> Path:
    """Write a run file with a likeness network and an adapter with a likeness loss after the chain; return its path."""
    run = yaml.safe_load((home() / "run.yaml").read_text())
    run["stages"]["likeness"] = {
        "task": "likeness", "train": {"likeness": 1e-3}, "muon": ["likeness"], "start_from": ["autoencoder"],
        "settings": SETTINGS["likeness"],
    }  # fmt: skip
    run["stages"]["alike"] = {
        **run["stages"]["adapter"], "start_from": ["autoencoder", "clip", "base", "likeness"],
        "settings": {**SETTINGS["adapter"], "likeness": 0.5},
    }  # fmt: skip
    (home() / "alike.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    return home() / "alike.yaml"


def test_an_adapter_can_train_with_a_likeness_loss() -> None:
    output, path = trained(), likeness_stages()
    with_tokenizers(output / "alike")
    assert run_stages(load_run(path), output, resume=True, only=["likeness", "alike"], tasks=SMALL)
    lines = [json.loads(line) for line in (output / "alike" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["error"] > 0 and 0 < line["strange"] < 2 for line in lines if "loss" in line)
    assert -1 <= lines[-1]["validate/likeness"] <= 1
    saved = {name.split(".")[0] for name in read_tensors(output / "alike" / "weights.safetensors")[0]}
    assert "likeness" not in saved  # the likeness network is frozen


def test_a_likeness_loss_needs_its_network_and_is_zero_without_a_reference() -> None:
    task = built("adapter")
    settings = task.settings.model_copy(update={"likeness": 2.0})
    with pytest.raises(ConfigError, match="name a stage `likeness` in its start_from"):
        SmallAdapter(settings, task.context)
    batch = task.batch(0, 4)
    batch = dataclasses.replace(batch, strength=torch.tensor([1.0, 0.0, 1.0, 0.0]))
    before, task.likeness = task.settings, LikenessNetwork().requires_grad_(False)
    task.settings = settings
    try:
        with_likeness = task.loss(batch, 0).per_sample
    finally:
        task.settings, task.likeness = before, None
    plain = task.loss(batch, 0).per_sample
    assert torch.equal((with_likeness > plain), batch.strength.bool())
    assert torch.equal(with_likeness[1::2], plain[1::2])


def test_the_likeness_network_takes_two_pictures_of_one_person_and_their_face_masks() -> None:
    task = built("likeness")
    batch = task.batch(0, 4)
    assert batch.latents.shape == (4, 2, 32, 8, 8) and batch.faces.shape == (4, 2, 1, 8, 8)
    stored = task.latents.take(torch.arange(len(task.pictures.gallery)))
    rows = (batch.latents.flatten(0, 1)[:, None] == stored[None]).flatten(2).all(2).float().argmax(1).view(4, 2)
    first, second = rows.unbind(1)
    assert torch.equal(first // 2, second // 2) and (first != second).all()  # two pictures of one person
    embeddings = task.likeness(batch.latents.flatten(0, 1), batch.faces.flatten(0, 1))
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(8), atol=1e-5)
    assert not torch.allclose(embeddings, task.likeness(batch.latents.flatten(0, 1), 1 - batch.faces.flatten(0, 1)))


def test_an_adapter_stage_can_run_the_judge_at_every_validation(tmp_path: Path) -> None:
    task = built("adapter")
    before = task.settings
    task.settings = before.model_copy(update={"judge": ROOT / "weights"})
    try:
        with torch.no_grad():
            numbers = task.validate(tmp_path, 0)
    finally:
        task.settings = before
    assert {"validation_loss", "prompt", "sim_gt", "rank1_of_100", "sim_gt_ceiling"} <= numbers.keys()
    assert numbers["sim_gt"] < 0.3 < numbers["sim_gt_ceiling"]  # the adapter is untrained
    assert (tmp_path / "judged.png").exists()


def adapter_alone(output: Path) -> Run:
    """Return a run of the chain's adapter stage in `output`, where all earlier stages are done."""
    shutil.copytree(trained(), output, ignore=shutil.ignore_patterns("adapter", "checkpoints"))
    with_tokenizers(output / "adapter")
    run = load_run(home() / "run.yaml")
    longer = {"images": 24, "batch_size": 4, "checkpoint_every_seconds": 0}
    stages = {**run.stages, "adapter": run.stages["adapter"].model_copy(update=longer)}
    return run.model_copy(update={"stages": stages, "trackers": ()})


def final_weights(output: Path) -> dict[str, Tensor]:
    return read_tensors(output / "adapter" / "weights.safetensors")[0]


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "adapter" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in lines if "loss" in row]


def test_a_real_stage_ends_the_same_after_kills_and_in_two_processes(tmp_path: Path) -> None:
    straight, killed, parallel = tmp_path / "straight", tmp_path / "killed", tmp_path / "parallel"
    process = start_training(adapter_alone(straight), straight, tasks=SMALL)
    process.join()
    assert process.exitcode == DONE, stderr_of(straight)
    run, checkpoints = adapter_alone(killed), killed / "adapter" / "checkpoints"
    for images in (4, 16):  # once in the first half, and once after the learning rate has started to decay
        process = start_training(run, killed, tasks=SMALL)
        while process.is_alive() and not list(checkpoints.glob(f"{images:012d}*.safetensors")):
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, stderr_of(killed)
    process = start_training(run, killed, tasks=SMALL)
    process.join()
    assert process.exitcode == DONE, stderr_of(killed)
    wanted, found = final_weights(straight), final_weights(killed)
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == [] and len(wanted) > 50
    assert run_in_processes(adapter_alone(parallel), parallel, tasks=SMALL) == [DONE, DONE], stderr_of(parallel)
    assert len(losses(straight)) == 6
    torch.testing.assert_close(losses(parallel), losses(straight), rtol=0, atol=1e-4)
    torch.testing.assert_close(final_weights(parallel), wanted, rtol=0, atol=1e-3)


@contextlib.contextmanager
def adapter_with(**settings: Any) -> Iterator[Any]:
    """Yield the built adapter task with other settings and an open, not fresh, vision branch."""
    task = built("adapter")
    before = task.settings
    task.settings = before.model_copy(update=settings)
    gates = [branch.gate for layer in task.adapter.layers().values() for branch in layer.branches().values()]
    for gate in gates:
        gate.data.fill_(0.05)
    try:
        yield task
    finally:
        task.settings, task.teacher = before, None
        for gate in gates:
            gate.data.zero_()


@pytest.mark.parametrize("name", ["alignment", "alignment_layout", "localisation", "preview"])
def test_further_losses_on_the_person_are_added_and_zero_without_a_reference(name: str) -> None:
    with adapter_with() as task:
        if name == "preview":
            torch.manual_seed(1)
            task.teacher = Recogniser().requires_grad_(False).eval()
        batch = task.batch(0, 4)
        batch = dataclasses.replace(batch, strength=torch.tensor([1.0, 0.0, 1.0, 0.0]))
        task.settings = task.settings.model_copy(update={name: 2.0})
        with_term = task.loss(batch, 0)
        task.settings, task.teacher = task.settings.model_copy(update={name: 0.0}), None
        plain = task.loss(batch, 0).per_sample
        assert torch.equal(with_term.per_sample > plain, batch.strength.bool())
        assert torch.equal(with_term.per_sample[1::2], plain[1::2])


def test_further_losses_reach_the_adapter(tmp_path: Path) -> None:
    for name in ("alignment", "alignment_layout", "localisation", "preview"):
        with adapter_with(**{name: 1.0}) as task:
            if name == "preview":
                task.teacher = Recogniser().requires_grad_(False).eval()
            gates = [b.gate for layer in task.adapter.layers().values() for b in layer.branches().values()]
            for gate in gates:
                gate.requires_grad_(True)
            batch = task.batch(0, 2)
            noise, t = task.noise(batch.latents, 0, 0)
            watch: dict[str, dict[str, Any]] = {"text": {}, "vision": {}}
            prediction = task.prediction(batch, task.vision_tokens(batch.crops), noise, t, {}, watch)
            terms = task._identity_terms(batch, prediction, noise, t, watch)
            next(term for key, term in terms.items() if term.requires_grad and bool(term.any())).sum().backward()
            assert any(gate.grad is not None and bool(gate.grad.any()) for gate in gates), name
            for gate in gates:
                gate.requires_grad_(False)
                gate.grad = None


def test_dropped_tokens_are_masked_and_the_global_one_stays() -> None:
    with adapter_with(drop_tokens=0.5) as task:
        tokens = Tokens(torch.randn(8, 9, 32))
        one, other = task._without_some(tokens, 0), task._without_some(tokens, 8)
        assert one.mask[:, 0].all() and 0.2 < float(one.mask[:, 1:].float().mean()) < 0.8
        assert not torch.equal(one.mask, other.mask) and torch.equal(one.mask, task._without_some(tokens, 0).mask)
    with adapter_with() as task:
        assert task._without_some(tokens, 0) is tokens


def test_a_preview_loss_needs_its_teacher_who_trains_on_the_generators_people(tmp_path: Path) -> None:
    settings = built("adapter").settings.model_copy(update={"preview": 1.0})
    with pytest.raises(ConfigError, match="name a stage `teacher`"):
        SmallAdapter(settings, built("adapter").context)
    with pytest.raises(ValueError, match="localisation compares outputs of parallel attention"):
        AdapterSettings(**SETTINGS["adapter"], localisation=1.0, vision_fusion="concatenated")
    context = TaskContext("teacher", 3, torch.device("cpu"), tmp_path, data())
    task = SmallRecogniser(RecogniserSettings(**SETTINGS["recogniser"], people="train"), context)
    assert "teacher" in task.modules and "recogniser" not in task.modules  # never loaded from the judge
    assert len(task.prototypes.weight) == data()["identities"]
    with torch.no_grad():
        task.prepare()
    batch, labels = task.batch(0, 4)
    assert task.pictures.gallery.split == "train" and batch.shape[0] == 4 and int(labels.max()) < data()["identities"]


def test_the_vision_branch_alone_can_be_concatenated() -> None:
    task = SmallAdapter(AdapterSettings(**SETTINGS["adapter"], vision_fusion="concatenated"), built("adapter").context)
    assert [spec.fusion for spec in task.adapter.branch_specs] == ["concatenated"]
    assert {spec.fusion for spec in task.text_adapter.branch_specs} == {"parallel"}
