"""Measure what the adapter costs on a diffusion transformer, beside diffusers' own IP-Adapter for FLUX.1.

    .venv/bin/python benchmarks/transformer_steps.py
    .venv/bin/python benchmarks/transformer_steps.py --size middle --rounds 9 --json

The transformer has FLUX.1's classes and random weights, which do not change the time. `tiny` has a width of 256, and
`middle` of 768, with 576 image tokens (384 pixels).

    steps      one step with the adapter / the bare transformer: our branch with 16 and with 257 vision tokens, an
               IP-Adapter file of XLabs on our attachment, and the same file on diffusers'
    pictures   a whole call, from the photo to the picture: ours / diffusers with the same file on the same weights;
               ours with a photo that is encoded in each call, and with a persona

All sides alternate in one process. The report gives medians of the processor time, which other load on the machine
disturbs less than the time that passes. Times are valid for one machine only, so tests never assert them.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imagine import ImaginePipeline
from imagine.adapter.adapter import BranchSpec
from imagine.people.faces import KnownBoxesFinder
from imagine.records import VISION, Conditioning, FaceBox, Tokens
from imagine.transformer_bases.adapter import TransformerAdapter, prepare
from imagine.transformer_bases.ip_files import read_ip_adapter

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"heads": 4, "head": 64, "double": 2, "single": 2, "side": 16, "text": 32, "encoder": 64},
    "middle": {"heads": 6, "head": 128, "double": 2, "single": 4, "side": 24, "text": 64, "encoder": 128},
}
POOLED, STEPS = 64, 4
Works = dict[str, Callable[[], object]]


def main() -> int:
    """Measure, print the report, and return the exit code."""
    options = _options()
    torch.manual_seed(0)
    sizes = SIZES[options.size]
    model = build(sizes)
    with torch.no_grad():
        report = {
            "size": options.size, "threads": torch.get_num_threads(),
            "steps": ratios(timed(steps(model, sizes), options.rounds), "bare"),
            "pictures": ratios(timed(pictures(model, sizes), max(3, options.rounds // 2)), "diffusers, photo"),
        }  # fmt: skip
    print(json.dumps(report) if options.json else json.dumps(report, indent=1))
    return 0


# --- networks ---------------------------------------------------------------------------------------------------------


def build(sizes: dict[str, int]) -> Any:
    """Return a random FluxTransformer2DModel."""
    from diffusers import FluxTransformer2DModel

    half = sizes["head"] // 8
    return FluxTransformer2DModel(
        in_channels=16, num_layers=sizes["double"], num_single_layers=sizes["single"], joint_attention_dim=POOLED,
        attention_head_dim=sizes["head"], num_attention_heads=sizes["heads"], pooled_projection_dim=POOLED,
        axes_dims_rope=(2 * half, 3 * half, 3 * half),
    ).eval().requires_grad_(False)  # fmt: skip


def xlabs_file(model: Any) -> dict[str, dict[str, Tensor]]:
    """Return a random file in the layout of XLabs, nested as diffusers takes it from memory: 4 tokens."""
    text, width = model.config.joint_attention_dim, model.inner_dim
    projection = {"proj.weight": torch.randn(4 * text, POOLED) / 8, "proj.bias": torch.zeros(4 * text)}
    projection |= {"norm.weight": torch.ones(text), "norm.bias": torch.zeros(text)}
    layers = {}
    for block in range(len(model.transformer_blocks)):
        for kind in ("to_k_ip", "to_v_ip"):
            layers[f"{block}.{kind}.weight"] = torch.randn(width, text) / 8
            layers[f"{block}.{kind}.bias"] = torch.zeros(width)
    return {"image_proj": projection, "ip_adapter": layers}


def opened(model: Any, length: int) -> tuple[TransformerAdapter, Conditioning]:
    """Return our adapter with open gates, and a conditioning of one person with `length` tokens."""
    adapter = TransformerAdapter(model, [BranchSpec(VISION, 512, zero_init=False)])
    return adapter.eval().requires_grad_(False), Conditioning({VISION: Tokens(torch.randn(1, length, 512))})


# --- what is measured -------------------------------------------------------------------------------------------------


def steps(model: Any, sizes: dict[str, int]) -> Works:
    """Return one step of each kind; each kind has its own copy of the transformer, with the same weights."""
    side, text = sizes["side"], sizes["text"]
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)
    inputs = {
        "hidden_states": torch.randn(1, side * side, 16), "encoder_hidden_states": torch.randn(1, text, POOLED),
        "pooled_projections": torch.randn(1, POOLED), "timestep": torch.tensor([0.5]), "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3), "return_dict": False,
    }  # fmt: skip

    def step(transformer: Any, **kwargs: Any) -> Callable[[], object]:
        return lambda: transformer(**inputs, joint_attention_kwargs=dict(kwargs))

    works: Works = {"bare": step(model)}
    for length in (16, 257):
        ours = copy.deepcopy(model)
        adapter, conditioning = opened(ours, length)
        adapter.attach(ours)
        works[f"adapter, {length} tokens"] = step(ours, conditioning=prepare(ours, conditioning))
    file, features = xlabs_file(model), torch.randn(1, 1, POOLED)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    adapter = read_ip_adapter(file, ours).requires_grad_(False)
    adapter.attach(ours)
    tokens = Conditioning({VISION: adapter.tokens(VISION, features)})
    works["XLabs file on ours"] = step(ours, conditioning=prepare(ours, tokens))
    theirs._load_ip_adapter_weights([file], low_cpu_mem_usage=False)
    works["XLabs file on diffusers"] = step(theirs, ip_adapter_image_embeds=[features])
    return works


def pictures(model: Any, sizes: dict[str, int]) -> Works:
    """Return whole calls of diffusers' pipeline and of ours, with the same file and the same weights."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    width = sizes["encoder"]
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=4, num_attention_heads=width // 32,
            image_size=224, patch_size=14, projection_dim=POOLED,
        )
    ).eval()  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, shift_factor=0.1, scaling_factor=0.5,
    ).eval()  # fmt: skip

    def pipeline(transformer: Any) -> Any:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        made = FluxPipeline(
            scheduler, vae, None, None, None, None, transformer, encoder, CLIPImageProcessor(size=224, crop_size=224)
        )
        made.set_progress_bar_config(disable=True)
        return made

    file = xlabs_file(model)
    bare, theirs = pipeline(copy.deepcopy(model)), pipeline(copy.deepcopy(model))
    theirs.load_ip_adapter([file], [""], [""], image_encoder_pretrained_model_name_or_path=None)
    ours = ImaginePipeline.from_pipe(pipeline(copy.deepcopy(model)))
    ours.load_ip_adapter(file)
    ours.finder = KnownBoxesFinder([FaceBox(60.0, 60.0, 100.0, 100.0, 1.0)])
    ours.set_progress_bar_config(disable=True)
    photo = Image.effect_noise((224, 224), 60).convert("RGB")
    persona, side = ours.enroll(photo), 16 * sizes["side"]
    given = {
        "prompt_embeds": torch.randn(1, sizes["text"], POOLED), "pooled_prompt_embeds": torch.randn(1, POOLED),
        "height": side, "width": side, "num_inference_steps": STEPS, "output_type": "pt",
    }  # fmt: skip
    return {
        "diffusers, photo": lambda: theirs(**given, ip_adapter_image=photo),
        "ours, photo": lambda: ours(**given, reference=photo),
        "ours, persona": lambda: ours(**given, reference=persona),
        "without a person": lambda: bare(**given),
    }


# --- time -------------------------------------------------------------------------------------------------------------


def timed(works: Works, rounds: int) -> dict[str, list[float]]:
    """Return processor seconds of each work, all in turn, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            if number:
                times[name].append(time.process_time() - began)
    return times


def ratios(times: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Return medians in milliseconds, and the median of each round's ratio to the reference, with quartiles."""
    report = {}
    for name, each in times.items():
        found = [one / other for one, other in zip(each, times[reference], strict=True)]
        low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else (found[0],) * 3
        report[name] = {
            "ms": round(1000 * statistics.median(each), 1), "ratio": round(middle, 3), "low": round(low, 3),
            "high": round(high, 3),
        }  # fmt: skip
    return report


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help="of the transformer (default: tiny)")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds (default: 9)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
