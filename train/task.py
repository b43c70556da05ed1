"""The contract between the training loop, which is independent of the networks, and the tasks, which define the losses.

A task is a class in `train.stages.TASKS`. The trainer builds it with `Task(settings, context)`, loads the weights of
earlier stages into its modules, moves them to the device and calls `prepare`; the loop then requests batches and losses
by the number of images seen. A task must not draw from a generator that outlives the call: every random number is a
function of (seed, purpose, image number), see `train.data.order`, so that a resumed run equals an uninterrupted one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

Share = Annotated[float, Field(ge=0, le=1)]  # type of settings: a share, for example of the images
Weight = Annotated[float, Field(ge=0)]  # type of settings: the weight of one term of a loss


@dataclass(frozen=True)
class TaskContext:
    """The stage's environment, passed to a task beside its own settings."""

    name: str  # the stage's name
    seed: int  # seed of all random numbers of the task; differs from stage to stage
    device: torch.device  # device of the modules after building, and of the batches
    folder: Path  # the stage's folder; caches may be written to folder / "cache"
    data: Mapping[str, Any] = field(default_factory=dict)  # the run's shared data settings, not yet checked
    initial: Path | None = None  # the folder of initial weights, if the stage has one
    earlier: Mapping[str, Path] = field(default_factory=dict)  # stage in start_from -> the folder of its export
    trains: Sequence[str] = ()  # the parts that will train
    own_counts: bool = True  # whether each source counts its own images; see train.data.sources.Mixture

    @property
    def places_of_tokenizers(self) -> list[Path]:
        """Folders that may hold the tokenizers of the initial weights; the last one that holds some counts."""
        initial = [] if self.initial is None else [self.initial]
        return [*initial, *(export.parent / "cache" for export in self.earlier.values())]


@dataclass(frozen=True)
class Loss:
    """One loss per sample (batch,), and metrics. Prefer 0-dim tensors: a float makes the CPU wait for the GPU."""

    per_sample: Tensor
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)


class Task(Protocol):
    """A kind of training: a class `Task(settings: Settings, context: TaskContext)`; it need not inherit from this one.

    Settings: the pydantic model (frozen, extra="forbid") of the stage's `settings`, checked before any stage starts.
    context: the context that was passed to the constructor.
    PARTS: every part name that the task can offer, so that a typo in a stage's `train` is an error before it starts.
    modules: all networks by name, trained and frozen. A module has the same name and keys in every stage that uses it:
        the weights that an earlier stage in `start_from` trained under that name are loaded here, strictly. The
        constructor only builds (torch is seeded before it); it may read sizes or vectors from `context.earlier[stage]`.
    """

    Settings: ClassVar[type[BaseModel]]
    PARTS: ClassVar[tuple[str, ...]]
    context: TaskContext
    modules: dict[str, nn.Module]

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the groups of parameters that a stage may train, by name; groups trained together must not overlap."""
        ...

    def check(self) -> list[str]:
        """Return warnings about settings and data, one sentence each; ConfigError for a mistake.

        Called before any stage trains, with networks without weights (on torch's meta device), and again before
        `prepare`. It may test whether files exist, but must not read or write files.
        """
        ...

    def prepare(self) -> None:
        """Fill the caches. Called once, with loaded weights, modules on the device, eval mode and no gradients."""
        ...

    def batch(self, images_seen: int, size: int) -> Any:
        """Return images number images_seen to images_seen + size as tensors (dataclass, dict, tuple or tensor).

        A pure function of (seed, images_seen, size). Each item should depend only on its own number (`train.data`), so
        that micro-batches do not depend on accumulation or on the number of processes.
        """
        ...

    def show(self, batch: Any, path: Path) -> None:
        """Save a batch as one sheet of pictures, so that a person can check the data before the training."""
        ...

    def loss(self, batch: Any, images_seen: int) -> Loss:
        """Return the loss of the batch that starts at image `images_seen`, seeded as `batch` is; under autocast."""
        ...

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        """Return numbers for metrics.jsonl and save picture grids in `folder`, with averaged weights, in eval mode."""
        ...

    def export(self, folder: Path) -> None:
        """Write the final weights to the empty folder `folder`; the modules hold the averaged weights, in eval mode."""
        ...
