"""Tests of the planner: plans agree with real networks, switches that fit are chosen, errors are one sentence."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from imagine.bases.quantising import QUANTISATIONS
from imagine.blueprints.blueprint import Blueprint
from imagine.blueprints.published import read_base
from imagine.cli import main
from imagine.cli.plan import check_lines
from imagine.errors import ConfigError, WeightsError
from imagine.planning import check, planning
from imagine.planning.cards import CARDS, GIB, THIS_MACHINE, UTILISATION, read_flops, read_size, speeds, with_reserve
from imagine.planning.choosing import choose
from imagine.planning.inference import OFFLOADS, DrawingOptions, DrawingPlanner, DrawingWorkload, default_resolution
from imagine.planning.meter import Meter, parameter_count, planned_kernels, profiled_peak
from imagine.planning.networks import add_branches, build
from imagine.planning.training import Recipe, TrainingPlanner, TrainingWorkload
from tests import tiny, tiny_models, tiny_stock
from tests.root import ROOT
from train.config import load_run
from train.task import TaskContext
from train.tasks.diffusers import DiffusersSettings, DiffusersTask

DOCUMENT, CONFIGS = ROOT / "docs" / "planner.md", ROOT / "configs"
SMALL = check.small_base()
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()  # drop the output of making the tiny models
        code = main(["plan", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def sdxl() -> DrawingPlanner:
    """SDXL with all branches, measured once for all tests."""
    return DrawingPlanner(add_branches(read_base("sdxl"), ["t5-xl", "byt5-small"], "plus", 64), DrawingWorkload(1024))


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch, sdxl: DrawingPlanner) -> None:
    """Let commands reuse `sdxl` where they would build the same base and workload."""

    def drawing(base: Blueprint, workload: DrawingWorkload) -> DrawingPlanner:
        return sdxl if (base, workload) == (sdxl.base, sdxl.workload) else DrawingPlanner(base, workload)

    monkeypatch.setattr(planning, "DrawingPlanner", drawing)


# --- measurements -----------------------------------------------------------------------------------------------------
def test_plans_agree_with_running_networks() -> None:
    report = check.check(bases=["unet"])  # raises RuntimeError if they do not
    kinds = {
        name.removeprefix("unet, ").removesuffix(", memory"): row
        for name, row in report["rows"].items() if name.endswith("memory")
    }  # fmt: skip
    assert set(kinds) == {"drawing", "decoding", "training", "training, recomputed"}
    assert all(row["off"] <= 0.15 for row in kinds.values())
    assert kinds["training, recomputed"]["measured"] < kinds["training"]["measured"] / 2
    assert "Memory agrees within 15%" in check_lines(report)[-1]


def test_a_failed_check_exits_with_code_1(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setattr(check, "profiled_peak", lambda work: 1)
    monkeypatch.setattr(check, "USUAL_BASES", ("unet",))
    code, _, err = run("--check")
    assert code == 1 and "unet, drawing, memory: planned" in err


def test_known_bases_have_the_published_numbers_of_parameters(sdxl: DrawingPlanner) -> None:
    small = build(add_branches(read_base("sd15"), ["byt5-small"], "plus", 0))
    for networks, layers, unet in ((small, 16, 859_520_964), (sdxl.networks, 70, 2_567_463_684)):
        counts = {part: parameter_count(module) for part, module in networks.modules().items()}
        assert len(networks.adapters["adapter"].layers()) == 2 * layers
        assert counts["unet"] == unet
        assert counts["vae"] == 83_653_863 and counts["text_encoder"] == 123_060_480
        assert counts["vision_encoder"] == 632_076_800
        assert counts.get("text_encoder_2") == (694_659_840 if networks is sdxl.networks else None)
    # ip-adapter-plus_sdxl_vit-h has 423,748,864; ours also has a gate per channel of every cross-attention
    parts = sdxl.networks.adapters["adapter"].parts()
    ours = [p.numel() for name in ("vision_branch", "vision_projection") for p in parts[name]]
    assert sum(ours) == 423_748_864 + 83_200


def test_peak_counts_only_tensors_that_are_alive_together() -> None:
    weight = torch.zeros(1000)
    with Meter() as meter:
        (weight * 2).add_(1)  # in place, and freed at the end of the line
        weight.view(10, 100).t()  # a view of an existing tensor
        kept = weight + 1
        assert meter.live == 4000
        kept[:10] = kept.view(100, 10).sum(0)
    assert meter.peak == 8000 or meter.peak == 4000 + 40
    assert meter.live == 4000
    del kept
    assert meter.live == 0


def test_attention_on_meta_tensors_keeps_no_scores() -> None:
    query = torch.empty(1, 2, 512, 8, device="meta")
    with planned_kernels(), Meter() as fused:
        F.scaled_dot_product_attention(query, query, query)
    with Meter() as apart:
        F.scaled_dot_product_attention(query, query, query)
    scores = 2 * 512 * 512 * 4
    assert fused.peak < scores <= apart.peak
    assert fused.flops == apart.flops == 2 * 2 * 2 * 512 * 512 * 8
    before = F.scaled_dot_product_attention
    with planned_kernels(torch.bfloat16):
        assert F.scaled_dot_product_attention is not before
    assert F.scaled_dot_product_attention is before


def test_planned_casts_match_autocast() -> None:
    def learn(device: str) -> None:
        net = nets[device]
        states = torch.ones(256, 64, device=device)
        net(states).float().square().mean().backward()

    nets = {device: nn.Sequential(*(nn.Linear(64, 64, device=device) for _ in range(4))) for device in ("meta", "cpu")}
    with planned_kernels(torch.bfloat16), Meter() as meter:
        learn("meta")
    with torch.autocast("cpu", torch.bfloat16):
        measured = profiled_peak(lambda: learn("cpu"))
    assert meter.peak == pytest.approx(measured, rel=0.15)
    with planned_kernels(torch.bfloat16):
        normal = F.layer_norm(torch.empty(2, 8, dtype=torch.bfloat16, device="meta"), (8,))
    assert normal.dtype == torch.float32


# --- choosing ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def drawing() -> DrawingPlanner:
    return DrawingPlanner(SMALL, DrawingWorkload(512, batch=2, steps=10))


def test_the_fastest_switches_that_fit_are_chosen(drawing: DrawingPlanner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "DrawingPlanner", lambda base, workload: drawing)  # the same as would be built
    plans = [drawing.plan(options) for options in drawing.combinations(DrawingOptions())]
    speed = planning.usual_speed()
    for limit in sorted({plan.peak for plan in plans})[::5]:
        chosen = choose(drawing, DrawingOptions(), limit, speed, "it")
        times = {plan.options: plan.seconds(speed) for plan in plans if plan.peak <= limit}
        equal = [options for options, seconds in times.items() if seconds <= 1.1 * min(times.values())]
        faithful = min(QUANTISATIONS.index(options.quantise) for options in equal)
        assert chosen.plan.options in equal and chosen.plan.options.quantise == QUANTISATIONS[faithful]
        assert not chosen.plan.options.tiling or all(o.tiling for o in equal if o.quantise == QUANTISATIONS[faithful])
        verdicts = {row.plan.options: row.verdict for row in chosen.choices}
        assert verdicts[chosen.plan.options] == "chosen" and list(verdicts.values()).count("chosen") == 1
        assert all((row.verdict == "too large") == (row.plan.peak > limit) for row in chosen.choices)
    alone = drawing.plan(DrawingOptions("bf16", "sequential", True, at_once=1))
    with pytest.raises(ConfigError, match=r"It does not fit .* it still needs .* are missing, most .* with 4 GB"):
        choose(drawing, DrawingOptions(), 2**20, speed, "It")
    found = planning.plan_drawing(SMALL, drawing.workload, DrawingOptions("fp32"), alone.peak, {})
    assert found["precision"] == "bf16" and found["peak"] <= alone.peak and found["choices"]
    with pytest.raises(ConfigError, match="with every switch except the given precision it still needs"):
        planning.plan_drawing(SMALL, drawing.workload, DrawingOptions("fp32"), 2**20, {}, ["precision"])
    fixed = drawing.combinations(DrawingOptions("fp32", "model", True), ["precision", "offload", "tiling"])
    assert {(each.precision, each.offload, each.tiling) for each in fixed} == {("fp32", "model", True)}


def test_fewer_pictures_at_a_time_are_drawn_if_all_do_not_fit(drawing: DrawingPlanner) -> None:
    whole = min(drawing.plan(options).peak for options in drawing.combinations(DrawingOptions()))
    alone = min(drawing.plan(options).peak for options in drawing.combinations(DrawingOptions(), at_once=1))
    assert alone < whole
    chosen = choose(drawing, DrawingOptions(), alone, planning.usual_speed(), "it")
    assert chosen.plan.options.at_once == 1 and chosen.plan.peak <= alone
    one, two = (drawing.plan(DrawingOptions(at_once=size)) for size in (1, 2))
    assert one.flops == pytest.approx(two.flops, rel=0.1) and two == drawing.plan(DrawingOptions(at_once=2))


def test_weights_on_the_device_depend_on_the_offload(drawing: DrawingPlanner) -> None:
    plans = {offload: drawing.plan(DrawingOptions("bf16", offload)) for offload in OFFLOADS}
    parts = plans["none"].parts
    weights = {name: part.weights for name, part in parts.items()}
    assert weights["unet"] == 2 * parts["unet"].parameters  # bf16
    working = parts["vae"].working
    assert plans["none"].at_once["vae"] == sum(weights.values()) + working
    adapters = weights["text_adapter"] + weights["adapter"]
    assert plans["model"].at_once["vae"] == adapters + weights["vae"] + working
    layer = max(p.numel() for p in drawing.networks.models["vae"].parameters()) * 2
    sequential = plans["sequential"].at_once["vae"] - adapters - weights["vision_encoder"] - working
    assert layer <= sequential <= layer + 1000  # a layer is a kernel and its bias
    assert plans["sequential"].moved > 9 * weights["unet"] > plans["model"].moved > plans["none"].moved == 0


def test_tiling_and_precision_change_only_their_parts(drawing: DrawingPlanner) -> None:
    plain, tiled = (drawing.plan(DrawingOptions("bf16", "none", tiling)) for tiling in (False, True))
    assert tiled.parts["vae"].working < 0.6 * plain.parts["vae"].working
    assert tiled.parts["unet"] == plain.parts["unet"]
    full = drawing.plan(DrawingOptions("fp32"))
    assert full.parts["unet"].weights == 2 * plain.parts["unet"].weights and full.flops == plain.flops
    unguided = DrawingPlanner(SMALL, DrawingWorkload(512, batch=2, steps=10, guided=False)).plan(DrawingOptions())
    assert 2 * unguided.flops_step == plain.flops_step < plain.parts["unet"].flops  # the first step also computes keys
    assert plain.flops == sum(part.flops for part in plain.parts.values()) + 9 * plain.flops_step


def test_recipes_need_less_and_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    training = TrainingPlanner(SMALL, TrainingWorkload(64, 2))
    plans = [training.plan(recipe) for recipe in training.recipes(Recipe())]
    peaks = [plan.peak for plan in plans]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    plain, recomputed, small_states = plans[:3]
    learning = plain.memory["optimiser"] / 8  # two float32 states for each value with a gradient
    trained = sum(plain.trained.values())
    assert 0.5 * trained < learning < trained  # the vision encoder's last layers are never used
    assert plain.memory["trained weights"] == plain.memory["average"] == 4 * trained
    assert plain.memory["frozen weights"] == 2 * plain.frozen
    assert recomputed.flops > plain.flops and recomputed.memory["optimiser"] == plain.memory["optimiser"]
    assert small_states.memory["optimiser"] < 0.26 * plain.memory["optimiser"]
    assert planning.fitting(plans, small_states.peak, "It").recipe == Recipe(checkpointing=True, optimiser="adamw8bit")
    kept = list(training.recipes(Recipe("fp32"), ["precision", "optimiser", "average"]))
    assert [(recipe.checkpointing, recipe.accumulation) for recipe in kept] == [(False, 1), (True, 1), (True, 2)]
    assert all((recipe.precision, recipe.optimiser, recipe.average) == ("fp32", "adamw", True) for recipe in kept)
    monkeypatch.setattr(planning, "TrainingPlanner", lambda base, workload: training)  # the same as would be built
    with pytest.raises(ConfigError, match=r"Training a small base at 64 px .* or train fewer parts"):
        planning.plan_training(SMALL, training.workload, Recipe(), peaks[-1] - 1, {})
    with pytest.raises(ConfigError, match=r"A batch of 2 cannot be split into 3 equal micro-batches: choose a divisor"):
        training.plan(Recipe(accumulation=3))
    with pytest.raises(ConfigError, match=r"no part 'visoin' to train: choose from vision_encoder, t5_branch"):
        TrainingPlanner(SMALL, TrainingWorkload(64, 2, ("visoin",)))


# --- bases and devices ------------------------------------------------------------------------------------------------
def test_a_stock_folder_without_weights_is_enough(tmp_path: Path) -> None:
    folder = tiny_models.stable_diffusion(tmp_path)
    real = {part: parameter_count(module) for part, module in _loaded(folder).items()}
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    base = add_branches(read_base(str(folder)), [], "full", 2)
    networks = build(base)
    assert {part: parameter_count(networks.models[part]) for part in real} == real
    assert default_resolution(base) == 32
    plan = DrawingPlanner(base, DrawingWorkload(32)).plan(DrawingOptions())
    assert plan.parts["unet"].flops > 0 and set(plan.at_once) == {"text_encoder", "vision_encoder", "unet", "vae"}


def _loaded(folder: Path) -> dict[str, Any]:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    return {part: getattr(pipe, part) for part in ("unet", "vae", "text_encoder")}


def test_our_own_folder_comes_with_its_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny.pipeline()
    pipe.save_pretrained(tmp_path)
    base = read_base(str(tmp_path))
    assert add_branches(base, ["t5-xl"], "plus", 8) == base
    networks = build(base)
    for name in ("unet", "vae", "text_encoder_2", "image_encoder", "adapter", "text_adapter"):
        assert parameter_count(networks.modules()[name]) == parameter_count(getattr(pipe, name))
    plan = DrawingPlanner(base, DrawingWorkload(tiny.SIZE, references=2)).plan(DrawingOptions("fp32"))
    assert plan.parts["text_encoder_3"].flops > 0 and plan.parts["image_encoder"].flops > 0
    with pytest.raises(ConfigError, match="multiple of 16"):
        DrawingPlanner(base, DrawingWorkload(40))
    # Another task trains our own world: its denoiser is in float32, and it recomputes no activations.
    training = TrainingPlanner(base, TrainingWorkload(tiny.SIZE, 2))
    own = training.plan(Recipe())
    assert own.memory["frozen weights"] == 4 * own.frozen
    assert not any(recipe.checkpointing for recipe in training.recipes(Recipe()))
    assert not any("checkpointing" in line or "base_precision" in line for line in training.switches(Recipe()))
    with pytest.raises(ConfigError, match="cannot recompute activations"):
        training.plan(Recipe(checkpointing=True))
    assert main(["plan", "--base", str(tmp_path), "--lora-rank", "4"]) == 2
    assert "has adapters already: leave out --lora-rank." in capsys.readouterr().err


def test_speeds_and_sizes_are_read() -> None:
    assert (read_size("12GB"), read_size("1.5 gib"), read_size("512MB")) == (12 * GIB, 1.5 * GIB, GIB // 2)
    assert read_size("23034MiB") < 22.5 * GIB  # an L4, as nvidia-smi shows it
    assert read_flops("300T") == 3e14 and read_flops("0.5p") == 5e14
    assert speeds(None, "300T", True)["300T"].flops == 3e14
    (card,) = speeds("a100", None, True).values()
    assert card.flops == CARDS["a100"] * UTILISATION and "assumption" in card.how
    (here,) = speeds(THIS_MACHINE, None, False).values()
    assert here.flops > 1e8 and "measured on this machine" in here.how
    assert with_reserve(10 * GIB) > 10.5 * GIB


# --- the command ------------------------------------------------------------------------------------------------------
def test_the_command_prints_a_plan(run: Run, tmp_path: Path) -> None:
    folder = str(tiny_models.stable_diffusion(tmp_path))
    code, out, err = run("--base", folder, "--readers", "none", "--lora-rank", "2", "--fit", "24GB", "--batch", "2")
    assert (code, err) == (0, "") and "vision_encoder" in out and 'dtype="bfloat16")' in out
    assert "What was compared for 24.00 GiB" in out and "--num-images 2 --batch 2" in out
    assert re.search(r"rtx4090 +\d", out)
    code, out, _ = run("--base", folder, "--readers", "none", "--flops", "1T", "--json")
    said = json.loads(out)
    assert code == 0 and said["offload"] == "none" and said["resolution"] == 32
    assert said["seconds"] == {"1T": pytest.approx(said["flops"] / 1e12)}
    code, out, _ = run("--base", folder, "--readers", "none", "--train", "--parts", "vision_branch,lora", "--json")
    said = json.loads(out)
    assert code == 0 and list(said["trained"]) == ["vision_branch", "lora"] and said["peak"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--fit", "12 apples"], "--fit 12 apples is not an amount of memory: write it as in 12GB."),
        (["--resolution", "513"], "A resolution of 513 does not fit the base: choose a multiple of 8, such as 512."),
        (["--base", "sd16"], "There is no base 'sd16': choose a folder, one of sdxl, sd15, flux2-klein-4b,"),
        (["--base", "nobody/nothing"], "or a hub id that is already downloaded."),
        (["--base", "/"], "cannot be read: choose the folder of a pipeline"),
        (["--device", "abacus"], "There is no device 'abacus': choose from t4,"),
        (["--flops", "many"], "--flops many is not a speed: write FLOP per second as in 300T"),
        (["--readers", "t6"], "There is no text encoder 't6': choose from t5-xl,"),
        (["--readers", "t5-xl,ul2"], "t5-xl and ul2 would feed one branch, t5: choose one of them."),
        (["--train", "--precision", "fp16"], "choose bf16 or fp32."),
        (["--batch", "many"], "'many' is not a whole number of at least 1"),
        (["--train", "--steps", "3", "--tiling"], "Training does not depend on --steps and --tiling: leave that out"),
        (["--parts", "lora"], "Drawing does not depend on --parts: leave that out, or add --train."),
        (["--check", "--fit", "2GB"], "--check takes no other arguments: leave out --fit."),
        (["--device", "a100", "--flops", "1T"], "--flops: not allowed with argument --device"),
    ],
)
def test_wrong_input_is_one_sentence(run: Run, arguments: list[str], sentence: str) -> None:
    base = [] if {"--base", "--check"} & {*arguments} else ["--base", "sd15"]
    code, out, err = run(*base, *arguments)
    assert code == 2 and out == "" and sentence in err and err.count("\n") == 1


def test_a_broken_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="has no unet or transformer that can be planned for"):
        read_base(str(tmp_path))
    broken = replace(SMALL.components["unet"], config={"block_out_channels": [8, 9]})
    with pytest.raises(WeightsError, match=r"No network can be built from the config.json of unet"):
        build(Blueprint("broken", {"unet": broken}))


# --- published plans --------------------------------------------------------------------------------------------------
ROWS = (
    "8 GB |",
    "12 GB",
    "24 GB |",
)  # rows of docs/planner.md that share one measurement; the others would take too long
AT_WORK = {"decoding": "vae", "denoising": "unet"}


@pytest.mark.parametrize("mark", ROWS)
def test_the_published_plan_is_what_the_command_prints(run: Run, shared: None, mark: str) -> None:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if line.startswith(f"| {mark}")]
    (heading,) = [line for line in lines if line.startswith("| drawing |")]
    cells = dict(zip(map(str.strip, heading.split("|")), map(str.strip, row.split("|")), strict=True))
    said = _said(run, cells["command"])
    _memory(cells["memory"], said["peak"])
    assert cells["TFLOP a step"] == f"{said['flops_step'] / 1e12:.1f}"
    (times,) = [name for name in cells if "A100" in name]
    cards = [name.strip().lower().replace(" ", "") for name in times.replace("4090", "RTX 4090").split(",")]
    for card, seconds in zip(cards, cells[times].removesuffix(" s").split(","), strict=True):
        assert float(seconds) == pytest.approx(said["seconds"][card], rel=0.05, abs=0.05)
    assert AT_WORK[cells["peak during"]] == said["busiest"]
    assert re.findall(r"`(?:pipe\.)?(.*?)`", cells["switches"]) == [
        line.partition("  #")[0].removeprefix("pipe.") for line in said["switches"][1:]
    ]


def _said(run: Run, text: str) -> dict[str, Any]:
    """Run the command in `text`, between backticks, and return its JSON."""
    command = re.search(r"`imagine plan (.*?)`", text)
    assert command is not None
    code, out, err = run(*command[1].split(), "--json")
    assert (code, err) == (0, "")
    said: dict[str, Any] = json.loads(out)
    return said


def _memory(published: str, size: int) -> None:
    """Compare "12.3 GiB" with bytes; the tolerance allows for other versions of the libraries."""
    found = re.search(r"(\d+\.\d) GiB", published)
    assert found is not None and size / GIB == pytest.approx(float(found[1]), rel=0.03)


@pytest.mark.parametrize("recipe", ["sdxl_24gb", "sd15_1gpu"])  # sdxl_8gpu would take ten more seconds
def test_the_header_of_a_recipe_matches_its_plan(run: Run, recipe: str) -> None:
    file = CONFIGS / f"{recipe}.yaml"
    header = " ".join(line.lstrip("# ") for line in file.read_text(encoding="utf-8").partition("data:")[0].splitlines())
    said = _said(run, header)
    _memory(header, said["peak"])
    millions = {word: re.search(rf"{word} ([\d,]+) M", header) for word in ("trains", "frozen")}
    for word, count in {"trains": sum(said["trained"].values()), "frozen": said["frozen"]}.items():
        found = millions[word]
        assert found is not None and int(found[1].replace(",", "")) == round(count / 1e6)
    time = re.search(r"(\d+) TFLOP, ([\d.]+) s at 40 % of an (.*?):", header)
    assert time is not None and int(time[1]) == round(said["flops_step"] / 1e12)
    assert float(time[2]) == pytest.approx(said["seconds"][time[3].lower().replace(" ", "")], abs=0.06)
    # The config itself has the settings that the command plans.
    planned, stage = yaml.safe_load("\n".join(said["switches"])), load_run(file).stages["real"]
    assert stage.batch_size == planned.pop("batch_size")
    assert (stage.ema > 0) == (planned.pop("ema") > 0)
    settings = planned.pop("settings")
    if "ip_adapter" in stage.settings:  # the adapter's file determines the projection
        assert settings.pop("projection") == "plus" and "plus" in stage.settings["ip_adapter"]
    assert settings.items() <= stage.settings.items()
    assert planned == {name: getattr(stage, name) for name in planned} and len(planned) == 3


@pytest.mark.parametrize("parts", ["", "vision_branch,vision_projection,lora"])
def test_our_trainer_with_the_printed_settings_has_the_planned_weights(run: Run, tmp_path: Path, parts: str) -> None:
    folder = tiny_models.stable_diffusion(tmp_path / "base")
    tiny_stock.encoder().save_pretrained(folder / "vision_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vision_encoder": ["imagine", "VisionEncoder"]}))
    some = ["--parts", parts] if parts else []
    said = _said(run, f"`imagine plan --base {folder} --readers none --projection full --train --batch 4 "
                 f"--accumulation 2 --checkpointing --lora-rank 3 {' '.join(some)}`")  # fmt: skip
    config = tmp_path / "run.yaml"
    rates = {part: 1e-4 for part in said["trained"]}
    lines = ["stages:", "  only:", "    task: diffusers_adapter", f"    train: {json.dumps(rates)}", "    images: 8"]
    config.write_text("\n".join([*lines, *(f"    {line}" for line in said["switches"])]))
    stage = load_run(config).stages["only"]
    assert (stage.batch_size, stage.accumulation, stage.precision, stage.optimiser) == (4, 2, "bf16", "adamw")
    assert stage.ema > 0
    settings = DiffusersSettings(**stage.settings, base=str(folder), vision=folder / "vision_encoder")
    with torch.device("meta"):
        task = DiffusersTask(settings, TaskContext("only", 0, torch.device("meta"), tmp_path))
    assert task.denoiser.is_gradient_checkpointing and settings.resolution == 32
    trained = {id(p): p for part in stage.train for p in task.parts()[part]}
    every = {id(p): p for module in task.modules.values() for p in module.parameters()}
    frozen = [p for key, p in every.items() if key not in trained]
    assert said["memory"]["trained weights"] == 4 * sum(p.numel() for p in trained.values())
    assert said["memory"]["frozen weights"] == sum(p.numel() * p.element_size() for p in frozen)
