"""Measure the speed of adapter training against a loop without caches, and profile a step: `make bench-train`.

All loops train the same parts of the same networks on the same pairs with the same optimiser. "Ours" is a stage of the
trainer, in the precision that the trainer chooses on this machine (or `--precision`), compiled with `--compile`. The
"plain" loop works like IP-Adapter's training script: in every step it reads and encodes each picture file, and it
tokenises each caption and encodes it with the frozen text encoders. It runs in both precisions, and ours is compared
with the faster one. The loops alternate in one process, so that other load on the machine slows all of them alike.
Times are valid for one machine only, so tests never assert them.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from imagine.networks.diffusion import add_noise, logit_normal, velocity
from imagine.networks.weights import default_folder
from imagine.people.faces import crop_faces
from imagine.pipeline.sampling import pooled_text
from imagine.records import Conditioning
from train.config import Stage
from train.initial_weights import load_initial
from train.loop import StageRun
from train.run import parts
from train.run.ema import Average
from train.task import TaskContext
from train.tasks.adapter import AdapterSettings, AdapterTask

TRAIN = {"vision_encoder": 1e-4, "vision_branch": 6e-4, "vision_projection": 4e-4, "lora": 1e-3}
PEOPLE = 128


def main() -> int:
    """Measure all loops and the parts of their steps, print the report, and return the exit code."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        task = build_task(Path(folder), options.widths)
        ours = TrainersLoop(task, options, Path(folder) / "run")
        plain = {
            f"plain {name}": PlainLoop(task, options.batch, name, Path(folder) / name) for name in ("fp32", "bf16")
        }
        for number in range(0, PEOPLE, options.batch):  # fills the caption cache, as a run's first minutes do
            task.batch(number, options.batch)
        loops: dict[str, TrainersLoop | PlainLoop] = {"ours": ours, **plain}
        times = time_interleaved(loops, options)
        shares = {name: loop.clock.shares() for name, loop in loops.items()}
    seconds = {name: statistics.median(some) for name, some in times.items()}
    speeds = {name: [options.batch / some for some in loop] for name, loop in times.items()}
    fastest = min(plain, key=lambda name: seconds[name])
    report = {
        "threads": torch.get_num_threads(), "precision": ours.precision, "compiled": options.compile,
        "batch": options.batch, "steps": options.steps,
        "images_per_second": {name: round(options.batch / median, 1) for name, median in seconds.items()},
        "spread": {name: [round(min(some), 1), round(max(some), 1)] for name, some in speeds.items()},
        "against": fastest, "ratio": round(seconds[fastest] / seconds["ours"], 2),
        "step": shares,
    }  # fmt: skip
    print(json.dumps(report) if options.json else _formatted(report))
    return 0


def time_interleaved(loops: "Mapping[str, TrainersLoop | PlainLoop]", options: Any) -> dict[str, list[float]]:
    """Return the seconds of each loop's steps, without the warm-up steps."""
    unmeasured = 4 if options.compile else 1  # more with --compile, because each new caption length compiles again
    times: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(unmeasured + options.steps):
        for name, loop in loops.items():
            if number == unmeasured:
                loop.clock.seconds.clear()
            began = time.perf_counter()
            loop.step(number * options.batch)
            times[name].append(time.perf_counter() - began)
    return {name: some[unmeasured:] for name, some in times.items()}


def build_task(folder: Path, widths: tuple[int, ...]) -> AdapterTask:
    """Build the adapter's task like a run does, on `PEOPLE` newly rendered people, with the shipped encoders."""
    torch.manual_seed(0)
    data = {"folder": str(folder / "data"), "identities": PEOPLE, "pictures": 2}
    settings = AdapterSettings(widths=widths, middle_attention=False)
    context = TaskContext("adapter", 0, torch.device("cpu"), folder, data, default_folder())
    task = AdapterTask(settings, context)
    encoders = ("image_encoder", "text_encoder", "text_encoder_2", "text_encoder_3")
    load_initial({name: task.modules[name] for name in encoders}, default_folder())
    parts.freeze_all_but(task.modules, {})
    with torch.no_grad():
        task.prepare()
    return task


class Clock:
    """Accumulate the seconds of each part of the steps; the time of a nested part does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within = 0.0  # seconds of the parts nested in the current one

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Add the block's time to the part `name`."""
        began, outside, self._within = time.perf_counter(), self._within, 0.0
        yield
        took = time.perf_counter() - began
        self.seconds[name] = self.seconds.get(name, 0.0) + took - self._within
        self._within = outside + took

    def shares(self) -> dict[str, float]:
        """Return each part's share of the total time."""
        total = sum(self.seconds.values())
        return {name: round(seconds / total, 3) for name, seconds in self.seconds.items()}


class TrainersLoop:
    """The trainer's own loop, with the stage, the stage run and the batches of `python -m train`."""

    def __init__(self, task: AdapterTask, options: Any, folder: Path) -> None:
        folder.mkdir(parents=True)
        given = {"task": "adapter", "train": TRAIN, "images": 10**9, "batch_size": options.batch, "ema": 1_500}
        given |= {"precision": options.precision, "compile": options.compile, "report_every_seconds": 1e9}
        stage = Stage.model_validate(given)
        self.clock, self.task = Clock(), task
        self.stage_run = StageRun("adapter", stage, task, folder, Accelerator(cpu=True))
        self.precision = self.stage_run.state.precision
        self.micro_batches = self.stage_run.micro_batches()

    def step(self, _: int) -> None:
        """Run one optimiser step and time its parts."""
        timed = [(self.task, "batch", "data"), (self.task, "vision_tokens", "vision encoder")]
        timed += [(self.task, "prediction", "denoiser"), (self.stage_run.accelerator, "backward", "backward")]
        for where, method, name in timed:
            setattr(where, method, self._on(name, getattr(where, method)))
        with self.clock.on("optimiser, average and the rest"):
            self.stage_run.step(self.micro_batches)
        for where, method, _name in timed:
            delattr(where, method)

    def _on(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            with self.clock.on(name):
                return function(*given, **named)

        return timed


class PlainLoop:
    """A loop like IP-Adapter's training script: every step opens the files and encodes pictures and captions."""

    def __init__(self, task: AdapterTask, batch: int, precision: str, folder: Path) -> None:
        self.task, self.batch, self.half, self.clock = task, batch, precision == "bf16", Clock()
        chosen = parts.choose(task.parts(), TRAIN, "adapter")
        self.parameters = parts.named(task.modules, chosen)
        self.optimiser = parts.optimiser(chosen, TRAIN, (0.9, 0.99), 0.01)
        self.average = Average(self.parameters, 1_500)
        self.folder, gallery_cache = folder, task.gallery_caches["train"]
        self.gallery = gallery_cache.pictures.gallery
        folder.mkdir(parents=True)
        rows = torch.arange(len(self.gallery))
        images, self.boxes = gallery_cache.pictures.take(rows)
        for row, image in enumerate(images):
            Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(folder / f"{row}.png")

    def step(self, number: int) -> None:
        """Run one optimiser step on `batch` images, without compilation."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half), torch.compiler.set_stance("force_eager"):
            loss = self._loss(number)
        with self.clock.on("backward"):
            torch.autograd.backward(loss)
        with self.clock.on("optimiser, average and the rest"):
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.average.update(number + self.batch, self.batch)

    def _read(self, rows: Tensor) -> Tensor:
        files = [self.folder / f"{row}.png" for row in rows.tolist()]
        pixels = [np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 255 for file in files]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

    def _loss(self, number: int) -> Tensor:
        task, size = self.task, self.batch
        with self.clock.on("data"), torch.no_grad():
            drawn = task.mixture.draw(0, number, size)
            targets, references = self._read(drawn.targets), self._read(drawn.references)
            crops = crop_faces(references, self.boxes[drawn.references], task.crop_side())
            captions = self.gallery.captions(drawn.targets, drawn.caption_styles)
        with self.clock.on("autoencoder"), torch.no_grad():
            clean = task.codec.encode(targets * 2 - 1)
        with self.clock.on("text encoders"), torch.no_grad():
            clip, branches = task.text.encode(captions)
        with self.clock.on("vision encoder"):
            vision = task.vision_tokens(crops.unsqueeze(1))
        with self.clock.on("denoiser"):
            noise, t = torch.randn_like(clean), logit_normal(torch.randn(size))
            prediction = task.unet(
                add_noise(clean, noise, t), t * 1000, encoder_hidden_states=clip.values,
                encoder_attention_mask=clip.mask, class_labels=pooled_text(task.unet, clip, branches),
                cross_attention_kwargs={"conditioning": Conditioning({**branches, "vision": vision})},
            ).sample  # fmt: skip
            target = velocity(clean, noise)
            return torch.nn.functional.mse_loss(prediction, target)


def _formatted(report: dict[str, Any]) -> str:
    how = f"{report['precision']}{', ours compiled' if report['compiled'] else ''}"
    lines = [
        f"{report['threads']} threads, batches of {report['batch']}, {how}, median of {report['steps']} steps each"
    ]
    for name in report["step"]:
        low, high = report["spread"][name]
        lines.append(f"{name:<11} {report['images_per_second'][name]:>7} images/s  ({low} to {high})")
        lines += [f"         {share:>6.1%}  {part}" for part, share in report["step"][name].items()]
    return "\n".join([*lines, f"ours is {report['ratio']} times as fast as {report['against']}"])


def _options() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="precision of ours (auto: as the trainer)"
    )
    parser.add_argument("--compile", action="store_true", help="run ours with `compile: true`, as for a long stage")
    parser.add_argument("--widths", type=int, nargs="+", default=(128, 192))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
