"""How fast the adapter trains against a loop that keeps nothing, and where a step's time goes: `make bench-train`.

Both loops train the same parts of the same networks on the same pairs with the same optimiser. The plain loop works as
IP-Adapter's training script does: each picture is read from its file and encoded, and each caption tokenised and read
by the frozen text encoders, at every step. Both compute in the precision that the trainer would choose here (or in
`--precision`); what the trainer does about it (attention as products in bf16 on a CPU, `compile: true` with
`--compile`) only ours does. They take turns in one process, so that a busy machine slows both alike.
Times say something about one machine only, so they are measured here and never asserted in tests.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imagine.diffusion import add_noise, logit_normal, velocity
from imagine.faces import crop_faces
from imagine.records import Conditioning
from imagine.sampling import pooled_text
from imagine.weights import default_folder
from train import parts
from train.ema import Average
from train.initial import load_initial
from train.loop import plain_attention
from train.report import faster_precision
from train.task import Start
from train.task_adapter import AdapterSettings, AdapterTask

TRAIN = {"vision_encoder": 1e-4, "vision_branch": 6e-4, "vision_projection": 4e-4, "lora": 1e-3}
PEOPLE = 128


def main() -> int:
    """Measure both loops in turns and one step in parts; returns the exit code."""
    options = _options()
    precision = faster_precision(torch.device("cpu"))[0] if options.precision == "auto" else options.precision
    with tempfile.TemporaryDirectory() as folder:
        task = build_task(Path(folder), options.widths)
        ours = KeepingLoop(task, options.batch, precision == "bf16", options.compile)
        plain = PlainLoop(task, options.batch, precision == "bf16", Path(folder) / "files")
        for number in range(0, PEOPLE, options.batch):  # every caption once, as after a run's first minutes
            task.batch(number, options.batch)
        times = take_turns({"ours": ours, "plain": plain}, options)
        shares = {"ours": ours.shares(), "plain": plain.shares()}
    speeds = {name: [options.batch / seconds for seconds in some] for name, some in times.items()}
    report = {
        "threads": torch.get_num_threads(), "precision": precision, "compiled": options.compile,
        "batch": options.batch, "steps": options.steps,
        "images_per_second": {name: round(statistics.median(some), 1) for name, some in speeds.items()},
        "spread": {name: [round(min(some), 1), round(max(some), 1)] for name, some in speeds.items()},
        "ratio": round(statistics.median(times["plain"]) / statistics.median(times["ours"]), 2),
        "step": shares,
    }  # fmt: skip
    print(json.dumps(report) if options.json else _words(report))
    return 0


def take_turns(loops: Mapping[str, "Loop"], options: Any) -> dict[str, list[float]]:
    """Seconds of each loop's steps, after some that do not count."""
    unmeasured = 4 if options.compile else 1  # sentences of other lengths are compiled for again
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
    """The adapter's task as a run builds it, on `PEOPLE` freshly rendered people, with the shipped encoders."""
    torch.manual_seed(0)
    data = {"folder": str(folder / "data"), "identities": PEOPLE, "pictures": 2}
    settings = AdapterSettings(widths=widths, middle_attention=False)
    start = Start("adapter", 0, torch.device("cpu"), folder, data, default_folder())
    task = AdapterTask(settings, start)
    encoders = ("image_encoder", "text_encoder", "text_encoder_2", "text_encoder_3")
    load_initial({name: task.modules[name] for name in encoders}, default_folder())
    parts.freeze_all_but(task.modules, {})
    with torch.no_grad():
        task.prepare()
    return task


class Clock:
    """Seconds spent on each part of the steps so far."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Count the block's time as `name`."""
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def shares(self) -> dict[str, float]:
        """Part -> share of all time counted."""
        total = sum(self.seconds.values())
        return {name: round(seconds / total, 3) for name, seconds in self.seconds.items()}


class Loop(ABC):
    """What both loops do alike: gradients, optimiser and average of the same parts."""

    def __init__(self, task: AdapterTask, batch: int, half: bool) -> None:
        self.task, self.batch, self.half, self.clock = task, batch, half, Clock()
        chosen = parts.choose(task.parts(), TRAIN, "adapter")
        self.training = parts.freeze_all_but(task.modules, chosen)
        self.parameters = parts.named(task.modules, chosen)
        self.optimiser = parts.optimiser(chosen, TRAIN, (0.9, 0.99), 0.01)
        self.average = Average(self.parameters, 1_500)
        parts.train_mode(task.modules, self.training)

    @abstractmethod
    def loss(self, number: int) -> Tensor:
        """The loss of the images that begin at `number`."""

    def step(self, number: int) -> None:
        """One optimiser step on `batch` images."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            loss = self.loss(number)
        with self.clock.on("backward"):
            torch.autograd.backward(loss)
        with self.clock.on("optimiser and average"):
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.average.update(number + self.batch, self.batch)

    def shares(self) -> dict[str, float]:
        """Part of a step -> its share of the time."""
        return self.clock.shares()


class KeepingLoop(Loop):
    """Ours: latents, face squares and caption tokens come from disk, made once; attention as the trainer has it."""

    def __init__(self, task: AdapterTask, batch: int, half: bool, compiled: bool) -> None:
        super().__init__(task, batch, half)
        if compiled:
            task.unet.compile()

    def loss(self, number: int) -> Tensor:
        task = self.task
        with self.clock.on("data"), torch.no_grad():
            batch = task.batch(number, self.batch)
            noise, t = task.noise(batch.latents, 0, number)
        with plain_attention() if self.half else ExitStack():
            return self._learn(batch, noise, t)

    def _learn(self, batch: Any, noise: Tensor, t: Tensor) -> Tensor:
        task = self.task
        with self.clock.on("vision encoder"):
            vision = task.vision_tokens(batch.crops)
        with self.clock.on("denoiser"):
            guess = task.guess(batch, vision, noise, t)
            return task.error(guess, velocity(batch.latents, noise), batch.faces).mean()


class PlainLoop(Loop):
    """As IP-Adapter's script: files are opened, pictures and captions encoded, at every step."""

    def __init__(self, task: AdapterTask, batch: int, half: bool, folder: Path) -> None:
        super().__init__(task, batch, half)
        self.folder, stock = folder, task.stocks["train"]
        self.gallery = stock.pictures.gallery
        folder.mkdir(parents=True)
        rows = torch.arange(len(self.gallery))
        images, self.boxes = stock.pictures.take(rows)
        for row, image in enumerate(images):
            Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(folder / f"{row}.png")

    def _read(self, rows: Tensor) -> Tensor:
        files = [self.folder / f"{row}.png" for row in rows.tolist()]
        pixels = [np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 255 for file in files]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

    def loss(self, number: int) -> Tensor:
        task, size = self.task, self.batch
        with self.clock.on("data"), torch.no_grad():
            drawn = task.mixture.draw(0, number, size)
            targets, references = self._read(drawn.targets), self._read(drawn.references)
            crops = crop_faces(references, self.boxes[drawn.references], task.crop_side())
            captions = self.gallery.captions(drawn.targets, drawn.manners)
        with self.clock.on("autoencoder"), torch.no_grad():
            clean = task.codec.encode(targets * 2 - 1)
        with self.clock.on("text encoders"), torch.no_grad():
            clip, branches = task.text.encode(captions)
        with self.clock.on("vision encoder"):
            vision = task.vision_tokens(crops)
        with self.clock.on("denoiser"), torch.compiler.set_stance("force_eager"):
            noise, t = torch.randn_like(clean), logit_normal(torch.randn(size))
            guess = task.unet(
                add_noise(clean, noise, t), t * 1000, encoder_hidden_states=clip.values,
                encoder_attention_mask=clip.mask, class_labels=pooled_text(task.unet, clip, branches),
                cross_attention_kwargs={"conditioning": Conditioning({**branches, "vision": vision})},
            ).sample  # fmt: skip
            wanted = velocity(clean, noise)
            return torch.nn.functional.mse_loss(guess, wanted)


def _words(report: dict[str, Any]) -> str:
    how = f"{report['precision']}{', ours compiled' if report['compiled'] else ''}"
    lines = [
        f"{report['threads']} threads, batches of {report['batch']}, {how}, median of {report['steps']} steps each"
    ]
    for name in ("ours", "plain"):
        low, high = report["spread"][name]
        lines.append(f"{name:<6} {report['images_per_second'][name]:>7} images/s  ({low} to {high})")
        lines += [f"         {share:>6.1%}  {part}" for part, share in report["step"][name].items()]
    return "\n".join([*lines, f"ours is {report['ratio']} times as fast"])


def _options() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: as the trainer")
    parser.add_argument("--compile", action="store_true", help="ours with `compile: true`, as a long stage would have")
    parser.add_argument("--widths", type=int, nargs="+", default=(128, 192))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
