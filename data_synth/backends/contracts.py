"""The interfaces between the steps of a build and their models, one per kind of backend.

Because of these interfaces, one line of the build file replaces the model of a step.

Every backend is a class `Backend(settings)`. `Settings` is its frozen pydantic model, which rejects unknown keys. The
constructor must be cheap: models load in `load()`, which runs once in each process that uses the backend. Every call
takes a list and returns a list of the same length and order. The results must not depend on how a list is split into
batches, so random numbers come from the seeds of the records. An item that fails must not affect the others: the
backend returns `Failed(reason, sentence)` in its place.

The store saves a result under a hash of `identity`, the settings and the inputs, so a build repeats only what changed.
A setting that does not change results (batch size, device, address, timeouts) is marked `Field(..., exclude=True)` in
`Settings`. pydantic then omits it from `model_dump()`, and so it is not part of the hash.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel

from data_synth.records import Candidate, Measures, Reference, Rejection, TargetSpec


@dataclass(frozen=True)
class Failed:
    """One item that a backend could not process."""

    reason: str  # a fixed short text, used for counting
    sentence: str = ""  # details for the reader
    # True: the backend failed and not the item (an endpoint that is down), so a later build tries it again
    for_now: bool = False


@dataclass(frozen=True)
class Target:
    """The input of a rewriter: a caption and the attribute values that the rewritten caption should describe.

    The values are assigned so that the whole build meets the wished distribution.
    """

    reference: Reference
    caption: str  # the dense caption of the reference
    aims: Mapping[str, str]  # {"expression": "smiling", "gaze": "left", "scene": "beach", ...}
    seed: int


@dataclass(frozen=True)
class Draft:
    """A candidate to refine or measure, with its reference and target specification."""

    reference: Reference
    spec: TargetSpec
    candidate: Candidate


class Backend(Protocol):
    """The members of every backend."""

    Settings: ClassVar[type[BaseModel]]

    @property
    def settings(self) -> BaseModel:
        """The settings that the backend was constructed with."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the results depend on besides the inputs and the settings, for hashes and the manifest: class, model id,
        revision or fingerprint of the weights, licence ("" if unknown), version of the backend's code."""
        ...

    def load(self) -> None:
        """Load the models.

        Raises ImagineError with one sentence that says what to install or which folder to name.
        """
        ...


class IndexedReferences(Backend, Protocol):
    """References that the backend produces by their number, in chunks, like the results of any other step."""

    @property
    def count(self) -> int:
        """The number of references."""
        ...

    def draw(self, numbers: Sequence[int]) -> Sequence[Reference | Failed]:
        """Return the references with these numbers, 0 to count - 1.

        The reference with a given number must not depend on `count`.
        """
        ...


class CollectedReferences(Backend, Protocol):
    """References that can only be determined from all photos together; they are read once and then stored.

    `identity` must change when they change.
    """

    def collect(self) -> Iterator[Reference | Rejection]:
        """Yield every reference, in a fixed order, and a rejection with its reason for every photo that is not one."""
        ...


class Captioner(Backend, Protocol):
    """A backend that describes references."""

    def caption(self, references: Sequence[Reference]) -> list[str | Failed]:
        """Return a dense caption of each reference: the person and everything around them."""
        ...


class Rewriter(Backend, Protocol):
    """A backend that writes the captions of targets."""

    def rewrite(self, targets: Sequence[Target]) -> list[str | Failed]:
        """Return each caption changed to include its aims, with the description of the person unchanged."""
        ...


class Generator(Backend, Protocol):
    """A backend that generates candidates."""

    def generate(self, work: Sequence[tuple[Reference, TargetSpec, int]]) -> list[Candidate | Failed]:
        """Return a candidate of round 0 for each (reference, target specification, attempt).

        Its noise depends on the specification's seed and the attempt only.
        """
        ...


class Refiner(Backend, Protocol):
    """A backend that makes candidates more similar to their references."""

    def refine(self, drafts: Sequence[Draft]) -> list[Candidate | Failed]:
        """Return each draft's picture with an identity closer to the reference's: a candidate of the next `round`."""
        ...


class Measurer(Backend, Protocol):
    """A backend that measures candidates."""

    def measure(self, drafts: Sequence[Draft]) -> list[Measures | Failed]:
        """Return identity, difference, faces, quality, sharpness, text and hash of each candidate and its reference."""
        ...
