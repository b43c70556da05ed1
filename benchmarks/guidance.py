"""Measure prompt and identity scores at several guidance scales on held-out people, to select the defaults.

    .venv/bin/python benchmarks/guidance.py --weights weights --text 1 1.5 2 3 --identity 1 2 --steps 20

It prints one line per setting. The people differ from those that `imagine evaluate` uses by default, so the defaults
are not tuned on the test people.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imagine.evaluation.cases import Cases, judge_pictures, judge_real_pictures, make_cases
from imagine.evaluation.judge import Judge
from imagine.evaluation.report import to_pil, to_tensor
from imagine.evaluation.scores import METRICS, score
from imagine.evaluation.suites import load_suite
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.world import render

SEED = 5  # different people from those of seed 0, the default of `imagine evaluate`


def main() -> int:
    """Measure and print every combination of settings, and return the exit code."""
    options = _options()
    judge, pipe = Judge.from_pretrained(), ImaginePipeline.from_pretrained(options.weights)
    pipe.set_progress_bar_config(disable=True)
    cases = make_cases(load_suite("portraits")[: options.prompts], options.identities, SEED)
    real = judge_real_pictures(cases, judge)
    photos = render(cases.people[: cases.identities], cases.references).images
    personas = [pipe.enroll([to_pil(photo)], on_no_face="whole") for photo in photos]
    ceiling = score(cases, real.rows["ceiling"], real)
    print(_line("real renders", {name: float(ceiling[name].mean()) for name in METRICS}))
    for text, identity, steps in itertools.product(options.text, options.identity or [None], options.steps):
        settings = {"guidance_scale": text, "identity_guidance_scale": identity, "num_inference_steps": steps}
        began = time.monotonic()
        judged = judge_pictures(judge, len(cases), _pictures(pipe, cases, personas, settings))
        numbers = {name: float(values.mean()) for name, values in score(cases, judged, real).items()}
        row = {**numbers, "seconds": time.monotonic() - began}
        print(json.dumps({**settings, **row}) if options.json else _line(f"{text} {identity} {steps}", row), flush=True)
    return 0


def _pictures(
    pipe: ImaginePipeline, cases: Cases, personas: list[Any], settings: dict[str, Any]
) -> Callable[[int, int], tuple[Tensor, None]]:
    def pictures(start: int, stop: int) -> tuple[Tensor, None]:
        some = range(start, stop)
        drawn = pipe(
            [cases.prompt(case).text for case in some],
            reference=[personas[case // len(cases.prompts)] for case in some],
            generator=[torch.Generator().manual_seed(SEED * 1_000_003 + case) for case in some],
            **settings,
        )
        return torch.stack([to_tensor(image) for image in drawn.images]), None

    return pictures


def _line(name: str, numbers: dict[str, float]) -> str:
    return f"{name:<16}" + "  ".join(f"{key} {value:7.3f}" for key, value in numbers.items())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure scores at several guidance scales on held-out people.")
    parser.add_argument("--weights", default=None, help="weights folder (default: the shipped weights)")
    parser.add_argument("--identities", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=13)
    parser.add_argument("--text", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0], help="guidance scales")
    parser.add_argument(
        "--identity", type=float, nargs="*", default=[], help="identity guidance scales (default: the text's)"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
