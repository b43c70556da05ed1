"""The result of a call of `ImaginePipeline`."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers.utils.outputs import BaseOutput
from PIL import Image

from imagine.errors import ConfigError
from imagine.paths import as_path
from imagine.people.assignment import PersonResult
from imagine.people.persona import Face
from imagine.pipeline.attempts import Attempts
from imagine.pipeline.notes import people_notes
from imagine.provenance.marks import Marks
from imagine.provenance.record import PictureRecord
from imagine.provenance.saving import numbered_paths, save_picture


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

    `records` says of each picture how it came about; `save` writes it into the file. `flags` says why the pipeline's
    safety classifier flagged each picture, "" for one that it did not; it is empty without a classifier.
    """

    images: Any
    faces: list[Face]
    refined: int = 0
    notes: list[str] = field(default_factory=list)
    people_found: list[int] = field(default_factory=list)
    people: list[list[PersonResult]] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)
    records: list[PictureRecord] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)

    def save(self, path: "str | os.PathLike[str]", marks: Marks | None = None) -> list[Path]:
        """Save the pictures with their marks (`imagine.provenance`) to `path`, or several to name-1.png, name-2.png ...

        Flagged pictures are saved too, with the reason in their settings. What could not be marked is added to `notes`.
        Return the paths. Raises ConfigError if there are no PIL pictures, or if a file cannot be written.
        """
        images = self.images if isinstance(self.images, (list, tuple)) else ()
        if not images or not all(isinstance(image, Image.Image) for image in images):
            raise ConfigError("Only PIL pictures can be saved: call the pipeline with output_type='pil', the default.")
        paths = numbered_paths(as_path(path), len(images))
        records = self.records or [PictureRecord()] * len(images)
        for image, place, record in zip(images, paths, records, strict=True):
            made = save_picture(image, place, record, marks)
            self.notes += [note for note in made.notes if note not in self.notes]
        return paths

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
