"""Measure how each call-time control changes likeness, prompt score and face sharpness with the shipped weights.

    .venv/bin/python benchmarks/controls.py --identities 8 --steps 12
    .venv/bin/python benchmarks/controls.py --faces --identities 12 --output out/controls

The first command draws the same people, sentences and noise with each control. The second command draws half-body
pictures with and without a second pass over their small faces. The people differ from those that `imagine evaluate`
uses by default.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagine.evaluation import report
from imagine.evaluation.cases import Cases, JudgedReal, judge_pictures, judge_real_pictures, make_cases
from imagine.evaluation.judge import Judge, boxes_by
from imagine.evaluation.scores import score
from imagine.evaluation.suites import PORTRAITS
from imagine.networks.weights import default_folder
from imagine.people.faces import crop_unmasked, default_finder, sharpness
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.pipeline.second_pass import RefineFaces
from imagine.world import render

SEED = 5
SENTENCES = tuple(PORTRAITS[number] for number in (0, 3, 4))  # laughing; on a beach; a red hoodie
HALF_BODY = tuple(prompt for prompt in PORTRAITS if prompt.asked.get("framing") == "half body")
CONTROLS: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "no person": {"identity_scale": 0.0},
    **{f"window {a}:{b}": {"identity_window": (a, b)} for a, b in ((0, 0.5), (0, 0.8), (0.2, 1), (0.5, 1))},
    **{f"blocks {name}": {"identity_blocks": name} for name in ("coarse", "fine", "down", "up")},
    "guidance 5, 5 balanced": {"guidance_scale": 5.0, "guidance_balance": True},
    "guidance 5, 3": {"guidance_scale": 5.0, "identity_guidance_scale": 3.0},
    "guidance 5, 3 balanced": {"guidance_scale": 5.0, "identity_guidance_scale": 3.0, "guidance_balance": True},
    "guidance 5, 8": {"guidance_scale": 5.0, "identity_guidance_scale": 8.0},
    "guidance 5, 8 balanced": {"guidance_scale": 5.0, "identity_guidance_scale": 8.0, "guidance_balance": True},
}
SECOND_PASSES: dict[str, Mapping[str, Any]] = {
    "plain": {},
    **{f"refined {level}": {"refine_faces": RefineFaces(strength=level)} for level in (0.3, 0.5, 0.7)},
}


def main() -> int:
    """Draw and judge the pictures of every setting, print one line each, and return the exit code."""
    options = _options()
    judge, pipe = Judge.from_pretrained(), ImaginePipeline.from_pretrained(options.weights)
    pipe.set_progress_bar_config(disable=True)
    prompts, settings = (HALF_BODY, SECOND_PASSES) if options.faces else (SENTENCES, CONTROLS)
    cases = make_cases(prompts, options.identities, SEED, gallery=options.identities)
    real = judge_real_pictures(cases, judge)
    photos = render(cases.people[: cases.identities], cases.references).images
    personas = [pipe.enroll([report.to_pil(photo)], on_no_face="whole") for photo in photos]
    drawn: dict[str, Tensor] = {}
    for name, setting in settings.items():
        if options.only and not any(name.startswith(only) for only in options.only):
            continue
        began = time.monotonic()
        drawn[name], refined = _draw(pipe, cases, personas, {**setting, "num_inference_steps": options.steps})
        numbers = _judged(judge, cases, real, drawn[name], drawn["plain"])
        seconds = (time.monotonic() - began) / len(cases)
        print(_line(name, {**numbers, "refined": refined, "seconds": seconds}), flush=True)
    if options.output:
        _sheet(options.output, cases, photos, drawn)
    return 0


def _draw(pipe: ImaginePipeline, cases: Cases, personas: list[Any], setting: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Return the pictures of all cases (cases, 3, H, W), and the number of refined faces."""
    parts, refined = [], 0
    for start in range(0, len(cases), 12):
        some = range(start, min(start + 12, len(cases)))
        out = pipe(
            [cases.prompt(case).text for case in some],
            reference=[personas[case // len(cases.prompts)] for case in some],
            generator=[torch.Generator().manual_seed(SEED * 1_000_003 + case) for case in some],
            output_type="pt",
            **{"refine_faces": False, **setting},
        )
        parts.append(out.images)
        refined += out.refined
    return torch.cat(parts), refined


def _judged(judge: Judge, cases: Cases, real: JudgedReal, drawn: Tensor, plain: Tensor) -> dict[str, float]:
    """Return the mean scores over all pictures.

    The face boxes come from the plain pictures, so that every setting is measured at the same place.
    """
    boxes = boxes_by(default_finder(default_folder() / "finder"))(plain)
    judged = judge_pictures(judge, len(cases), lambda start, stop: (drawn[start:stop], boxes[start:stop]))
    numbers = {name: float(values.mean()) for name, values in score(cases, judged, real).items() if name != "rank1"}
    crops = crop_unmasked(drawn, boxes, 64)
    numbers["sharpness"] = sum(map(sharpness, crops)) / len(crops)
    return numbers


def _sheet(output: Path, cases: Cases, photos: Tensor, drawn: Mapping[str, Tensor]) -> None:
    """Save a contact sheet with one row per case, for the first 8 cases: the reference, then every setting."""
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in range(min(len(cases), 8)):
        pictures = [photos[case // len(cases.prompts)], *(each[case] for each in drawn.values())]
        rows.append([report.Cell(report.to_pil(picture)) for picture in pictures])
    report.contact_sheet(["reference", *drawn], rows, side=128).save(output / "controls.png")


def _line(name: str, numbers: Mapping[str, float]) -> str:
    return f"{name:<24}" + "  ".join(f"{key} {value:7.4f}" for key, value in numbers.items())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure how each call-time control changes likeness and prompt score."
    )
    parser.add_argument("--weights", default=None, help="weights folder (default: the shipped weights)")
    parser.add_argument("--identities", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--faces", action="store_true", help="measure the second pass over small faces instead")
    parser.add_argument(
        "--only", nargs="*", default=[], help="run only settings whose names start with one of these; include plain"
    )
    parser.add_argument("--output", type=Path, help="folder for a contact sheet")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
