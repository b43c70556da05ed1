"""Who else is told a run's numbers and pictures: TensorBoard, and Weights & Biases if it is asked for.

Both are told them under STAGE/NAME, against the images that the stage has seen. Those begin anew with every stage, and
go back with a run that goes back to a checkpoint; W&B drops what is not later than its last step, so it counts steps of
its own and is told the images seen as an axis. All sittings of a run are one W&B run.
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
    """A run on Weights & Biases. It stays off the network unless WANDB_MODE=online is in the environment."""

    name = "wandb"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, run: Run, output: Path) -> None:
        super().__init__()
        self.settings, self.output = run, output
        self.run: Any = None

    def start(self) -> None:
        """Begin the run, or go on with it."""
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
        """W&B's own run."""
        return self.run

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Numbers under STAGE/NAME at so many images seen."""
        axes = {f"{name.split('/')[0]}/{_AXIS}": step for name in values}
        self.run.log({**values, **axes})

    def log_images(self, values: Mapping[str, list[Image.Image]], step: int | None = None) -> None:
        """Pictures under STAGE/NAME at so many images seen."""
        import wandb

        self.log({name: [wandb.Image(picture) for picture in pictures] for name, pictures in values.items()}, step)

    def finish(self) -> None:
        """All is told."""
        self.run.finish()


def installed(run: Run, output: Path) -> list[str | GeneralTracker]:
    """The trackers of the run, as accelerate takes them, but for those that are not installed."""
    names = set(run.trackers) - set(missing(run))
    return [Wandb(run, output) if name == "wandb" else name for name in sorted(names)]


def missing(run: Run) -> list[str]:
    """The trackers of the run that are not installed."""
    return [name for name in sorted(set(run.trackers)) if not importlib.util.find_spec(name)]


@contextmanager
def tracked(accelerator: Accelerator, output: Path) -> Iterator[None]:
    """The trackers listen for the block."""
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
    """Tell the trackers of picture files, by the names they are to have there."""
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
    """The run's name in W&B's books, made up once."""
    if not path.exists():
        with replacing(path) as draft:
            draft.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return path.read_text(encoding="utf-8")
