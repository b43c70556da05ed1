"""The result of a call of `ImaginePipeline`."""

from dataclasses import dataclass, field
from typing import Any

from diffusers.utils.outputs import BaseOutput

from imagine.people.persona import Face


@dataclass
class ImagineOutput(BaseOutput):
    """The result of a call.

    `images` is a list of PIL pictures, an array (B, H, W, 3) or tensor (B, 3, H, W) in 0..1, or latents. `faces` holds
    the face used from each photo, ordered by picture, then by person. `refined` counts the small faces that the second
    pass redrew (refine_faces). `notes` holds one sentence for each result that may surprise, and for each notation of
    other programs in a prompt, such as "(smiling:1.4)", which does not act here. `people_found` counts the faces of
    each picture, if a picture should show several people.
    """

    images: Any
    faces: list[Face]
    refined: int = 0
    notes: list[str] = field(default_factory=list)
    people_found: list[int] = field(default_factory=list)

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the tuple (images, faces), the result of a call with return_dict=False."""
        return self.images, self.faces
