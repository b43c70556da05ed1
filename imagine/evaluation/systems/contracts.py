"""What an evaluation asks of a system: to enroll people from photos, and to draw them.

A system is any way to make pictures of a person: a pipeline, a method that trains for each person, or a service.
`imagine.evaluation.systems.pipelines` has systems for our pipelines and for those of diffusers, and
`imagine.evaluation.systems.finished` takes pictures that exist already.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from PIL import Image

FULL, DETACHED = "full", "detached"


@dataclass(frozen=True)
class Drawing:
    """One picture that a system is asked for.

    person: what `System.enroll` returned; for several people a mapping from their names in the prompt to it; None for a
    picture without any person's photo. size: height and width in pixels, or None for the system's own size.
    """

    id: str  # names the picture within its row, as in manifests
    prompt: str
    person: Any
    seed: int  # of the noise
    size: tuple[int, int] | None = None


@runtime_checkable
class System(Protocol):
    """A way to make pictures of a person from photos.

    rows: the kinds of pictures it can draw: "full", and "detached" if it also draws without a person. side: the side of
    its square pictures in pixels, from which the size of pictures of several people follows.
    """

    name: str

    @property
    def rows(self) -> tuple[str, ...]: ...

    @property
    def side(self) -> int: ...

    def fingerprint(self) -> str:
        """Return a short text that differs if the system would draw other pictures."""
        ...

    def enroll(self, photos: Sequence[Image.Image], subject: str = "person") -> Any:
        """Return what the system needs to draw this person or thing; `subject` is its class noun.

        An attribute `bytes` of the result, if there is one, is reported as the size of a new person, and an attribute
        `seconds` as the time that this person took.
        """
        ...

    def draw(self, drawings: Sequence[Drawing]) -> "Sequence[Image.Image | str]":
        """Return a picture for each drawing, or a sentence that says why there is none."""
        ...
