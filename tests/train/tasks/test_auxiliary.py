"""The auxiliary losses of the denoiser's stages: what they reach, that they can be learnt, and that off is off."""

import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from torch import Tensor, nn

from imagine.errors import ConfigError
from imagine.networks.models import build_autoencoder
from imagine.records import Watched
from imagine.world.parts import PARTS
from train.config import load_run
from train.data.language import make_tokenizers
from train.run.checkpoint import read_tensors, write_json
from train.stages import _default_settings, run_stages
from train.task import TaskContext
from train.tasks import letter_losses
from train.tasks.adapter import AdapterSettings, AdapterTask
from train.tasks.auxiliary import READER
from train.tasks.base import BaseSettings, BaseTask
from train.tasks.part_loss import _COVERED, PartHead, part_loss
from train.tasks.reader import ReaderSettings, ReaderTask

DENOISER: dict[str, Any] = {"widths": [32, 32], "sources": {"synthetic": 1.0}}
WORDS = {"start": 0.75, "end": 0.75}
LOSSES: dict[str, dict[str, Any]] = {
    "glyph": {"glyph": 1.0},
    "letter_attention": {"letter_attention": 1.0},
    "reader_loss": {"reader_loss": 1.0, "reader_time": 1.0, "reader_items": 2},
    "part_loss": {"part_loss": 1.0},
}
EVERYTHING = {name: value for each in LOSSES.values() for name, value in each.items()}
REACHED = {  # the parameters that a loss must reach, by module and by a part of their path
    "glyph": {"glyph_head": "", "text_adapter": "up_blocks.1.attentions.0.transformer_blocks.0.attn2.byt5.to_v",
              "text_encoder_3": ""},
    "letter_attention": {"unet": "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q",
                         "text_adapter": "down_blocks.0.attentions.0.transformer_blocks.0.attn2.byt5.to_k",
                         "text_encoder_3": ""},
    "reader_loss": {"unet": "conv_out", "text_adapter": "byt5.to_v"},
    "part_loss": {"part_head": "", "unet": "up_blocks.0.resnets.0.conv1"},
}  # fmt: skip


class SmallBase(BaseTask):
    VALIDATION_PEOPLE: ClassVar[int] = 4
    DRAWING_STEPS: ClassVar[int] = 1


class SmallAdapter(AdapterTask):
    VALIDATION_PEOPLE: ClassVar[int] = 4
    DRAWING_STEPS: ClassVar[int] = 1


@functools.cache
def home() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="imagine-auxiliary-"))
    make_tokenizers(folder / "stage" / "cache", sentences=150)
    torch.manual_seed(0)
    export = folder / "autoencoder" / "export"
    build_autoencoder(32, (8, 8, 16, 32)).save_pretrained(export / "vae")
    (export / "latents.json").write_text(json.dumps({"mean": [0.0] * 32, "std": [1.0] * 32}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _tidy() -> Iterator[None]:
    yield
    shutil.rmtree(home())


def data() -> dict[str, Any]:
    return {"folder": str(home() / "data"), "identities": 24, "pictures": 2}


def context(**changes: Any) -> TaskContext:
    earlier = {"autoencoder": home() / "autoencoder" / "export", READER: home()}
    plain = TaskContext("base", 3, torch.device("cpu"), home() / "stage", data(), None, earlier)
    return dataclasses.replace(plain, **changes)


@functools.cache
def task(name: str = "", kind: str = "base") -> Any:
    """Return a task with all losses ("all"), or with none."""
    extra: dict[str, Any] = {**EVERYTHING, "words": WORDS} if name == "all" else {}
    torch.manual_seed(0)
    found: Any
    if kind == "base":
        found = SmallBase(BaseSettings(**DENOISER, **extra), context())
    else:
        found = SmallAdapter(AdapterSettings(**DENOISER, **extra, lora_rank=2), context())
    with torch.no_grad():
        found.prepare()
    return found


def trained_parameters(here: Any) -> list[nn.Parameter]:
    return [parameter for part in here.parts().values() for parameter in part]


def batch_of(here: Any, first: int, size: int) -> Any:
    with torch.no_grad():
        return here.batch(first, size)


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_reaches_what_it_must_teach_and_falls_on_one_batch(name: str) -> None:
    here = task("all")
    for module in here.modules.values():
        module.requires_grad_(False)
    parameters = trained_parameters(here)
    for parameter in parameters:
        parameter.requires_grad_(True)
    saved = [parameter.detach().clone() for parameter in parameters]
    batch, values = batch_of(here, 0, 8), []
    optimiser = torch.optim.Adam(parameters, 3e-3)
    for step in range(7):
        loss = here.loss(batch, 0)
        term = loss.metrics[name]  # the loss alone, without the denoiser's error
        values.append(float(term.detach()))
        optimiser.zero_grad()
        term.backward()
        if step == 0:
            whole = sum(float(loss.metrics[each].detach()) for each in ("error", *LOSSES))
            assert float(loss.per_sample.detach().mean()) == pytest.approx(whole, rel=1e-5)
            check_reached(here, name)
        optimiser.step()
    # Through a decoder and a reader that are not trained, a word can hardly be changed.
    assert values[-1] < (0.998 if name == "reader_loss" else 0.9) * values[0], values
    with torch.no_grad():
        for parameter, value in zip(parameters, saved, strict=True):
            parameter.copy_(value)
            parameter.grad = None


def check_reached(here: Any, name: str) -> None:
    for module, path in REACHED[name].items():
        reached = [
            float(parameter.grad.abs().sum())
            for own, parameter in here.modules[module].named_parameters()
            if path in own and parameter.grad is not None
        ]
        assert reached and max(reached) > 0, (module, path)
    if name != "reader_loss":
        assert here.unet.conv_out.weight.grad is None or not here.unet.conv_out.weight.grad.any()
    if READER in here.modules:
        assert all(parameter.grad is None for parameter in here.modules[READER].parameters())


@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_off_adds_no_module_no_watch_and_no_term(kind: str) -> None:
    plain, whole = task("", kind), task("all", kind)
    assert not plain.auxiliary.modules and plain.auxiliary.watch(0) == {} and not plain.auxiliary.needs_truth
    assert batch_of(plain, 0, 4).truth is None
    metrics = plain.loss(batch_of(plain, 0, 2), 0).metrics
    assert set(metrics) == set()
    names = set(whole.loss(batch_of(whole, 0, 4), 0).metrics)
    assert names == {"error", "words", *LOSSES}
    assert {"glyph_head", "part_head", READER} <= set(whole.modules)
    heads = {id(p) for name in ("glyph_head", "part_head") for p in whole.modules[name].parameters()}
    assert heads <= {id(p) for p in trained_parameters(whole)}
    assert not {id(p) for p in whole.modules[READER].parameters()} & {id(p) for p in trained_parameters(whole)}


def test_the_heads_do_not_change_the_denoisers_own_error() -> None:
    plain, whole = task(), task("all")
    for name in ("unet", "text_adapter", "text_encoder", "text_encoder_2", "text_encoder_3"):
        whole.modules[name].load_state_dict(plain.modules[name].state_dict())
    batch = batch_of(whole, 0, 4)
    with torch.no_grad():
        alone = plain.loss(batch, 0)
        together = whole.loss(batch, 0)
    assert alone.metrics == {} and together.metrics["error"] == alone.per_sample.mean()
    assert (together.per_sample > alone.per_sample).all()


def test_the_share_of_words_is_drawn_and_reported() -> None:
    here = task("all")
    batch = batch_of(here, 0, 64)
    share = float((batch.truth.letters[:, 0] > 0).float().mean())
    assert share == pytest.approx(0.75, abs=0.04)
    plain = task()
    rows = plain.mixture.draw(3, 0, 64).targets
    natural = float((here.gallery_caches["train"].truth(rows).letters[:, 0] > 0).float().mean())
    assert natural < 0.4
    assert (
        here.loss(batch_of(here, 0, 8), 0).metrics["words"]
        == batch_of(here, 0, 8).truth.letters[:, 0].gt(0).float().mean()
    )


def test_the_truth_describes_the_targets_of_the_batch() -> None:
    here = task("all")
    drawn, batch = here.mixture.draw(3, 8, 8), batch_of(here, 8, 8)
    gallery = here.gallery_caches["train"].pictures.gallery
    contexts = gallery.contexts(drawn.targets)
    assert torch.equal(batch.truth.letters, contexts.letters)
    assert torch.equal(batch.truth.boxes, gallery.letters(drawn.targets))
    assert batch.truth.parts.shape == (8, 8, 16, 16)
    head = batch.truth.parts[:, 0].mean((1, 2))
    assert ((head > 0.03) & (head < 0.5)).all()


def test_parts_and_reader_count_only_where_their_settings_say() -> None:
    settings = BaseSettings(**DENOISER, part_loss=1.0, part_loss_end=100, reader_loss=1.0, reader_start=50)
    torch.manual_seed(0)
    here = SmallBase(settings, context())
    here.prepare()
    batch = batch_of(here, 0, 4)
    names = {first: set(here.loss(batch, first).metrics) for first in (0, 50, 100)}
    assert names == {
        0: {"error", "part_loss"},
        50: {"error", "part_loss", "reader_loss"},
        100: {"error", "reader_loss"},
    }
    assert here.auxiliary.watch(100) == {} and "states" in here.auxiliary.watch(0)


def test_the_reader_reads_a_few_pictures_with_little_noise_whose_word_is_known() -> None:
    here = task("all")
    batch = batch_of(here, 0, 32)
    known = letter_losses.knows_word(batch.truth.letters, batch.sentences.letters)
    eligible = known & letter_losses.readable(batch.truth.boxes, 128)
    assert 4 < eligible.sum() < 32
    t = torch.linspace(0, 1, 32)
    others = {"glyph": 0, "letter_attention": 0, "part_loss": 0}
    small = here.auxiliary.settings.model_copy(update={"reader_time": 0.5, "reader_items": 3, **others})
    auxiliary, before = here.auxiliary, here.auxiliary.settings
    auxiliary.settings = small
    try:
        with torch.no_grad():
            terms = here.auxiliary_terms(batch, {}, batch.latents, t, 0)["reader_loss"]
    finally:
        auxiliary.settings = before
    assert torch.equal(terms > 0, torch.isin(torch.arange(32), (eligible & (t <= 0.5)).nonzero().squeeze(1)[:3]))
    assert (terms > 0).sum() == 3


def test_the_attention_of_letters_is_best_inside_their_cells() -> None:
    boxes = torch.tensor([[32.0, 64, 48, 16], [0, 0, 0, 0]])
    letters = torch.tensor([[1, 2, 3], [0, 0, 0]])
    each = letter_losses.letter_boxes_of(boxes, letters)
    assert each[0, :, 0].tolist() == [32, 48, 64] and each[0, :, 2].tolist() == [16] * 3 and not each[1, :, 2].any()
    two = letter_losses.letter_boxes_of(boxes[:1], torch.tensor([[1, 2, 0]]))
    assert two[0, :, 2].tolist() == [24, 24, 0]
    known = letter_losses.knows_word(letters, ["ABC", "ABC"])
    assert known.tolist() == [True, False]
    assert letter_losses.knows_word(letters, ["ABD", ""]).tolist() == [False, False]

    def loss(place: int) -> Tensor:
        """Return the loss if the token of each letter is attended to in one cell, `place` cells to the right."""
        query, key = torch.zeros(2, 1, 64, 64), torch.zeros(2, 1, 16, 64)
        query[:, 0] = 400 * torch.eye(64)
        key[:, 0, 3] = 0.5  # the end token is attended to wherever no letter is
        for token in range(3):
            key[:, 0, token, 4 * 8 + 2 + token + place] = 1.0
        return letter_losses.letter_attention_loss({"a": Watched(query, key)}, each, known, 128, (8, 8))

    assert loss(0)[0] < 0.7 and loss(0)[1] == 0
    assert loss(4)[0] > loss(0)[0] + 1
    assert loss(0).shape == (2,)


def test_only_the_finest_layers_count() -> None:
    fine, coarse = Watched(torch.zeros(1, 1, 64, 4), torch.zeros(1, 1, 3, 4)), torch.zeros(1, 1, 16, 4)
    layers = letter_losses.finest({"a": fine, "b": Watched(coarse, fine.key), "c": fine})
    assert len(layers) == 2 and all(each is fine for each in layers)


def test_glyphs_are_those_of_the_world_and_other_characters_do_not_count() -> None:
    shapes = letter_losses.glyphs()
    assert shapes.shape == (27, 256) and not shapes[0].any()
    assert (torch.cdist(shapes[1:], shapes[1:]) + 100 * torch.eye(26)).min() > 1  # all letters differ
    assert letter_losses._numbered("A b€Z") == [(0, 1), (6, 26)]  # the Euro sign has three bytes
    head = letter_losses.GlyphHead(8)
    watched = {"a": Watched(torch.zeros(3, 2, 64, 4), torch.zeros(3, 2, 16, 4), None, torch.randn(3, 2, 16, 4))}
    losses = letter_losses.glyph_loss(watched, head, ["AB", "", "é"])
    assert losses[0] > 0 and losses[1] == losses[2] == 0
    assert not letter_losses.glyph_loss(watched, head, ["", "", "12"]).any()


def test_parts_are_known_as_well_as_their_average_gives_one() -> None:
    masks = task("all").gallery_caches["train"].part_masks.take(torch.arange(48))
    shares = torch.tensor([_COVERED[part] for part in PARTS]).view(1, -1, 1, 1).expand_as(masks)
    assert part_loss(torch.logit(shares), masks).mean() == pytest.approx(1, abs=0.25)
    right = part_loss(torch.logit(masks.clamp(0.001, 0.999)), masks)
    assert right.mean() < 0.35
    assert PartHead(12)(torch.zeros(2, 24, 12), (4, 6)).shape == (2, len(PARTS), 8, 12)


def test_the_export_holds_no_head(tmp_path: Path) -> None:
    task("all").export(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "unet", "text_adapter", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2",
        "tokenizer_3",
    }  # fmt: skip
    tensors = read_tensors(tmp_path / "text_adapter" / "adapter.safetensors")[0]
    assert not [name for name in tensors if "head" in name]


def write_run(folder: Path, images: int, **settings: Any) -> Path:
    """Write a run of one stage `base` on the finished stages `autoencoder` and `word_reader`; return its output."""
    output = folder / "run"
    shutil.copytree(home() / "stage" / "cache", output / "base" / "cache", dirs_exist_ok=True)
    stages: dict[str, Any] = {
        "autoencoder": {"task": "autoencoder", "train": {"decoder": 1e-3}, "settings": {"widths": [8, 8, 16, 32]}},
        READER: {"task": "reader", "train": {"reader": 1e-3}, "settings": {"people": "train"}},
    }
    for name, stage in stages.items():
        place = output / name
        shutil.copytree(home() / "autoencoder", place, dirs_exist_ok=True)
        write_json(place / "done.json", {"images": 4, "from": {}, "validation": {}})
        if not (place / "weights.safetensors").exists():
            (place / "weights.safetensors").write_bytes(empty_tensors())
        stage["images"] = 4
    stages["base"] = {
        "task": "base", "start_from": ["autoencoder", READER], "images": images,
        "train": {"unet": 1e-3, "text_adapter": 1e-3, "byt5": 1e-3}, "muon": ["unet", "text_adapter"],
        "settings": {**DENOISER, **settings}, "schedule": "constant", "ema": 4,
    }  # fmt: skip
    defaults = {"batch_size": 4, "precision": "fp32", "report_every_seconds": 0}
    content = {"data": data(), "defaults": defaults, "stages": stages, "trackers": []}
    (folder / "run.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return output


def empty_tensors() -> bytes:
    from safetensors.torch import save

    return save({})


class Unvalidated(SmallBase):
    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        return {}


def test_a_resumed_run_equals_a_straight_one_bit_for_bit(tmp_path: Path) -> None:
    settings = {**EVERYTHING, "words": {"start": 0.9, "end": 0.3, "over": 8}, "reader_start": 4, "part_loss_end": 8}
    found = []
    for name, steps in (("straight", (12,)), ("resumed", (8, 12))):
        for images in steps:
            (tmp_path / name).mkdir(exist_ok=True)
            output = write_run(tmp_path / name, images, **settings)
            run = load_run(tmp_path / name / "run.yaml")
            tasks = {
                "autoencoder": "train.tasks.autoencoder:AutoencoderTask",
                "reader": ReaderTask,
                "base": Unvalidated,
            }
            assert run_stages(run, output, resume=True, tasks=tasks)
        checkpoints = sorted((output / "base" / "checkpoints").glob("*.safetensors"))
        found.append(read_tensors(checkpoints[-1])[0])
    straight, resumed = found
    assert straight.keys() == resumed.keys()
    for head in ("glyph_head", "part_head"):
        assert {path.split("/")[0] for path in straight if head in path} == {"weights", "average", "optimiser"}
    for path, value in straight.items():
        assert torch.equal(value, resumed[path]), path
    rows = [json.loads(line) for line in (tmp_path / "straight/run/base/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert {"glyph", "letter_attention", "part_loss", "words"} <= set(rows[0]) and "part_loss" not in rows[-1]
    assert "reader_loss" in rows[-1] and "reader_loss" not in rows[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"glyph": 1, "text_branches": ["t5"]}, "glyph needs the characters of byt5"),
        ({"letter_attention": 1, "fusion": "concatenated"}, "letter_attention reads a branch of characters of its own"),
        ({"reader_items": 8}, "reader_items has no effect without reader_loss"),
        ({"part_loss_end": 10}, "part_loss_end has no effect without part_loss"),
        ({"words": {"start": 0.5}}, "end"),
        ({"words": {"start": 0.5, "end": 2}}, "less than or equal to 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BaseSettings(**settings)


def test_losses_that_cannot_act_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a trained reader: name a stage `word_reader`"):
        SmallBase(BaseSettings(**DENOISER, reader_loss=1), context(earlier={}))
    for name, other in (("glyph", "unet"), ("part_loss", "text_adapter"), ("letter_attention", "vision_branch")):
        here = SmallBase(BaseSettings(**{**DENOISER, name: 1}), context(trains=(other,)))
        with pytest.raises(ConfigError, match=f"{name} has no effect, because the stage does not train"):
            here.check()
    (tmp_path / "metadata.jsonl").touch()
    mine = {
        "galleries": {"mine": {"records": str(tmp_path)}},
        "sources": {"mine": {"gallery": "mine", "target": "self"}},
    }
    recorded = context(data={**data(), **mine})
    cases: dict[str, Any] = {
        "part_loss needs masks, which the records": {"part_loss": 1},
        "words has": {"words": WORDS},
    }
    for message, wrong in cases.items():
        with pytest.raises(ConfigError, match=message):
            SmallBase(BaseSettings(**{**DENOISER, "sources": {"mine": 1}, **wrong}), recorded).check()


def test_a_reader_on_the_generators_people_is_no_judge() -> None:
    here = ReaderTask(ReaderSettings(people="train"), context())
    assert set(here.modules) == {READER}
    assert set(ReaderTask(ReaderSettings(), context()).modules) == {"reader"}
    assert here.modules[READER].state_dict().keys() == task("all").modules[READER].state_dict().keys()


def test_a_stage_of_an_earlier_version_had_the_defaults_of_new_settings(tmp_path: Path) -> None:
    write_run(tmp_path, 4)
    stage = load_run(tmp_path / "run.yaml").stages["base"]
    defaults = _default_settings(stage, "base", {"base": BaseTask})
    assert defaults["glyph"] == 0 and defaults["words"] is None and defaults["widths"] == [128, 192]
