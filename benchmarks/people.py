"""Measure what further people cost in a denoising step on the same canvas, with random weights.

    .venv/bin/python benchmarks/people.py
    .venv/bin/python benchmarks/people.py --size stock --rounds 9 --json

There are two sizes. `portrait` is the denoiser of the portrait world with 65 vision tokens a person. `stock` is a
denoiser with the structure of Stable Diffusion XL at a tenth of its size, 16 tokens a person, and latents of 32 x 48.
Every step is guided: an unconditional row without people, and one with them. The report gives medians of the processor
time of a step, which other load on the machine disturbs less than the time that passes, and the additional time per
further person. Steps of all kinds alternate in one process. Times are valid for one machine only.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from imagine.adapter.adapter import Adapter, BranchSpec, prepare
from imagine.adapter.router import MAX_PEOPLE
from imagine.networks.models import build_denoiser
from imagine.records import VISION, Conditioning, Tokens

TOKENS = {"portrait": 65, "stock": 16}
CANVAS = {"portrait": (16, 24), "stock": (32, 48)}


def main() -> int:
    """Measure, print the report, and return the exit code."""
    options = _options()
    torch.manual_seed(0)
    denoiser = build(options.size).eval().requires_grad_(False)
    width = int(denoiser.config.cross_attention_dim)
    adapters = {
        "routed": Adapter(denoiser, [BranchSpec(VISION, width, router=True)], options.lora_rank),
        "concatenated": Adapter(denoiser, [BranchSpec(VISION, width, people="concatenate")], options.lora_rank),
    }
    works: dict[str, Callable[[], Any]] = {"no person": step(denoiser, None, options, 0)}
    for people in range(1, MAX_PEOPLE + 1):
        works[f"{people} routed"] = step(denoiser, adapters["routed"], options, people)
    works[f"{MAX_PEOPLE} concatenated"] = step(denoiser, adapters["concatenated"], options, MAX_PEOPLE)
    with torch.no_grad():
        times = time_interleaved(works, options.rounds)
    report = report_of(times)
    if options.json:
        print(json.dumps({"size": options.size, "threads": torch.get_num_threads(), **report}))
        return 0
    for name, row in report.items():
        print(f"{name:<16}" + "  ".join(f"{key} {value}" for key, value in row.items()))
    return 0


def build(size: str) -> UNet2DConditionModel:
    """Return a denoiser with random weights."""
    if size == "portrait":
        return build_denoiser(latent_channels=16)
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(128, 256, 512),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 6),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=1024,
        use_linear_projection=True,
    )


def step(
    denoiser: UNet2DConditionModel, adapter: Adapter | None, options: argparse.Namespace, people: int
) -> Callable[[], Any]:
    """Return the work of one guided step with so many people, whose keys and values are cached by the first run."""
    width, dtype = int(denoiser.config.cross_attention_dim), next(denoiser.parameters()).dtype
    latents = torch.randn(2, int(denoiser.config.in_channels), *CANVAS[options.size], dtype=dtype)
    text = torch.randn(2, 77, width, dtype=dtype)
    conditioning = Conditioning()
    if adapter is not None:
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.02)
        tokens = Tokens(torch.randn(2, people * TOKENS[options.size], width, dtype=dtype))
        groups = {VISION: torch.ones(2, people, dtype=torch.bool)}
        conditioning = Conditioning({VISION: tokens}, {VISION: torch.tensor([0.0, 1.0])}, groups=groups)
        with adapter.attach(denoiser):
            conditioning = prepare(denoiser, conditioning)

    def work() -> float:
        if adapter is not None:
            adapter.attach(denoiser)
        began = time.process_time()
        _predict(denoiser, latents, text, conditioning)
        seconds = time.process_time() - began
        if adapter is not None:
            adapter.detach(denoiser)
        return seconds

    return work


def _predict(denoiser: UNet2DConditionModel, latents: Tensor, text: Tensor, conditioning: Conditioning) -> None:
    options = {"conditioning": conditioning} if conditioning.branches else None
    denoiser(latents, torch.tensor(500.0), encoder_hidden_states=text, cross_attention_kwargs=options)


def time_interleaved(works: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each work, run alternately after two warm-up rounds; every other round is reversed."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 2):
        order = list(works.items()) if number % 2 else list(works.items())[::-1]
        for name, work in order:
            seconds = work()
            if number > 1:
                times[name].append(seconds)
    return times


def report_of(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Return the median milliseconds of each work, and what it takes more than one person, per further person."""
    rows: dict[str, dict[str, Any]] = {}
    for name, some in times.items():
        rows[name] = {"ms": round(1000 * statistics.median(some), 2)}
        people = int(name.split()[0]) if name[0].isdigit() else 0
        if people > 1:  # compared round by round, which other load disturbs least
            ratios = [mine / one for mine, one in zip(some, times["1 routed"], strict=True)]
            rows[name]["% per further person"] = round(100 * (statistics.median(ratios) - 1) / (people - 1), 2)
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the time of a step with one to four people.")
    parser.add_argument("--size", choices=list(TOKENS), default="portrait")
    parser.add_argument("--rounds", type=int, default=25, help="steps of each kind (default: 25)")
    parser.add_argument("--lora-rank", type=int, default=16, help="LoRA rank of the adapter (default: 16)")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
