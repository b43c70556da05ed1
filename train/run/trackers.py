"""Send a run's numbers and pictures to experiment trackers: TensorBoard, and optionally Weights & Biases (W&B).

Both receive them under STAGE/NAME, over the images that the stage has seen. That number starts at 0 in every stage, and
decreases when a run returns to a checkpoint. W&B drops values that are not later than its last step, so W&B counts its
own steps and gets the images seen as an axis. All starts of a run belong to one W&B run.
"""

import importlib.util
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from train.config import Run
from train.run.checkpoint import replacing

PROJECT = "imagine"
_AXIS = "images_seen"


class Wandb(GeneralTracker):
    """A run on Weights & Biases. It works offline unless WANDB_MODE=online is set in the environment."""

    name = "wandb"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, run: Run, output: Path) -> None:
        super().__init__()
        self.settings, self.output = run, output
        self.run: Any = None

    def start(self) -> None:
        """Start the W&B run, or resume it."""
        import wandb

        folder = self.output / "tracking"
        self.run = wandb.init(
            project=PROJECT, name=self.output.name, id=_id(folder / "wandb-id"), resume="allow", dir=str(folder),
            mode=os.environ.get("WANDB_MODE", "offline"), config=self.settings.model_dump(mode="json"),
        )  # fmt: skip
        for stage in self.settings.stages:
            self.run.define_metric(f"{stage}/{_AXIS}")
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/{_AXIS}")

    @property
    def tracker(self) -> Any:
        """The run object of wandb."""
        return self.run

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Log numbers under STAGE/NAME, with `step` images seen."""
        axes = {f"{name.split('/')[0]}/{_AXIS}": step for name in values}
        self.run.log({**values, **axes})

    def log_images(self, values: Mapping[str, list[Image.Image]], step: int | None = None) -> None:
        """Log pictures under STAGE/NAME, with `step` images seen."""
        import wandb

        self.log({name: [wandb.Image(picture) for picture in pictures] for name, pictures in values.items()}, step)

    def finish(self) -> None:
        """End the W&B run."""
        self.run.finish()


def installed(run: Run, output: Path) -> list[str | GeneralTracker]:
    """Return the run's trackers that are installed, in the form that accelerate accepts."""
    names = set(run.trackers) - set(missing(run))
    return [Wandb(run, output) if name == "wandb" else name for name in sorted(names)]


def missing(run: Run) -> list[str]:
    """Return the names of the run's trackers that are not installed."""
    return [name for name in sorted(set(run.trackers)) if not importlib.util.find_spec(name)]


@contextmanager
def tracked(accelerator: Accelerator, output: Path) -> Iterator[None]:
    """Start the trackers for the block, and finish them after it."""
    if accelerator.log_with:
        (output / "tracking").mkdir(exist_ok=True)
    accelerator.init_trackers(PROJECT)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


def show(accelerator: Accelerator, pictures: Mapping[str, Path], images_seen: int) -> None:
    """Log picture files to the trackers; `pictures` maps a tag to a file."""
    if not accelerator.trackers:
        return
    opened = {name: Image.open(path).convert("RGB") for name, path in pictures.items()}
    for tracker in accelerator.trackers:
        if isinstance(tracker, Wandb):
            tracker.log_images({name: [picture] for name, picture in opened.items()}, images_seen)
        else:
            grids = {name: np.asarray(picture)[None] for name, picture in opened.items()}
            tracker.log_images(grids, images_seen, dataformats="NHWC")


def _id(path: Path) -> str:
    """Return the run's W&B id, created at random on the first call."""
    if not path.exists():
        with replacing(path) as draft:
            draft.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return path.read_text(encoding="utf-8")
