"""The result of a call of `ImaginePipeline`."""

from dataclasses import dataclass, field
from typing import Any

from diffusers.utils.outputs import BaseOutput

from imagine.people.assignment import PersonResult
from imagine.people.persona import Face
from imagine.pipeline.attempts import Attempts
from imagine.pipeline.notes import people_notes


@dataclass
class ImagineOutput(BaseOutput):
    """The result of a call.

    `images` is a list of PIL pictures, an array (B, H, W, 3) or tensor (B, 3, H, W) in 0..1, or latents. `faces` holds
    the face used from each photo, ordered by picture, then by person. `refined` counts the small faces that the second
    pass redrew (refine_faces). `notes` holds one sentence for each result that may surprise, and for each notation of
    other programs in a prompt, such as "(smiling:1.4)", which does not act here.

    If a picture should show several people, or if the call may draw pictures again (attempts), four lists have one
    entry per picture: `people` says for each person whether the picture shows them, `people_found` counts the faces,
    `attempts` counts how often the picture was drawn, and `seeds` holds the seed of a picture that was drawn again
    (`torch.Generator().manual_seed(seed)` draws it at once), or None for the first one.
    """

    images: Any
    faces: list[Face]
    refined: int = 0
    notes: list[str] = field(default_factory=list)
    people_found: list[int] = field(default_factory=list)
    people: list[list[PersonResult]] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the tuple (images, faces), the result of a call with return_dict=False."""
        return self.images, self.faces


def to_output(best: Attempts, faces: list[Face]) -> ImagineOutput:
    """Return the output of a call whose pictures were checked."""
    drawn, checks = best.drawn, best.checks
    several = any(len(check.people) > 1 for check in checks)
    return ImagineOutput(
        drawn.images,
        faces,
        sum(drawn.refined),
        [*(note for _, note in sorted(drawn.notes.items())), *people_notes(checks, best.counts, best.seeds)],
        [check.faces for check in checks] if several else [],
        [check.people for check in checks],
        best.counts,
        best.seeds,
    )
