"""How fast things are here: `make bench`. Prints one line a measurement, or one JSON object with --json.

Times are medians of several runs, after one run that is not counted. They say something about one machine only, so
they are measured here and never asserted in tests.
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
    """Measure everything; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure seconds per picture, cold start and rendering.")
    parser.add_argument("--weights", default=None, help="weights folder (default: the shipped weights)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
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
    """The median time of `work`, in seconds, after one run that is not counted."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def render_batch() -> object:
    """Draw 64 portraits."""
    return render(sample_people(DEMO[:64]), sample_contexts(DEMO[:64]), size=128)


def write_reference(path: Path) -> None:
    """Render one person as a photo."""
    from torchvision.utils import save_image

    drawn = render(sample_people(DEMO[:1]), sample_contexts(DEMO[:1]), size=128)
    save_image(drawn.images[0], path)


def picture_seconds(reference: Path, options: argparse.Namespace) -> float:
    """One photo and a sentence to one picture, the face crop and the encoders included."""
    from imagine import ImaginePipeline

    pipe = ImaginePipeline.from_pretrained(*([options.weights] if options.weights else []))
    pipe.set_progress_bar_config(disable=True)
    return seconds(lambda: pipe(PROMPT, reference=str(reference)), options.runs)


def cold_seconds(reference: Path, options: argparse.Namespace) -> float:
    """The whole command in a new process: start Python, load, draw, save."""
    command = [sys.executable, "-m", "imagine.cli", "generate", "--reference", str(reference), "--prompt", PROMPT]
    command += [
        "--output",
        str(reference.with_name("out.png")),
        *(["--weights", options.weights] if options.weights else []),
    ]
    return seconds(lambda: subprocess.run(command, check=True, capture_output=True), min(options.runs, 3))


if __name__ == "__main__":
    sys.exit(main())
