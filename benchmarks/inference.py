"""Measure the cost of identity while drawing, against the bare denoiser and diffusers' IP-Adapter.

`make bench-inference` runs it. The weights are random, which does not change the time. There are two sizes: `full` is
SDXL with ViT-H/14 in bf16. `middle` is a pipeline of the same classes at a tenth of that size in float32; growth and
the profile are measured on it too.

    steps      one guided step with four branches / the same denoiser without adapters
    pictures   from photo and sentence to picture: ours / diffusers with the same IP-Adapter Plus, on the same weights
    growth     a step with more references, more tokens, more people
    profile    the operations that take a step's additional time

The two sides of a comparison alternate in one process, so that other load on the machine slows both alike. The report
gives medians and quartiles. Times are valid for one machine only, so tests never assert them.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from imagine.adapter.adapter import prepare
from imagine.adapter.attention import attention_layers
from imagine.blueprints.blueprint import Blueprint, Component
from imagine.blueprints.published import read_base
from imagine.ip_adapter.layout import projection_shapes
from imagine.networks.encoders import CLIP_MEAN, CLIP_STD, trim_clip_vocabulary
from imagine.planning.denoisers import unet_inputs
from imagine.planning.inference import build_conditioning, vision_token_count
from imagine.planning.networks import Networks, add_branches, build
from imagine.records import Conditioning, Tokens
from imagine.stock.pipelines import personalised_class

PROMPT = "a person smiling on a beach, wearing a red hat, as a pencil sketch"
VISION, T5 = "vision", "t5"
GROWTH = (1, 2, 4, 8)
PLUS_TOKENS = 16
_VISION_CONFIG = {"projection_dim": 1024, "image_size": 224, "patch_size": 14, "hidden_act": "gelu"}

Times = dict[str, list[float]]
Work = Callable[[], object]


def main() -> int:
    """Measure the requested parts, print the report, and return the exit code."""
    options = _options()
    torch.manual_seed(0)
    torch.set_default_device(options.device)
    dtype = torch.bfloat16 if options.size == "full" else torch.float32
    report: dict[str, Any] = {"threads": torch.get_num_threads(), "size": options.size, "dtype": str(dtype)}
    report |= {"device": options.device, "resolution": options.resolution, "LoRA rank": options.lora_rank}
    report["GFLOP per second"] = {str(each): round(product_speed(each)) for each in (torch.float32, torch.bfloat16)}
    blueprint = full_size() if options.size == "full" else middle_size()
    networks = filled(add_branches(blueprint, ["t5-xl", "byt5-small"], "plus", options.lora_rank), dtype)
    parts = options.parts or (["steps", "pictures"] if options.size == "full" else list(PARTS))
    with torch.no_grad():
        for name in parts:
            began = time.perf_counter()
            report[name] = PARTS[name](networks, options)
            report[name]["total seconds"] = round(time.perf_counter() - began)
            print(f"{name}: {json.dumps(report[name], indent=1)}", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(report))
    else:
        print({key: value for key, value in report.items() if key not in PARTS})
    return 0


# --- networks ---------------------------------------------------------------------------------------------------------


def full_size() -> Blueprint:
    """Return the blueprint of SDXL with ViT-H/14, the usual vision encoder of IP-Adapters."""
    base = read_base("sdxl")
    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    vision_encoder = Component("CLIPVisionModelWithProjection", {**_VISION_CONFIG, **sizes})
    return replace(base, components={**base.components, "image_encoder": vision_encoder})


def middle_size() -> Blueprint:
    """Return a blueprint of the same classes and structure at a tenth of the size."""
    base = read_base("sdxl")
    unet = dict(base.components["unet"].config) | {
        "block_out_channels": [128, 256, 512], "attention_head_dim": [2, 4, 8], "cross_attention_dim": 1024,
        "transformer_layers_per_block": [1, 2, 6], "projection_class_embeddings_input_dim": 6 * 256 + 512,
    }  # fmt: skip
    vae = dict(base.components["vae"].config) | {"block_out_channels": [64, 128, 256, 256]}
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "projection_dim": 512}
    vision_encoder = {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 12, "num_attention_heads": 8}
    changed = {
        "unet": Component("UNet2DConditionModel", unet),
        "vae": Component("AutoencoderKL", vae),
        "image_encoder": Component("CLIPVisionModelWithProjection", {**_VISION_CONFIG, **vision_encoder}),
    }
    for name in ("text_encoder", "text_encoder_2"):
        old = base.components[name]
        changed[name] = Component(old.kind, {**old.config, **text, "num_hidden_layers": 12})
    return Blueprint("middle", changed)


def filled(blueprint: Blueprint, dtype: torch.dtype) -> Networks:
    """Build networks with random weights; T5 and ByT5 encoders are left out, because their tokens are random too."""
    networks = build(blueprint, leave_out=("t5_encoder", "byt5_encoder"))
    for module in networks.modules().values():
        fill(nn.Module.to(module, dtype).to_empty(device=torch.get_default_device()))
    return networks


def fill(module: nn.Module) -> None:
    """Fill a network with random weights from copies of one random block; drawing billions would take minutes."""
    block = torch.randn(2**20)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            spread = parameter[0].numel() ** -0.5
            flat = parameter.data.view(-1)
            for start in range(0, flat.numel(), len(block)):
                part = flat[start : start + len(block)]
                part.copy_(block[: len(part)] * spread)
        else:
            parameter.data.fill_(1 / 8 if name.endswith("gate") else float(name.endswith("weight")))
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
        elif name in ("mean", "std"):
            buffer.copy_(torch.tensor(CLIP_MEAN if name == "mean" else CLIP_STD).view(3, 1, 1))


# --- measurements -----------------------------------------------------------------------------------------------------


def steps(networks: Networks, options: argparse.Namespace) -> dict[str, Any]:
    """Compare a guided step with four branches with the bare denoiser's; the unconditional half has no vision."""
    guided = conditioning_of(networks)
    works = {"bare": bare(networks, options), "four branches": attached(networks, guided, options)}
    if options.size == "middle":
        works["CLIP alone, adapters attached"] = attached(networks, Conditioning(), options)
    return compared(time_interleaved(works, options.rounds), "four branches", "bare")


def pictures(networks: Networks, options: argparse.Namespace) -> dict[str, Any]:
    """Compare whole pictures from photo and sentence: ours and diffusers', with the same weights and IP-Adapter."""
    for adapter in networks.adapters.values():
        adapter.detach(networks.unet)
    try:
        ours, theirs = pipelines(networks)
        photo = Image.fromarray((np.random.default_rng(0).random((256, 256, 3)) * 255).astype(np.uint8))
        drawn: dict[str, Tensor] = {}

        def draw(name: str, pipe: Any) -> Work:
            def keep(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
                drawn[name] = tensors["latents"].float()
                return tensors

            def work() -> None:
                pipe(
                    PROMPT, ip_adapter_image=photo, num_inference_steps=options.steps,
                    height=options.resolution, width=options.resolution,
                    guidance_scale=5.0, generator=torch.Generator().manual_seed(0), callback_on_step_end=keep,
                )  # fmt: skip

            return work

        times = time_interleaved({"diffusers": draw("diffusers", theirs), "ours": draw("ours", ours)}, options.pictures)
    finally:
        for adapter in networks.adapters.values():
            adapter.attach(networks.unet)
    apart = (drawn["ours"] - drawn["diffusers"]).abs().max() / drawn["diffusers"].abs().max()
    found = compared(times, "ours", "diffusers")
    return {**found, "steps": options.steps, "largest difference of latents, relative": float(apart)}


def growth(networks: Networks, options: argparse.Namespace) -> dict[str, Any]:
    """Compare a step with more references, longer sentences or more people in regions with a step with one of each."""
    works: dict[str, Work] = {"1 reference": attached(networks, conditioning_of(networks), options)}
    for count in GROWTH[1:]:
        works[f"{count} references"] = attached(networks, conditioning_of(networks, count), options)
    for length in (256, 512):
        plain = conditioning_of(networks)
        longer = Tokens(plain.branches[T5].values.repeat(1, length // 128, 1))
        works[f"{length} T5 tokens"] = attached(
            networks, replace(plain, branches={**plain.branches, T5: longer}), options
        )
    for count in GROWTH[1:3]:
        many = conditioning_of(networks, count)
        sides = _sides(options)
        regions = torch.zeros(1, count, *sides)
        for number, columns in enumerate(torch.arange(sides[1]).chunk(count)):
            regions[0, number, :, columns] = 1
        works[f"{count} people in regions"] = attached(networks, replace(many, regions={VISION: regions}), options)
    works["257 tokens of a full projection"] = attached(networks, full_projection(networks), options)
    times = time_interleaved(works, options.rounds)
    medians = {name: statistics.median(some) for name, some in times.items()}
    return {name: _spread(times[name]) | {"ratio": round(medians[name] / medians["1 reference"], 3)} for name in times}


def profile(networks: Networks, options: argparse.Namespace) -> dict[str, Any]:
    """Return the milliseconds per step of the operations that differ most between four branches and bare."""
    works = {
        "bare": bare(networks, options),
        "four branches": attached(networks, conditioning_of(networks), options),
    }
    spent: dict[str, dict[str, tuple[float, int]]] = {}
    for name, work in works.items():
        work()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            for _ in range(options.rounds):
                work()
        spent[name] = {
            event.key: (event.self_cpu_time_total / 1000 / options.rounds, event.count // options.rounds)
            for event in recorded.key_averages()
        }
    zero = (0.0, 0)
    rows = [
        (ours[0] - spent["bare"].get(key, zero)[0], key, ours, spent["bare"].get(key, zero))
        for key, ours in spent["four branches"].items()
    ]
    rows.sort(key=lambda row: -abs(row[0]))
    return {
        key: {"additional ms": round(more, 2), "ms": round(ours[0], 2), "calls": ours[1],
              "bare ms": round(theirs[0], 2), "bare calls": theirs[1]}
        for more, key, ours, theirs in rows[:12]
    }  # fmt: skip


PARTS: dict[str, Callable[[Networks, argparse.Namespace], dict[str, Any]]] = {
    "steps": steps, "growth": growth, "profile": profile, "pictures": pictures,
}  # fmt: skip


# --- helpers ----------------------------------------------------------------------------------------------------------


def bare(networks: Networks, options: argparse.Namespace) -> Work:
    """Return the work of one guided step of the denoiser without adapters."""
    inputs = unet_inputs(networks.unet, 2, _sides(options))

    def work() -> None:
        for adapter in networks.adapters.values():
            adapter.detach(networks.unet)
        _run_and_wait(lambda: networks.unet(**inputs, return_dict=False))
        for adapter in networks.adapters.values():
            adapter.attach(networks.unet)

    return work


def attached(networks: Networks, conditioning: Conditioning, options: argparse.Namespace) -> Work:
    """Return the work of one guided step with this conditioning, whose keys and values are cached in the first run."""
    inputs = unet_inputs(networks.unet, 2, _sides(options))
    ready = prepare(networks.unet, conditioning)
    return lambda: _run_and_wait(
        lambda: networks.unet(**inputs, cross_attention_kwargs={"conditioning": ready}, return_dict=False)
    )


def _sides(options: argparse.Namespace) -> tuple[int, int]:
    """Return height and width of the latents; SDXL's autoencoder maps 8 x 8 pixels to one cell."""
    return options.resolution // 8, options.resolution // 8


def conditioning_of(networks: Networks, references: int = 1) -> Conditioning:
    """Return the conditioning of a guided step with all branches; the unconditional row has no reference."""
    found = build_conditioning(
        networks, 2, references, vision_token_count(networks.models[networks.vision_encoder or ""])
    )
    return replace(found, scales={VISION: torch.tensor([0.0, 1.0])})


def full_projection(networks: Networks) -> Conditioning:
    """Return the same with the vision tokens of the paper's projection: one global token, and one per patch."""
    found = conditioning_of(networks)
    values = found.branches[VISION].values
    count = vision_token_count(networks.models[networks.vision_encoder or ""])
    many = torch.randn(2, count, values.shape[2], dtype=values.dtype)
    return replace(found, branches={**found.branches, VISION: Tokens(many)})


def pipelines(networks: Networks) -> tuple[Any, Any]:
    """Return our pipeline and diffusers' around the same base, both with the same IP-Adapter Plus."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPImageProcessor

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = trim_clip_vocabulary([PROMPT], folder, max_tokens=77)
    parts = {name: networks.models[name] for name in ("vae", "text_encoder", "text_encoder_2", "image_encoder")}
    parts |= {"tokenizer": tokenizer, "tokenizer_2": tokenizer, "feature_extractor": CLIPImageProcessor()}
    twin = twin_of(networks.unet)
    tensors = ip_adapter_plus(networks)
    made = []
    for kind, unet in (
        (personalised_class(StableDiffusionXLPipeline), networks.unet),
        (StableDiffusionXLPipeline, twin),
    ):
        pipe = kind(**parts, unet=unet, scheduler=EulerDiscreteScheduler(), add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_ip_adapter([tensors], subfolder=[""], weight_name=[""], image_encoder_folder=None)
        made.append(pipe)
    return made[0], made[1]


def twin_of(unet: Any) -> Any:
    """Return a second denoiser that shares the weights, so that each pipeline can set its own attention processors."""
    with torch.device("meta"):
        twin = type(unet).from_config(unet.config)
    twin.load_state_dict(unet.state_dict(), assign=True)
    return twin.eval()


def ip_adapter_plus(networks: Networks) -> dict[str, dict[str, Tensor]]:
    """Return a random IP-Adapter Plus for the denoiser, in the form in which diffusers loads it from memory."""
    unet = networks.unet
    width = int(unet.config.cross_attention_dim)
    vision_width = int(cast(Any, networks.models["image_encoder"]).config.hidden_size)
    dtype = next(unet.parameters()).dtype
    inner = min(width, vision_width) // 64 * 64
    block = torch.randn(2**20)

    def random(shape: Sequence[int]) -> Tensor:
        count = int(np.prod(shape))
        values = block.repeat(-(-count // len(block)))[:count].view(*shape)
        return (values * (shape[-1] ** -0.5 if len(shape) > 1 else 1.0)).to(dtype)

    shapes = projection_shapes("plus", PLUS_TOKENS, vision_width, width, inner, inner)
    keys = {}
    cross = [attn for attn in attention_layers(unet).values() if attn.is_cross_attention]
    for number, attn in enumerate(cross):
        for name in ("to_k_ip", "to_v_ip"):
            keys[f"{2 * number + 1}.{name}.weight"] = random((attn.inner_dim, width))
    return {"image_proj": {name: random(shape) for name, shape in shapes.items()}, "ip_adapter": keys}


_clock: list[float] = []  # seconds of the last work; only the time inside `_run_and_wait` counts


def _run_and_wait(work: Work) -> None:
    _wait()
    began = time.perf_counter()
    work()
    _wait()
    _clock.append(time.perf_counter() - began)


def _wait() -> None:
    """Wait until an accelerator has finished its queued work."""
    if torch.get_default_device().type != "cpu":
        torch.accelerator.synchronize()


def time_interleaved(works: Mapping[str, Work], rounds: int) -> Times:
    """Return the seconds of each work, run alternately after one warm-up round; every other round is reversed."""
    times: Times = {name: [] for name in works}
    for number in range(rounds + 1):
        order = list(works.items())
        if number % 2 == 0:
            order.reverse()
        for name, work in order:
            _clock.clear()
            _wait()
            began = time.perf_counter()
            work()
            _wait()
            seconds = _clock[-1] if _clock else time.perf_counter() - began
            if number:
                times[name].append(seconds)
    return times


def compared(times: Times, ours: str, theirs: str) -> dict[str, Any]:
    """Return medians and quartiles, the ratio of the medians, and the quartiles of the ratios per round."""
    ratios = [first / second for first, second in zip(times[ours], times[theirs], strict=True)]
    medians = {name: statistics.median(some) for name, some in times.items()}
    found: dict[str, Any] = {name: _spread(some) for name, some in times.items()}
    return {**found, "ratio": round(medians[ours] / medians[theirs], 3), "ratios per round": _spread(ratios)}


def _spread(some: Sequence[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(some, n=4, method="inclusive") if len(some) > 1 else [some[0]] * 3
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def product_speed(dtype: torch.dtype, side: int = 1024) -> float:
    """Return the GFLOP per second of a matrix product, the best of three runs."""
    left = torch.ones(side, side, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best / 1e9


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the cost of identity while drawing.")
    parser.add_argument("--size", choices=["middle", "full"], default="middle")
    parser.add_argument(
        "--parts", nargs="*", choices=list(PARTS), help="measurements (default: all; at full size steps and pictures)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds of steps (default: 9)")
    parser.add_argument("--pictures", type=int, default=5, help="rounds of whole pictures (default: 5)")
    parser.add_argument("--steps", type=int, default=6, help="steps per picture (default: 6)")
    parser.add_argument("--resolution", type=int, default=256, help="side of the pictures in pixels (default: 256)")
    parser.add_argument("--lora-rank", type=int, default=64, help="LoRA rank of the identity adapter (default: 64)")
    parser.add_argument("--device", default="cpu", help="device to compute on (default: cpu)")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
