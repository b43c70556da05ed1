"""Adapter training on SDXL and Stable Diffusion 1.5: every recipe in configs/ runs all its stages at tiny sizes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from imagine.adapter.adapter import Adapter
from imagine.adapter.attention import GATE_GAIN, attention_layers
from imagine.errors import BadRecordError, ConfigError
from imagine.people.faces import KnownBoxesFinder
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.records import Tokens
from imagine.shards.reading import Records
from tests import tiny, tiny_flow_bases, tiny_ip, tiny_stock
from tests.root import ROOT
from tests.stopping import StopsOnce
from tests.train.data.test_recorded import records, written
from train.__main__ import main
from train.assemble import assemble
from train.bases.stable_diffusion import StableDiffusion
from train.cache.tokens import TokenCache
from train.config import load_run
from train.data.public_base import BaseCodec, BaseTextEncoders, DiffusersBase, T5TextEncoder, open_base, time_ids
from train.initial_weights import load_initial
from train.plan import StagePlan, plan
from train.run.checkpoint import read_tensors
from train.selftest import self_test
from train.stages import run_stages
from train.task import TaskContext
from train.tasks.diffusers import DiffusersSettings, DiffusersTask
from train.tasks.diffusers_inputs import DiffusersBatch

CONFIGS = ROOT / "configs"
# recipe -> the tiny base that it runs on
UNET_RECIPES = {"sdxl_8gpu": "xl", "sdxl_24gb": "xl", "sd15_1gpu": "sd15"}
RECIPES = {**UNET_RECIPES, "flux2_klein_1gpu": "flux2", "zimage_8gpu": "z_image"}
FOUR = ("real", "synthetic", "fine_real", "fine_synthetic")
IDENTITY = ("vision_encoder", "vision_branch", "vision_projection", "lora")
CPU = torch.device("cpu")


class Watched(StopsOnce, DiffusersTask):
    """A task that records its instances, requires a freed autoencoder in each step, and can stop the run once."""

    instances: ClassVar[list[Any]] = []

    def __init__(self, settings: DiffusersSettings, context: TaskContext) -> None:
        super().__init__(settings, context)
        if context.device.type != "meta":  # tasks on the meta device exist only to check later stages
            self.instances.append(self)

    def loss(self, batch: DiffusersBatch, images_seen: int) -> Any:
        assert self.codec._vae is None
        return super().loss(batch, images_seen)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_home(tmp_path_factory.mktemp("diffusers"))


def tiny_home(home: Path) -> Path:
    """Fill a folder with tiny bases, encoders, an IP-Adapter and a data set, in the layout that users have."""
    for xl, name in ((True, "xl"), (False, "sd15")):
        tiny_stock.stock(xl).save_pretrained(home / name)
    for name in ("flux2", "z_image"):
        tiny_flow_bases.pipeline(name).save_pretrained(home / name)
    tiny_ip.encoder().save_pretrained(home / "vision")
    readers = tiny_stock.readers()
    for name in ("t5", "byt5"):
        readers[f"{name}_encoder"].save_pretrained(home / name)
        readers[f"{name}_tokenizer"].save_pretrained(home / name)
    save_file(tiny_ip.tensors("plus", tiny_stock.unet(True)), home / "ip.safetensors")
    written(home / "records", records())
    return home


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    Watched.instances.clear()
    yield


def overrides(home: Path, recipe: str, **more: Any) -> list[str]:
    """Return the overrides that make a recipe tiny; `more` applies to every stage."""
    base = RECIPES[recipe]
    run = load_run(CONFIGS / f"{recipe}.yaml")
    stage = {
        "images": 4, "batch_size": 2, "accumulation": 1, "warmup_images": 0, "precision": "fp32", "optimiser": "adamw",
        "validate_every": 0, "report_every_seconds": 0, "prefetch": 0, "clip": 0, "settings.base": home / base,
        "settings.vision": home / "vision", "settings.base_precision": "fp32", "settings.resolution": 16,
        "settings.lora_rank": 2, "settings.validation_images": 2, "settings.drawings": 1, "settings.drawing_steps": 2,
        **more,
    }  # fmt: skip
    lines = [f"data.folder={home / 'data' / base}", "trackers=[]"]
    lines += [f"data.galleries.{name}.records={home / 'records'}" for name in run.data["galleries"]]
    for name in run.stages:
        stage_settings = run.stages[name].settings
        given = {
            "settings.t5": home / "t5",
            "settings.byt5": home / "byt5",
            "settings.ip_adapter": home / "ip.safetensors",
        }
        files = {key: path for key, path in given.items() if key.removeprefix("settings.") in stage_settings}
        lines += [f"{name}.{key}={value}" for key, value in {**stage, **files}.items()]
        lines += [f"{name}.train.{part}=1.0e-2" for part in run.stages[name].train]
    return lines


def trained(home: Path, recipe: str, output: Path, only: tuple[str, ...] = (), **more: Any) -> bool:
    run = load_run(CONFIGS / f"{recipe}.yaml", overrides(home, recipe, **more))
    return run_stages(run, output, only=only, tasks={"diffusers_adapter": Watched})


def built(home: Path, base: str = "xl", **settings: Any) -> Watched:
    """Return a task that is ready for its first batch."""
    given = {"base": str(home / base), "vision": home / "vision", "lora_rank": 2, "resolution": 16, **settings}
    galleries = {"photos": {"records": str(home / "records")}}
    sources = {
        "real": {"gallery": "photos", "target": "self", "captions": {"dense": 1.0}},
        "pairs": {"gallery": "photos"},
    }
    data = {"folder": str(home / "data" / Path(base).name), "galleries": galleries, "sources": sources}
    torch.manual_seed(0)
    task = Watched(DiffusersSettings(**given), TaskContext("stage", 3, CPU, home / "stage", data))
    with torch.no_grad():
        for module in task.modules.values():
            module.eval().requires_grad_(False)
        task.prepare()
    return task


def files_of(task: Watched) -> DiffusersBase:
    """Return the files of a task's base, which is a Stable Diffusion."""
    assert isinstance(task.base, StableDiffusion)
    return task.base.files


def rows_of(run: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def part_of(name: str) -> str:
    """Return the part that a tensor of weights.safetensors belongs to."""
    if name.startswith("image_encoder."):
        return "vision_encoder"
    if "projections." in name:
        return "vision_projection"
    if "lora_" in name:
        return "lora"
    return next(f"{branch}_branch" for branch in ("vision", "byt5", "t5") if f".{branch}." in name)


@pytest.mark.parametrize("recipe", list(UNET_RECIPES))
def test_a_recipe_trains_the_parts_it_names_and_nothing_else(home: Path, recipe: str, tmp_path: Path) -> None:
    assert trained(home, recipe, tmp_path)
    run = load_run(CONFIGS / f"{recipe}.yaml")
    assert tuple(run.stages) == FOUR
    before: dict[str, Tensor] = {}
    for stage in FOUR:
        losses = [row["loss"] for row in rows_of(tmp_path, stage) if "loss" in row]
        assert losses and np.isfinite(losses).all()
        now = {**before, **read_tensors(tmp_path / stage / "weights.safetensors")[0]}
        named = set(run.stages[stage].train)
        moved = {part_of(name) for name, value in before.items() if not torch.equal(value, now[name])}
        assert set(IDENTITY) <= named and (not before or moved == named), stage
        before = now
    base = RECIPES[recipe]
    frozen = diffusers.UNet2DConditionModel.from_pretrained(home / base / "unet").state_dict()
    for task in Watched.instances:
        assert all(torch.equal(value, frozen[name]) for name, value in task.denoiser.state_dict().items())
    assert (tmp_path / "fine_synthetic" / "first_batch.png").stat().st_size > 500
    assert (tmp_path / "fine_synthetic" / "samples" / "000000004-pictures.png").stat().st_size > 500


def test_an_exported_adapter_draws_in_a_pipeline_around_the_same_base(home: Path, tmp_path: Path) -> None:
    assert trained(home, "sdxl_8gpu", tmp_path / "run", only=("real",), **{"settings.drawings": 0})
    assemble(tmp_path / "run", tmp_path / "out", dtype=torch.float32)
    exported = tmp_path / "run" / "real" / "export"
    pictures = {}
    for name, folder in (("export", exported), ("assembled", tmp_path / "out")):
        pipe = ImaginePipeline.from_pretrained(
            home / "xl", vision_encoder=str(folder / "image_encoder"), **tiny_stock.readers()
        )
        pipe.finder = KnownBoxesFinder([tiny.BOX])
        pipe.set_progress_bar_config(disable=True)
        for adapter in ("adapter", "text_adapter"):
            pipe.load_adapter(folder / adapter)
        call: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
        with_person, without = (
            pipe(tiny.SENTENCES[0], reference=who, generator=tiny.generator(0), **call).images
            for who in (tiny.photo(1), None)
        )
        assert np.abs(with_person - without).max() > 1e-4
        pictures[name] = with_person
    assert np.abs(pictures["export"] - pictures["assembled"]).max() < 1e-5
    loaded = load_initial(Watched.instances[0].modules, tmp_path / "out")  # a later run can start from the export
    assert loaded == ["image_encoder", "adapter", "text_adapter"]
    facts = Adapter.load(exported / "adapter", open_base(str(home / "xl")).denoiser(CPU, torch.float32)).metadata
    assert facts["base_name"] == "xl" and facts["tokens"] == "5" and facts["feature_layer"] == "penultimate"
    assert str(home) not in "".join(file.read_text() for file in exported.rglob("*.json"))


def test_a_resumed_run_equals_a_straight_run_and_encodes_nothing_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"images": 8, "settings.gradient_checkpointing": True, "settings.drawings": 0, "ema": 4}
    assert trained(home, "sd15_1gpu", tmp_path / "straight", only=("real",), **more)

    def refuse(*_: Any) -> Any:
        raise AssertionError("an encoder runs although its outputs are in the cache")

    for kind, name in ((BaseTextEncoders, "load"), (T5TextEncoder, "load"), (BaseCodec, "encode")):
        monkeypatch.setattr(kind, name, refuse)
    StopsOnce.stop_at = 4
    assert not trained(home, "sd15_1gpu", tmp_path / "stopped", only=("real",), **more)
    assert trained(home, "sd15_1gpu", tmp_path / "stopped", only=("real",), **more)
    one, other = (read_tensors(tmp_path / each / "real" / "weights.safetensors")[0] for each in ("straight", "stopped"))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_can_start_from_an_ip_adapter(home: Path) -> None:
    task = built(home, ip_adapter=home / "ip.safetensors")
    given = tiny_ip.tensors("plus", task.denoiser)
    cross = [name for name, attn in attention_layers(task.denoiser).items() if attn.is_cross_attention]
    own = task.adapter.state_dict()
    for number, layer in enumerate(cross):
        assert torch.equal(own[f"{layer}.vision.to_k.weight"], given[f"ip_adapter.{2 * number + 1}.to_k_ip.weight"])
        assert (own[f"{layer}.vision.gate"] * GATE_GAIN == 1).all()
    assert torch.equal(own["projections.vision.latents"], given["image_proj.latents"])
    assert any("lora_A" in name for name in own)
    with pytest.raises(ConfigError, match="take a Plus or Full file"):
        save_file(tiny_ip.tensors("linear", task.denoiser), home / "linear.safetensors")
        built(home, ip_adapter=home / "linear.safetensors")


def test_text_states_equal_those_of_the_stock_pipeline_also_for_dropped_captions(home: Path) -> None:
    dropped = torch.tensor([False, True])
    for base, xl in (("xl", True), ("sd15", False)):
        task = built(home, base, t5=home / "t5", byt5=home / "byt5")
        store, gallery = task.gallery_caches["photos"].sentences, task.gallery_caches["photos"].pictures.gallery
        rows = torch.tensor([2, 4])
        states = store.take(rows, ["dense"] * 2, dict.fromkeys(("clip", "pooled", "t5", "byt5"), dropped))
        texts = list(map(BaseTextEncoders(files_of(task), CPU).load().shorten, gallery.captions(rows, ["dense"] * 2)))
        kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
        pipe = kind.from_pretrained(home / base, unet=None, vae=None)
        options: Any = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        with torch.no_grad():
            encoded = pipe.encode_prompt(prompt=texts[:1], **options)
        wanted = {"clip": encoded[:2], "pooled": [each[:, None] for each in encoded[2:]]} if xl else {"clip": encoded}
        for name, (positive, negative) in wanted.items():
            assert states[name].mask is None
            assert torch.allclose(states[name].values, torch.cat([positive, negative]), atol=5e-3), name
        assert states["t5"].mask is not None and states["t5"].mask[1].sum() == 1  # the end token alone


@pytest.mark.parametrize("alone", ["clip", "t5", "byt5"])
def test_each_branch_can_be_dropped_alone(readers_task: Watched, alone: str) -> None:
    task, rates = readers_task, {"drop_text": 0.0, "drop_clip": 0.0, "drop_t5": 0.0, "drop_byt5": 0.0}
    task.settings = task.settings.model_copy(update=rates)
    whole = task.batch(0, 3).states
    task.settings = task.settings.model_copy(update={f"drop_{alone}": 1.0})
    states, empty = task.batch(0, 3).states, task.gallery_caches["photos"].sentences.empty_sentences(3)
    assert states.keys() == {"clip", "pooled", "t5", "byt5"}
    for name, tokens in states.items():
        dropped = name == alone or (name, alone) == ("pooled", "clip")
        assert torch.equal(tokens.values, (empty if dropped else whole)[name].values), name
    assert whole[alone].values.shape != empty[alone].values.shape or not torch.equal(
        whole[alone].values, empty[alone].values
    )


@pytest.fixture(scope="module")
def readers_task(home: Path) -> Watched:
    return built(home, t5=home / "t5", byt5=home / "byt5")


def test_latents_are_the_autoencoders_times_the_bases_scaling_factor(home: Path) -> None:
    task = built(home)
    cache, rows = task.gallery_caches["photos"], torch.tensor([1, 3])
    vae = diffusers.AutoencoderKL.from_pretrained(home / "xl" / "vae")
    with torch.no_grad():
        wanted = vae.encode(cache.pictures.take(rows)[0] * 2 - 1).latent_dist.mode() * vae.config.scaling_factor
        drawn = (vae.decode(wanted / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(cache.latents.take(rows), wanted, atol=2e-3)
    assert torch.allclose(task.codec.decode(wanted), drawn, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_equals_that_of_the_base(home: Path, kind: str) -> None:
    task = built(home, min_snr_gamma=5.0, drop_vision=1.0)
    files_of(task).schedule.register_to_config(prediction_type=kind)
    batch = task.batch(4, 3)
    assert not batch.strength.any()
    noise, steps = task.noise(batch.latents, 3, 4)
    with torch.no_grad():
        loss = task.loss(batch, 4).per_sample
        task.adapter.detach(task.denoiser)
        noisy = files_of(task).schedule.add_noise(batch.latents, noise, steps)
        added = {"text_embeds": batch.states["pooled"].values[:, 0], "time_ids": batch.sizes}
        prediction = task.denoiser(noisy, steps, batch.states["clip"].values, added_cond_kwargs=added).sample
    alpha = files_of(task).schedule.alphas_cumprod[steps].view(-1, 1, 1, 1)
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * batch.latents
    error = (prediction - (noise if kind == "epsilon" else velocity)).square().mean((1, 2, 3))
    snr = (alpha / (1 - alpha)).flatten()
    weight = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    assert torch.allclose(loss, error * weight, atol=1e-5)
    assert batch.sizes.tolist() == [[128, 128, 0, 0, 16, 16]] * 3


def test_sdxl_size_conditioning_holds_the_cropped_pixels() -> None:
    wide = torch.tensor([[3000.0, 2000.0, 500.0, 0.0]])
    assert time_ids(wide, (1000, 1000)).tolist() == [[2000, 3000, 0, 250, 1000, 1000]]


def test_every_image_is_a_function_of_its_own_number(home: Path) -> None:
    task = built(home, t5=home / "t5", byt5=home / "byt5", sources={"real": 1.0, "pairs": 1.0})
    whole, second = task.batch(40, 4), task.batch(42, 2)
    for name in ("latents", "sizes", "faces", "crops", "strength"):
        assert torch.equal(getattr(whole, name)[2:], getattr(second, name)), name
    for name, tokens in second.states.items():
        assert torch.equal(whole.states[name].values[2:, : tokens.values.shape[1]], tokens.values), name
    one = task.loss(whole, 40).per_sample[2:]
    assert torch.allclose(one, task.loss(second, 42).per_sample, atol=1e-5)


def test_checkpointing_changes_no_gradient_and_bf16_trains(home: Path) -> None:
    gradients, blocks = [], list[list[str]]()
    for checkpointing in (False, True):
        task = built(home, gradient_checkpointing=checkpointing, t5=home / "t5")
        blocks.append([])
        for name, module in (("unet", task.denoiser), ("vision", task.vision)):
            for block in module.modules():
                if type(block).__name__ in ("BasicTransformerBlock", "ResidualAttentionBlock"):
                    # A pre-hook, because recomputation stops as soon as all the required tensors exist.
                    block.register_forward_pre_hook(lambda *_, name=name, calls=blocks[-1]: calls.append(name))
        for parameters in task.parts().values():
            for parameter in parameters:
                torch.nn.init.normal_(parameter, std=0.1, generator=tiny.generator(len(parameter)))
                parameter.requires_grad_(True)
        task.loss(task.batch(0, 2), 0).per_sample.mean().backward()
        gradients.append([p.grad for own in task.parts().values() for p in own])
    for name in ("unet", "vision"):  # checkpointing saves memory only if the backward pass computes the blocks again
        assert blocks[1].count(name) > blocks[0].count(name) > 0, name
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, atol=1e-6)
    small = built(home, base_precision="bf16")
    assert small.denoiser.dtype == torch.bfloat16 and small.adapter.dtype == torch.float32
    with pytest.raises(ConfigError, match="set its precision to bf16"):
        small.loss(small.batch(0, 2), 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert small.loss(small.batch(0, 2), 0).per_sample.isfinite().all()


def test_a_dry_run_plans_from_configurations_alone(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, lines = str(CONFIGS / "sdxl_8gpu.yaml"), overrides(home, "sdxl_8gpu")
    assert main([config, *lines, "--output", str(tmp_path / "run"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines() if not line.startswith(" ")] == [*FOUR, "all stages"]
    assert "t5_branch" in printed and "of a card's memory" in printed and "hours on rtx4090" in printed.splitlines()[-2]
    assert main([config, "--output", str(tmp_path / "run"), "--dry-run"]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "There is no folder runs/models/stable-diffusion-xl-base-1.0" in sentence and "hf download" in sentence


def test_a_plan_on_a_public_base_counts_what_a_step_computes(home: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"precision": "bf16", "images": 100, "ema": 0}

    def planned(**other: Any) -> StagePlan:
        run = load_run(CONFIGS / "sdxl_8gpu.yaml", overrides(home, "sdxl_8gpu", **more, **other))
        return plan(run, tmp_path, {"diffusers_adapter": Watched})[0]

    small, large = planned(**{"settings.base_precision": "bf16"}), planned()
    for each in (small, large):
        assert each.step is not None and each.step.trained == each.trained and each.step.memory["average"] == 0
        assert each.step.memory["trained weights"] == 4 * sum(each.trained.values())
        assert each.step.frozen == each.frozen and each.step.memory["activations and gradients"] > 0
        assert each.hours_on["a100"] == pytest.approx(50 * each.step.flops / (0.4 * 312e12) / 3600)
    frozen = [each.step.memory["frozen weights"] for each in (small, large) if each.step]
    assert frozen[1] == 2 * frozen[0] == 4 * small.frozen


def test_a_self_test_computes_as_the_stage_does_and_reaches_every_part(home: Path, tmp_path: Path) -> None:
    more = {"settings.base_precision": "bf16", "precision": "bf16", "settings.drop_vision": 0.0}
    run = load_run(CONFIGS / "sdxl_8gpu.yaml", overrides(home, "sdxl_8gpu", **more))
    (outcome,) = self_test(run, tmp_path, only=("real",), tasks={"diffusers_adapter": Watched}, steps=30)
    assert outcome.passed and "in bf16" in outcome.sentence and list(tmp_path.iterdir()) == []
    assert len(Watched.instances[-1].gallery_caches["photos"].pictures.gallery) == len(records())


def test_a_record_that_became_unreadable_while_it_was_cached_is_never_drawn(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = Records.picture, []

    def breaking(some: Records, index: int) -> Any:
        reads.append(index)
        if index == 2 and reads.count(2) > 1:  # the first read is the face detection
            raise BadRecordError("Record 0002 is torn.")
        return read(some, index)

    monkeypatch.setattr(Records, "picture", breaking)
    shutil.copytree(home / "records", tmp_path / "records")
    for name in ("xl", "vision"):
        (tmp_path / name).symlink_to(home / name)
    task = built(tmp_path)
    assert reads.count(2) == 2
    drawn = task.mixture.draw(0, 0, 64)
    assert 2 not in drawn.references.tolist() + drawn.targets.tolist()
    assert 2 not in task.validation_sources.draw(0, 0, 64).references.tolist()


def test_gradient_checkpointing_works_in_bf16(home: Path, tmp_path: Path) -> None:
    more = {"settings.base_precision": "bf16", "precision": "bf16", "settings.gradient_checkpointing": True}
    assert trained(home, "sdxl_8gpu", tmp_path, only=("real",), images=2, **more)


def test_an_unusable_base_is_reported_in_one_sentence(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "xl", tmp_path / "noiseless", ignore=shutil.ignore_patterns("scheduler_config.json"))
    with pytest.raises(ConfigError, match=r"scheduler_config\.json cannot be read"):
        _ = open_base(str(tmp_path / "noiseless")).schedule
    for what, message in (("vision", "holds no Stable Diffusion"), ("nobody/nothing", "could not be fetched")):
        name = str(home / what) if what == "vision" else what
        with pytest.raises(ValueError, match=message):
            open_base(name)
    with pytest.raises(ConfigError, match="holds no vision encoder"):
        built(home, vision=home / "t5")
    with pytest.raises(ConfigError, match="has no readable config"):
        built(home, t5=tmp_path)


def test_cache_marks_depend_on_configuration_and_vocabulary(home: Path, tmp_path: Path) -> None:
    base = open_base(str(shutil.copytree(home / "xl", tmp_path / "xl")))
    t5 = Path(shutil.copytree(home / "t5", tmp_path / "t5"))

    def marks() -> tuple[str, str, str]:
        return BaseCodec(base, CPU).mark, BaseTextEncoders(base, CPU).mark, T5TextEncoder("t5", t5, 256, CPU).mark

    before = marks()
    assert T5TextEncoder("t5", t5, 128, CPU).mark != before[2]
    write_config(base.folder / "vae", _name_or_path="elsewhere")
    assert marks() == before
    write_config(base.folder / "vae", scaling_factor=0.5)
    for file in (base.folder / "tokenizer_2" / "tokenizer_config.json", t5 / "tokenizer_config.json"):
        file.write_text(file.read_text() + "\n")
    assert not set(marks()) & set(before)


def write_config(folder: Path, **more: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))


def test_validation_never_uses_the_right_reference_as_the_wrong_one(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = built(home, validation_images=5, drawings=0)
    used: list[Tensor] = []

    def errors(batch: DiffusersBatch, vision: Tokens, *_: Any) -> Tensor:
        used.append(vision.values)
        return torch.zeros(len(vision.values)) + len(used)

    monkeypatch.setattr(task, "errors", errors)
    task.validate(tmp_path, 0)
    right, wrong = torch.cat(used[::2]), torch.cat(used[1::2])
    assert len(right) == len(wrong) == 5 and (right != wrong).flatten(1).any(1).all()


def test_cached_tokens_are_flushed_before_their_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, lengths = TokenCache(tmp_path / "t5", 4, 6, 3), []
    flush = np.memmap.flush

    def watched(values: Any) -> None:
        lengths.append(cache.lengths.tolist())
        assert values is cache.values and values[2].any()
        flush(values)

    monkeypatch.setattr(np.memmap, "flush", watched)
    cache.write([2], Tokens(torch.ones(1, 5, 3)))
    assert lengths == [[0, 0, 0, 0]] and cache.lengths.tolist() == [0, 0, 5, 0]


def test_the_token_cache_stores_only_unmasked_tokens(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path / "t5", 4, 6, 3)
    assert cache.missing([1, 3, 1]) == [1, 3]
    values, mask = torch.randn(2, 8, 3), torch.tensor([[True] * 8, [True] * 2 + [False] * 6])
    cache.write([3, 1], Tokens(values, mask))
    again = TokenCache(tmp_path / "t5", 6, 6, 3)  # the gallery has grown
    taken, lengths = again.take([1, 3])
    assert lengths.tolist() == [2, 6] and again.missing([0, 1, 3, 5]) == [0, 5]
    assert torch.allclose(taken[1], values[0, :6], atol=2e-3) and not taken[0, 2:].any()


def test_the_token_cache_never_shrinks_while_another_run_uses_it(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path / "t5", 2000, 6, 3)
    cache.write([1999], Tokens(torch.ones(1, 6, 3)))
    few = TokenCache(tmp_path / "t5", 2, 6, 3)
    assert few.lengths.shape == (2,) and cache.take([1999])[0].all()
    assert TokenCache(tmp_path / "t5", 2000, 6, 3).missing([1998, 1999]) == [1998]
