"""What a stage trains: the small contract between the loop, which knows no networks, and the tasks, which know no loop.

A task is a class in `train.stages.TASKS`. The loop builds it with `Task(settings, context)`, loads what earlier
stages trained into its modules, moves them to the device, calls `prepare`, and then asks for batches and losses by the
number of images seen. Nothing a task draws may come from a generator that outlives the call: every random number is a
function of (seed, purpose, image number), see `train.data.order`, so that a resumed run equals a straight one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

Share = Annotated[float, Field(ge=0, le=1)]  # for settings: of the images, say
Weight = Annotated[float, Field(ge=0)]  # of one term of a loss among others


@dataclass(frozen=True)
class TaskContext:
    """What a task is told beside its own settings."""

    name: str  # the stage's name
    seed: int  # of everything the task draws: the stage's own, whatever other stages of the run have
    device: torch.device  # where the modules will be once built, and where batches should be made
    folder: Path  # the stage's own folder; caches may live in folder / "cache"
    data: Mapping[str, Any] = field(default_factory=dict)  # the run's shared data settings, not yet checked
    initial: Path | None = None  # a folder of weights whose modules were loaded, if the stage begins with one
    earlier: Mapping[str, Path] = field(default_factory=dict)  # stage in start_from -> the folder it exported to
    trains: Sequence[str] = ()  # the parts that will train
    own_counts: bool = True  # see train.data.sources.Mixture


@dataclass(frozen=True)
class Loss:
    """One loss per sample (batch,), and numbers worth following; a 0-dim tensor spares a GPU the wait a float costs."""

    per_sample: Tensor
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)


class Task(Protocol):
    """One kind of training: a class `Task(settings: Settings, context: TaskContext)`; it need not inherit from this.

    Settings: the pydantic model (frozen, extra="forbid") of the stage's `settings`, checked before any stage starts.
    context: what the task was told.
    PARTS: every part name this task can offer, so that a typo in a stage's `train` is refused in the first second.
    modules: all networks by name, trained and frozen. A module has the same name and keys in every stage that uses it:
        what an earlier stage in `start_from` trained under that name is loaded here, strictly. The constructor only
        builds (torch is seeded before it); it may read sizes or vectors from `context.earlier[stage]`.
    """

    Settings: ClassVar[type[BaseModel]]
    PARTS: ClassVar[tuple[str, ...]]
    context: TaskContext
    modules: dict[str, nn.Module]

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Named groups of parameters a stage may train; no parameter in two groups that train together."""
        ...

    def check(self) -> list[str]:
        """What is odd about settings and data, a sentence each; ConfigError for what can be known to be wrong.

        Called before any stage trains, of networks without numbers (on torch's meta device), and again before
        `prepare`. It may look whether files are there, but not into them, and writes nothing.
        """
        ...

    def prepare(self) -> None:
        """Called once, weights loaded, modules on the device, in eval mode, without gradients: fill caches here."""
        ...

    def batch(self, images_seen: int, size: int) -> Any:
        """Images number images_seen to images_seen + size: a record of tensors (dataclass, dict, tuple or tensor).

        A pure function of (seed, images_seen, size), and each item best one of its own number only (`train.data`), so
        that the pieces of a batch do not depend on accumulation or on the number of processes.
        """
        ...

    def show(self, batch: Any, path: Path) -> None:
        """Save a batch as one sheet of pictures, so that a person can see what is trained on before it is too late."""
        ...

    def loss(self, batch: Any, images_seen: int) -> Loss:
        """Loss of the batch that starts at image number `images_seen`; draws as `batch` does. Called under autocast."""
        ...

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        """Numbers for metrics.jsonl, and picture grids in `folder`; averaged weights, eval mode, no gradients."""
        ...

    def export(self, folder: Path) -> None:
        """Write the final weights to `folder` (empty, exists); averaged weights in place, eval mode."""
        ...
