"""What the steps of a build ask of models: one small contract each, so that any of them changes by one line of config.

Every backend is a class `Backend(settings)`: `Settings` is its frozen pydantic model (unknown keys are refused), and
constructing must be cheap; models load in `load()`, which is called once in each process that works with it. All calls
take and return lists of equal length, in order, and must not depend on how a list is cut into batches: randomness comes
from the records' own seeds. One bad item must not sink the others: `Failed(reason, sentence)` is returned in its place.

Results are kept under a hash of `identity`, the settings and the inputs, so that a build redoes only what changed. What
does not change results (batch size, device, address, timeouts) is marked `Field(..., exclude=True)` in `Settings`: it
is left out of the hash, as pydantic leaves it out of `model_dump()`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel

from data_synth.records import Candidate, Measures, Reference, Rejection, TargetSpec


@dataclass(frozen=True)
class Failed:
    """One item that a backend could not do."""

    reason: str  # a few words, always the same ones
    sentence: str = ""  # for a person
    for_now: bool = False  # True: the item is fine and the backend is not (an endpoint that is down): park it


@dataclass(frozen=True)
class Target:
    """What a rewriter is to bring about: a value for each attribute, drawn so that the wished distribution is met."""

    reference: Reference
    caption: str  # dense caption of the reference
    aims: Mapping[str, str]  # {"expression": "smiling", "gaze": "left", "scene": "beach", ...}
    seed: int


@dataclass(frozen=True)
class Draft:
    """A candidate to be refined, with all that belongs to it."""

    reference: Reference
    spec: TargetSpec
    candidate: Candidate


class Backend(Protocol):
    """What all backends have."""

    Settings: ClassVar[type[BaseModel]]

    @property
    def settings(self) -> BaseModel:
        """What it was made with."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What results depend on besides their inputs, for hashes and the manifest: class, model id, revision or
        fingerprint of the weights, licence ("" if unknown), version of this code."""
        ...

    def load(self) -> None:
        """Load the models; raises ImagineError with one sentence that says what to install or which folder to give."""
        ...


class IndexedReferences(Backend, Protocol):
    """References that are drawn by their number, as any other step's results."""

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def draw(self, numbers: Sequence[int]) -> Sequence[Reference | Failed]:
        """The references of these numbers, 0 to count - 1; the same whatever `count` is."""
        ...


class CollectedReferences(Backend, Protocol):
    """References that only a look at all of them tells, read once and kept; `identity` must change when they do."""

    def collect(self) -> Iterator[Reference | Rejection]:
        """Every reference there is, in a fixed order, and why a photo is none."""
        ...


class Captioner(Backend, Protocol):
    """Says what a reference shows."""

    def caption(self, references: Sequence[Reference]) -> list[str | Failed]:
        """A dense caption of each reference: the person and everything around them."""
        ...


class Rewriter(Backend, Protocol):
    """Says what a target should show."""

    def rewrite(self, targets: Sequence[Target]) -> list[str | Failed]:
        """The caption with its aims brought in and the person kept."""
        ...


class Generator(Backend, Protocol):
    """Makes candidates."""

    def generate(self, work: Sequence[tuple[Reference, TargetSpec, int]]) -> list[Candidate | Failed]:
        """For each (reference, ask, attempt) a candidate of round 0; its noise follows from ask.seed and attempt."""
        ...


class Refiner(Backend, Protocol):
    """Brings candidates nearer to their references."""

    def refine(self, drafts: Sequence[Draft]) -> list[Candidate | Failed]:
        """For each draft the same picture with the reference's identity brought nearer: `round` one higher."""
        ...


class Measurer(Backend, Protocol):
    """Says how good candidates are, in numbers."""

    def measure(self, drafts: Sequence[Draft]) -> list[Measures | Failed]:
        """Identity, difference, faces, quality, sharpness, text and hash of each candidate beside its reference."""
        ...
