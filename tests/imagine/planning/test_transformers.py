"""The planner on diffusion transformers: known sizes, agreement with measurements, native references, and commands."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from imagine.bases.quantising import OFFLOADS_WITH, QUANTISATIONS, store_in_float8
from imagine.bases.sources import read_base_source
from imagine.blueprints.published import base_names, published_base, read_base
from imagine.cli import _parser, main
from imagine.errors import ConfigError
from imagine.licences import base_names as licensed_names
from imagine.licences import licence_of
from imagine.planning import check, native, planning
from imagine.planning.cards import GIB
from imagine.planning.choosing import choose, command, python_lines
from imagine.planning.denoisers import KINDS, is_guided, kind_of
from imagine.planning.inference import DrawingOptions, DrawingPlanner, DrawingWorkload, encode_text
from imagine.planning.meter import parameter_count, weight_bytes
from imagine.planning.networks import add_branches, build
from imagine.planning.storage import stored
from imagine.planning.training import Recipe, TrainingPlanner, TrainingWorkload
from tests import tiny_transformer_folders, tiny_transformers
from tests import tiny_transformer_pipelines as pipelines
from tests.root import ROOT

# Parameters of the denoisers: the sums over the published files' tensors, as the model cards and issues round them.
BILLIONS = {
    "sdxl": 2.57, "sd15": 0.86, "flux2-klein-4b": 3.88, "flux2-klein-9b": 9.08, "flux2-dev": 32.22, "z-image": 6.15,
    "qwen-image": 20.43, "qwen-image-edit": 20.43, "flux1-schnell": 11.89, "flux1-dev": 11.90, "sd35-medium": 2.24,
    "sd35-large": 8.06, "sana": 1.60, "pixart-sigma": 0.61,
}  # fmt: skip


# --- bases ------------------------------------------------------------------------------------------------------------
def test_known_bases_have_the_published_sizes() -> None:
    assert set(BILLIONS) == set(base_names())
    for name, billions in BILLIONS.items():
        base = published_base(name)
        denoiser = build(replace(base, components={base.denoiser_name: base.denoiser})).denoiser
        assert parameter_count(denoiser) / 1e9 == pytest.approx(billions, abs=0.01), name
        assert kind_of(base.denoiser.kind) is KINDS[base.denoiser.kind]


def test_every_planned_base_has_a_licence_and_a_repository_and_the_other_way_round() -> None:
    assert set(base_names()) == {*licensed_names()} - {
        "qwen-image-2.1"
    }  # whose class differs, and is not a family here
    for name in base_names():
        assert licence_of(name) is not None and read_base_source(name).is_hub
        assert read_base(read_base_source(name).repository).components == published_base(name).components


def test_distilled_weights_are_not_guided() -> None:
    assert [is_guided(published_base(name)) for name in ("flux2-klein-4b", "flux2-klein-9b", "flux2-dev")] == [
        True, False, False,
    ]  # fmt: skip
    assert not is_guided(published_base("flux1-dev")) and is_guided(published_base("sd35-large"))


# --- measurements -----------------------------------------------------------------------------------------------------
def test_plans_agree_with_running_transformers() -> None:
    """`benchmarks/planner.py` does so for all families."""
    report = check.check(1, 64, ["flux2", "z-image", "sana"])  # raises RuntimeError if they do not
    memory = {name: row["off"] for name, row in report["rows"].items() if name.endswith("memory")}
    assert len(memory) == 10 and max(memory.values()) <= 0.15
    assert all(row["off"] == 0 for name, row in report["rows"].items() if not name.endswith("memory"))


@pytest.mark.parametrize("name", ["flux2", "z_image", "sd3"])
def test_weights_in_float8_take_what_diffusers_stores(name: str) -> None:
    pipe = tiny_transformer_folders.pipeline(name)
    parts = {part: each for part, each in pipe.components.items() if isinstance(each, torch.nn.Module)}
    planned = {
        part: stored(module, "fp8").bytes if part != "vae" and not type(module).__name__.startswith("CLIP")
        else weight_bytes(module)
        for part, module in parts.items()
    }  # fmt: skip
    whole = {part: weight_bytes(module) for part, module in parts.items()}
    store_in_float8(pipe, torch.float32)
    assert {part: weight_bytes(module) for part, module in parts.items()} == planned
    assert planned["transformer"] < whole["transformer"] and planned["vae"] == whole["vae"]


def test_eight_and_four_bits_have_their_scales() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.LayerNorm(64)).to(torch.bfloat16)
    others = 2 * (64 + 64 + 64)
    assert stored(layer, "none").bytes == 2 * 128 * 64 + others
    assert stored(layer, "int8", 10).bytes == 128 * 64 + 4 * 64 + others
    assert stored(layer, "nf4").bytes == 128 * 64 // 2 + 4 * 128 * 64 // 64 + others
    assert stored(layer, "int8", 10).unpacked == 10 * (128 + 4 * 64)
    assert stored(layer, "nf4").unpacked == 2 * (128 * 64 + 64) and stored(layer, "none").traffic == 0


@pytest.mark.parametrize("make", [pipelines.qwen3, lambda _: tiny_transformer_folders._gemma()])
def test_language_models_encode_on_the_meta_device_as_on_the_cpu(make: Any) -> None:
    real = make(True)
    with torch.device("meta"):
        planned = make(True)
    shapes = [tuple(encode_text(each, 2, 7).hidden_states[-1].shape) for each in (real, planned)]
    assert shapes[0] == shapes[1] == (2, 7, 16)


# --- calls ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def small() -> DrawingPlanner:
    base = replace(check.small_transformer("flux2"), name="flux2-klein-4b", pipeline="Flux2KleinPipeline")
    return DrawingPlanner(base, DrawingWorkload(128, steps=10))


def test_guidance_native_references_people_and_photos_cost_what_they_add(small: DrawingPlanner) -> None:
    base, plain = small.base, small.plan(DrawingOptions())
    unguided = DrawingPlanner(base, replace(small.workload, guided=False)).plan(DrawingOptions())
    assert 1.8 < plain.flops_step / unguided.flops_step < 2
    assert plain.parts["transformer"].working == unguided.parts["transformer"].working  # one pass after the other
    photos = DrawingPlanner(base, replace(small.workload, references=8)).plan(DrawingOptions())
    people = DrawingPlanner(base, replace(small.workload, people=2)).plan(DrawingOptions())
    beside = DrawingPlanner(base, replace(small.workload, native=1)).plan(DrawingOptions())
    assert plain.flops_step < photos.flops_step < 1.1 * plain.flops_step
    assert plain.flops_step < people.flops_step < 1.1 * plain.flops_step
    assert beside.flops_step > 2 * plain.flops_step
    assert beside.parts["transformer"].working > plain.parts["transformer"].working
    with pytest.raises(ConfigError, match="takes no native reference images: leave out --native"):
        DrawingPlanner(check.small_transformer("sana"), replace(small.workload, native=1))


def test_switches_of_every_choice_parse_and_are_arguments_of_open_base(small: DrawingPlanner) -> None:
    import ast
    import inspect

    from imagine import open_base

    vae = small.networks.models["vae"]
    seen = set()
    for quantise, offloads in OFFLOADS_WITH.items():
        for offload in offloads:
            options = DrawingOptions("bf16", offload, True, quantise, 2)  # type: ignore[arg-type]
            line = command(small.base, options, 4, 10)
            assert line is not None and line.startswith("imagine generate --base flux2-klein-4b")
            given = _parser().parse_args(shlex.split(line)[1:])
            assert (given.quantise or "none", given.offload or "none") == (quantise, offload)
            assert given.tiling and given.batch == 2 and given.num_images == 4 and given.dtype == "bfloat16"
            (call,) = [each for each in ast.walk(ast.parse(python_lines(small.base, options, vae)[0]))
                       if isinstance(each, ast.Call)]  # fmt: skip
            assert {each.arg for each in call.keywords} <= set(inspect.signature(open_base).parameters)
            seen.add(line)
    assert len(seen) == sum(map(len, OFFLOADS_WITH.values())) and set(OFFLOADS_WITH) == set(QUANTISATIONS)
    assert command(check.small_transformer("pixart"), DrawingOptions(), 1, 10) is None  # no pipeline takes references


def test_a_choice_that_fits_in_little_memory_is_offloaded_or_stored_in_fewer_bits(small: DrawingPlanner) -> None:
    speed = planning.usual_speed()
    least = min(small.plan(options).peak for options in small.combinations(DrawingOptions()))
    chosen = choose(small, DrawingOptions(), least, speed, "it").plan
    assert chosen.options.offload in ("sequential", "group", "model")
    whole = small.plan(DrawingOptions())
    fewer = {name: small.plan(DrawingOptions(quantise=name)) for name in QUANTISATIONS}
    weights = [fewer[name].parts["transformer"].weights for name in ("none", "int8", "nf4")]
    assert weights == sorted(weights, reverse=True)
    assert all(plan.seconds(speed) > whole.seconds(speed) for name, plan in fewer.items() if name != "none")


def test_training_plans_have_adapter_lora_and_recomputation() -> None:
    base = check.small_transformer("flux2")
    shape = replace(base.adapters["adapter"], lora_rank=4)
    training = TrainingPlanner(replace(base, adapters={"adapter": shape}), TrainingWorkload(64, 2))
    assert list(training.parts) == ["vision_encoder", "vision_branch", "vision_projection", "lora"]
    plain, recomputed = (training.plan(Recipe(checkpointing=on)) for on in (False, True))
    assert plain.trained["lora"] > 0 and plain.memory["frozen weights"] == 2 * plain.frozen
    assert recomputed.memory["activations and gradients"] < plain.memory["activations and gradients"]
    assert recomputed.flops > plain.flops
    with pytest.raises(ConfigError, match="adapters read no text: use --readers none"):
        add_branches(published_base("z-image"), ["t5-xl"], "plus", 0)


# --- native references ------------------------------------------------------------------------------------------------
def test_native_references_grow_and_the_adapter_does_not() -> None:
    base = check.small_transformer("qwen-image")
    report = native.compare_native(base, 128, (0, 1, 4))
    none, one, four = report["rows"]
    assert none["native_flops"] == none["adapter_flops"] and none["vision_tokens"] == 0
    assert four["native_tokens"] - none["native_tokens"] == 4 * (one["native_tokens"] - none["native_tokens"])
    assert four["native_flops"] > 2 * one["native_flops"] and four["adapter_flops"] < 1.1 * none["adapter_flops"]
    assert four["vision_tokens"] == 4 * one["vision_tokens"]
    with pytest.raises(ConfigError, match="takes no native reference images, so there is nothing to compare"):
        native.compare_native(check.small_transformer("sd3"), 128)


@pytest.mark.parametrize(("title", "base"), [("FLUX.2 klein 4B (base):", "flux2-klein-4b")])
def test_the_published_comparison_is_what_the_planner_counts(title: str, base: str) -> None:
    text = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8").partition(title)[2]
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| ([\d.]+) \| ([\d,]+) \+ (\d+) \| ([\d.]+) \|$", text, re.MULTILINE)[:5]
    report = native.compare_native(add_branches(read_base(base), [], "plus", 0), 1024, (0, 1, 8))
    published = {int(row[0]): row[1:] for row in rows}
    assert list(published) == list(native.COUNTS)
    for row in report["rows"]:
        shown = published[row["photos"]]
        assert [f"{row[name]:,}" for name in ("native_tokens", "adapter_tokens", "vision_tokens")] == [
            shown[0], shown[2], shown[3],
        ]  # fmt: skip
        assert float(shown[1]) == pytest.approx(row["native_flops"] / 1e12, rel=0.01)
        assert float(shown[4]) == pytest.approx(row["adapter_flops"] / 1e12, rel=0.01)


# --- the command ------------------------------------------------------------------------------------------------------
def test_the_command_plans_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_transformer_folders.save_base(tmp_path / "base", "z_image")
    for file in folder.rglob("*.safetensors"):
        file.unlink()  # configurations are enough
    capsys.readouterr()
    assert main(["plan", "--base", str(folder), "--resolution", "16", "--fit", "8GB", "--people", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 people" in out and re.search(r"quantise +offload +tiling +at a time +memory +time +verdict", out)
    assert f"imagine generate --base {folder}" in out and "chosen" in out
    assert main(["plan", "--base", str(folder), "--compare-native"]) == 2
    assert "nothing to compare" in capsys.readouterr().err
    assert main(["plan", "--base", str(folder), "--compare-native", "--steps", "3"]) == 2
    assert "--compare-native does not depend on --steps" in capsys.readouterr().err
    assert main(["plan", "--base", str(folder), "--quantise", "nf4", "--offload", "group"]) == 2
    assert "Weights in nf4 cannot be offloaded with group: choose none or model." in capsys.readouterr().err


def test_what_is_missing_is_one_sentence(small: DrawingPlanner) -> None:
    with pytest.raises(
        ConfigError, match=r"flux does not fit into 0\.50 GiB: .*, so 0\.\d+ GiB are missing, most of it"
    ):
        choose(small, DrawingOptions(), GIB // 2, planning.usual_speed(), "flux")


def test_tiny_models_of_all_families_are_kinds() -> None:
    for name in tiny_transformers.FAMILIES:
        assert kind_of(type(tiny_transformers.transformer(name)).__name__).steps >= 20
    with pytest.raises(ConfigError, match="A ChromaTransformer2DModel cannot be planned for"):
        kind_of("ChromaTransformer2DModel")
