"""Measure the speed of rendering, drawing and a cold start: `make bench`.

Print one line per measurement, or one JSON object with --json. Times are medians of several runs, after one run to warm
up. They depend on the machine, so no test asserts them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from imagine.world import render, sample_contexts, sample_people
from imagine.world.seeds import DEMO

PROMPT = "smiling, on a beach"


def main() -> int:
    """Measure everything and return the exit code."""
    parser = argparse.ArgumentParser(description="Measure seconds per picture, cold start and rendering.")
    parser.add_argument("--weights", default=None, help="folder of weights (default: the shipped weights)")
    parser.add_argument("--runs", type=int, default=5, help="runs to take the median of (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.png"
        write_reference(reference)
        numbers = {
            "rendered pictures per second (128 px, batches of 64)": round(64 / seconds(render_batch, options.runs), 1),
            "seconds for one picture, pipeline loaded": round(picture_seconds(reference, options), 2),
            "seconds for one cold `imagine generate`": round(cold_seconds(reference, options), 2),
        }
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), **numbers}))
    else:
        print(f"{torch.get_num_threads()} threads")
        print("\n".join(f"{value:>10}  {name}" for name, value in numbers.items()))
    return 0


def seconds(work: Callable[[], object], runs: int) -> float:
    """Return the median time of `work` in seconds, after one run to warm up."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def render_batch() -> object:
    """Render 64 portraits."""
    return render(sample_people(DEMO[:64]), sample_contexts(DEMO[:64]), size=128)


def write_reference(path: Path) -> None:
    """Render one person as a photo."""
    from torchvision.utils import save_image

    drawn = render(sample_people(DEMO[:1]), sample_contexts(DEMO[:1]), size=128)
    save_image(drawn.images[0], path)


def picture_seconds(reference: Path, options: argparse.Namespace) -> float:
    """Return the seconds for one picture from a photo and a prompt, the face crop and the encoders included."""
    from imagine import ImaginePipeline

    pipe = ImaginePipeline.from_pretrained(*([options.weights] if options.weights else []))
    pipe.set_progress_bar_config(disable=True)
    return seconds(lambda: pipe(PROMPT, reference=str(reference)), options.runs)


def cold_seconds(reference: Path, options: argparse.Namespace) -> float:
    """Return the seconds for the whole command in a new process: start Python, load, draw and save."""
    command = [sys.executable, "-m", "imagine", "generate", "--reference", str(reference), "--prompt", PROMPT]
    command += [
        "--output",
        str(reference.with_name("out.png")),
        *(["--weights", options.weights] if options.weights else []),
    ]
    return seconds(lambda: subprocess.run(command, check=True, capture_output=True), min(options.runs, 3))


if __name__ == "__main__":
    sys.exit(main())
