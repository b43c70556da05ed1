"""Adapter training on diffusion transformers: every family agrees with its stock pipeline, and overfits one batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imagine.adapter.adapter import Adapter
from imagine.errors import ConfigError
from imagine.networks.diffusion import pack_latents
from imagine.people.faces import KnownBoxesFinder
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.records import VISION, Conditioning, Tokens
from tests import tiny, tiny_flow_bases, tiny_stock
from tests.group_records import records as group_records
from tests.stopping import StopsOnce
from tests.tiny_flow_bases import NAMES, side
from tests.train.data.test_recorded import records, written
from train.assemble import assemble
from train.config import load_run
from train.run import parts
from train.run.checkpoint import read_tensors
from train.stages import run_stages
from train.task import TaskContext
from train.tasks.diffusers import DiffusersSettings, DiffusersTask

CPU = torch.device("cpu")
PROMPT = "a person smiling on the beach"
RATES = {"vision_encoder": 1e-3, "vision_branch": 1e-2, "vision_projection": 1e-3, "base_lora": 1e-2}
GUIDANCE_OFF = {"z_image": {"guidance_scale": 0.0}, "sd3": {"guidance_scale": 1.0}, "sana": {"guidance_scale": 1.0},
                "flux2": {"guidance_scale": 1.0}}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("transformers")
    for name in NAMES:
        tiny_flow_bases.pipeline(name).save_pretrained(home / name)
    tiny_stock.encoder().save_pretrained(home / "vision")
    written(home / "records", records())
    written(home / "people", group_records())
    return home


def settings_of(home: Path, base: str, **more: Any) -> dict[str, Any]:
    given = {"base": str(home / base), "vision": str(home / "vision"), "lora_rank": 2}
    given |= {"resolution": side(base)}
    given |= {"drop_vision": 0.0, "validation_images": 2, "drawings": 1, "drawing_steps": 2}
    return {**given, **more}


def built(home: Path, base: str, **more: Any) -> DiffusersTask:
    """Return a task that is ready for its first batch."""
    data = {
        "folder": str(home / "data" / base), "galleries": {"photos": {"records": str(home / "records")}},
        "sources": {"real": {"gallery": "photos", "target": "self", "captions": {"dense": 1.0}}},
        "groups": {"two": {"people": 2, "records": str(home / "people"), "captions": {"dense": 1.0}}},
    }  # fmt: skip
    torch.manual_seed(0)
    settings = DiffusersSettings(**settings_of(home, base, **more))
    task = DiffusersTask(settings, TaskContext("stage", 3, CPU, home / "stage", data))
    task.check()
    with torch.no_grad():
        for module in task.modules.values():
            module.eval().requires_grad_(False)
        task.prepare()
    return task


@pytest.fixture(scope="module", params=NAMES)
def task(home: Path, request: pytest.FixtureRequest) -> DiffusersTask:
    return built(home, request.param)


def name_of(task: DiffusersTask) -> str:
    return task.base.folder.name


@torch.no_grad()
def test_drawing_equals_the_stock_pipeline(home: Path, task: DiffusersTask) -> None:
    """The same noise and sentence give the same picture: arguments, ids, packing, signs, times, text and decoding."""
    name = name_of(task)
    pixels = side(name)
    noise = torch.randn(1, *task.codec.shape(pixels), generator=tiny.generator(0))
    encoder = task.base.text_encoders(CPU)
    states = {key: Tokens(each.values, each.mask) for key, each in encoder.load().encode([PROMPT]).items()}
    nobody = Conditioning({VISION: Tokens(torch.zeros(1, 1, 24))}, {VISION: torch.zeros(1)})

    def predict(latents: Tensor, times: Tensor) -> Tensor:
        return task.base.predict(task.denoiser, latents, times, states, torch.zeros(1, 6), nobody, 3.5).float()

    ours = task.codec.decode(task.base.draw(noise, predict, 3))
    pipe = tiny_flow_bases.pipeline(name).from_pretrained(home / name)
    pipe.set_progress_bar_config(disable=True)
    given = pack_latents(noise, 2).flatten(2).transpose(1, 2) if name in ("flux", "qwen") else noise
    more: dict[str, Any] = GUIDANCE_OFF.get(name, {})
    if name in ("sd3", "sana"):  # these pipelines leave the times to the scheduler, whose last one is nearly 0
        more = {**more, "sigmas": [1.0, 2 / 3, 1 / 3]}
    more = {**more, "use_resolution_binning": False} if name == "sana" else more
    theirs = pipe(
        prompt=PROMPT, height=pixels, width=pixels, num_inference_steps=3, latents=given, output_type="pt", **more
    ).images  # fmt: skip
    assert torch.allclose(ours, theirs, atol=2e-5), float((ours - theirs).abs().max())


@torch.no_grad()
def test_latents_are_normalised_so_that_decoding_undoes_it(home: Path, task: DiffusersTask) -> None:
    images = task.gallery_caches["photos"].pictures.take(torch.tensor([1]))[0] * 2 - 1
    latents = task.codec.encode(images)
    pipe = tiny_flow_bases.pipeline(name_of(task)).from_pretrained(home / name_of(task))
    video = name_of(task) == "qwen"
    encoded = pipe.vae.encode(images.unsqueeze(2) if video else images)
    raw = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    wanted = (pipe.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(task.codec.decode(latents), wanted[:, :, 0] if video else wanted, atol=1e-5)
    assert latents.shape[1:] == task.codec.shape(side(name_of(task)))


def test_a_batch_is_overfitted_and_only_adapter_and_lora_change(task: DiffusersTask) -> None:
    chosen = parts.choose(task.parts(), RATES, "stage")
    training = parts.freeze_all_but(task.modules, chosen)
    assert training == ["image_encoder", "adapter", "base_lora"]
    base = {key: value.clone() for key, value in task.denoiser.state_dict().items() if "lora_" not in key}
    batch, optimiser = task.batch(0, 2), parts.optimiser(chosen, RATES, (0.9, 0.99), 0.0)
    losses = []
    for _ in range(12):
        loss = task.loss(batch, 0).per_sample.mean()
        losses.append(float(loss.detach()))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    reached = {name for name, own in chosen.items() if any(p.grad is not None and p.grad.any() for p in own)}
    assert losses[-1] < 0.97 * losses[0] and reached == set(RATES), (losses, reached)
    owned = {id(p) for own in chosen.values() for p in own}
    assert all(p.grad is None for p in task.denoiser.parameters() if id(p) not in owned)
    after = task.denoiser.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in base.items())


def test_batches_depend_on_image_numbers_alone(task: DiffusersTask) -> None:
    one, other = task.batch(4, 2), task.batch(5, 1)
    assert torch.equal(one.latents[1:], other.latents) and torch.equal(one.crops[1:], other.crops)
    noise, times = task.noise(one.latents, 3, 4)
    again = task.noise(other.latents, 3, 5)
    assert torch.equal(noise[1:], again[0]) and torch.equal(times[1:], again[1])
    assert times.min() > 0 and times.max() < 1


def test_compiling_means_the_repeated_blocks(home: Path) -> None:
    some = built(home, "flux2")
    batch = some.batch(0, 2)
    with torch.no_grad():
        wanted = some.loss(batch, 0).per_sample
        some.compile()
        with torch.compiler.set_stance("force_eager"):  # compiling itself takes minutes
            assert torch.allclose(some.loss(batch, 0).per_sample, wanted, atol=1e-6)
    assert some.denoiser._compiled_call_impl is None and some.vision._compiled_call_impl is not None
    blocks = [*some.denoiser.transformer_blocks, *some.denoiser.single_transformer_blocks]
    assert all(block._compiled_call_impl is not None for block in blocks)


def test_gradient_checkpointing_and_several_people_change_no_gradient(home: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        some = built(
            home, "flux2", gradient_checkpointing=checkpointing, groups={"two": 1.0}, group_block=2, resolution=32
        )
        own = [*some.parts()["vision_router"], *some.parts()["vision_branch"], *some.parts()["base_lora"]]
        for parameter in own:
            parameter.requires_grad_(True)
        loss = some.loss(some.batch(0, 2), 0)
        assert float(torch.as_tensor(loss.metrics["router"]).detach()) > 0
        loss.per_sample.mean().backward()
        gradients.append([torch.zeros(()) if p.grad is None else p.grad for p in own])
    assert any(bool(each.any()) for each in gradients[0])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients, strict=True))


# --- a run ----------------------------------------------------------------------------------------------------------


class Stopping(StopsOnce, DiffusersTask):
    """A task that can stop the run once, at an image."""


RUN = """
defaults: {task: diffusers_adapter, precision: fp32, prefetch: 0, clip: 0, report_every_seconds: 0, batch_size: 2}
trackers: []
stages:
  people:
    train: {vision_encoder: 1.0e-3, vision_branch: 0.05, vision_projection: 1.0e-2, base_lora: 0.01}
    images: 6
    ema: 4
"""


def trained(home: Path, output: Path) -> bool:
    file = home / "run.yaml"
    file.write_text(RUN)
    lines = [f"data.folder={home / 'data' / 'flux2'}", f"data.galleries.photos.records={home / 'records'}"]
    lines += ["data.sources.real.gallery=photos", "data.sources.real.target=self"]
    given = settings_of(home, "flux2", gradient_checkpointing=True, drop_text=0.5)
    lines += [f"people.settings.{key}={value}" for key, value in given.items()]
    return run_stages(load_run(file, lines), output, tasks={"diffusers_adapter": Stopping})


@pytest.fixture(scope="module")
def straight(home: Path) -> Path:
    assert trained(home, home / "straight")
    return home / "straight"


def test_a_resumed_run_equals_a_straight_run(home: Path, straight: Path, tmp_path: Path) -> None:
    StopsOnce.stop_at = 2
    assert not trained(home, tmp_path)
    assert trained(home, tmp_path)
    one, other = (read_tensors(each / "people" / "weights.safetensors")[0] for each in (straight, tmp_path))
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    assert {key.split(".")[0] for key in one} == {"image_encoder", "adapter", "base_lora"}  # and not the base


def test_the_export_draws_as_the_trained_networks_do(home: Path, straight: Path, tmp_path: Path) -> None:
    some = built(home, "flux2")
    weights = read_tensors(straight / "people" / "weights.safetensors")[0]
    for module in ("image_encoder", "adapter", "base_lora"):
        own = {key.removeprefix(f"{module}."): value for key, value in weights.items() if key.startswith(f"{module}.")}
        some.modules[module].load_state_dict(own)
    assert isinstance(some.adapter, Adapter)
    some.adapter.detach(some.denoiser)
    memory = opened(home, some.vision, some.adapter, transformer=some.denoiser)
    assemble(straight, tmp_path / "out", dtype=torch.float32)
    for folder in (straight / "people" / "export", tmp_path / "out"):
        loaded = opened(home, str(folder / "image_encoder"), folder / "adapter", lora=folder / "lora")
        same, wanted = drawn(loaded), drawn(memory)
        assert np.abs(same - wanted).max() < 1e-5
        assert np.abs(drawn(loaded, identity_scale=0.0) - wanted).max() > 1e-4  # the adapter acts
        loaded.unload_lora_weights()
        assert np.abs(drawn(loaded) - wanted).max() > 1e-5  # so does the LoRA
    assert str(home) not in "".join(file.read_text() for file in (straight / "people" / "export").rglob("*.json"))


def opened(home: Path, encoder: Any, adapter: Any, lora: Path | None = None, **more: Any) -> Any:
    pipe = ImaginePipeline.from_pretrained(home / "flux2", vision_encoder=encoder, **more)
    pipe.finder = KnownBoxesFinder([tiny.BOX])
    pipe.set_progress_bar_config(disable=True)
    pipe.load_adapter(adapter)
    if lora is not None:
        pipe.load_lora_weights(lora)
    return pipe


def drawn(pipe: Any, **more: Any) -> Any:
    call = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np", "guidance_scale": 1.0}
    return pipe(prompt=PROMPT, reference=tiny.photo(1), generator=tiny.generator(0), **call, **more).images


def test_validation_draws_and_compares_references(home: Path, tmp_path: Path) -> None:
    some = built(home, "z_image", drawing_guidance=2.0)
    torch.nn.init.normal_(some.adapter.parts()["vision_branch"][-1])
    with torch.no_grad():
        numbers = some.validate(tmp_path, 0)
    assert numbers["validation_loss"] > 0 and np.isfinite(list(numbers.values())).all()
    assert (tmp_path / "pictures.png").stat().st_size > 500


def test_settings_that_have_no_effect_are_refused(home: Path) -> None:
    for more, message in (
        ({"t5": home / "vision"}, "t5 has no effect on FLUX.2"),
        ({"min_snr_gamma": 5.0}, "min_snr_gamma has no effect on FLUX.2"),
        ({"lora_targets": ["to_q"]}, "lora_targets has no effect on FLUX.2"),
        ({"ip_adapter": home / "x.safetensors"}, "ip_adapter has no effect on FLUX.2"),
        ({"resolution": 15}, "cannot divide 15 pixels"),
    ):
        with pytest.raises(ConfigError, match=message):
            built(home, "flux2", **more)
