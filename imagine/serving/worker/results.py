"""Record how jobs ended: pictures with their settings, previews while they are drawn, and reasons of failures."""

import base64
import logging
from typing import Any

import torch
from torch import Tensor

from imagine import __version__
from imagine.errors import SafetyError
from imagine.pipeline.output import ImagineOutput
from imagine.provenance.marks import Marks
from imagine.provenance.record import PictureRecord
from imagine.provenance.saving import encode_picture
from imagine.serving.settings import MarkSettings
from imagine.serving.store.records import Job, NewPicture
from imagine.serving.store.store import Store
from imagine.serving.worker.failures import describe
from imagine.serving.worker.saving import FORMATS, preview_jpeg, save_picture
from imagine.serving.worker_counts import Counts

LOG = logging.getLogger("imagine.serving")


class Results:
    """Writes results of one pipeline into the store. `marks`: which marks pictures get."""

    def __init__(self, pipe: Any, store: Store, counts: Counts, marks: MarkSettings) -> None:
        self.pipe, self.store, self.counts = pipe, store, counts
        self.marks = Marks(**marks.model_dump())

    def save(self, job: Job, out: ImagineOutput, shared: int) -> None:
        """Save the pictures of a job, and record that it succeeded, or why it failed.

        shared: the most pictures with which it shared a step.
        """
        made: list[NewPicture] = []
        try:
            if out.flags and all(out.flags):
                raise SafetyError(out.flags[0])
            marks = [self._save(job, out, number, shared, made) for number in range(len(out.images))]
            if not self.store.jobs.succeed(job, made, {**_described(out), "marks": marks}):
                LOG.info("result of a lost attempt", extra={"job": job.id, "attempt": job.attempt})
                self.store.files.remove_pictures(each.id for each in made)
                return
        except Exception as error:
            self.store.files.remove_pictures(each.id for each in made)
            self.fail(job, *describe(error))
            return
        self.clean_up(job, "succeeded")

    def _save(
        self, job: Job, out: ImagineOutput, number: int, shared: int, made: list[NewPicture]
    ) -> dict[str, Any] | None:
        """Save one picture and add it to `made`; return its marks, or None for one that is flagged and not saved."""
        if out.flags and out.flags[number]:
            return None
        redrawn = out.seeds[number] if out.seeds else None
        seed = job.seeds[number] if redrawn is None else redrawn
        form, quality = job.request.get("format") or "png", int(job.request.get("quality") or 95)
        record = out.records[number] if out.records else PictureRecord(job.request["prompt"], seed)
        image = out.images[number]
        marked = encode_picture(image, FORMATS[form], record, self.marks, quality)
        settings = self._settings(job, seed, shared)
        made.append(save_picture(self.store.files, marked, image.size, number, seed, settings, form))
        out.notes += [note for note in marked.notes if note not in out.notes]
        return dict(marked.applied)

    def fail(self, job: Job, code: str, reason: str) -> None:
        """Record that a job failed, and why."""
        self.store.jobs.fail(job, code, reason)
        self.clean_up(job, "failed", code)

    def clean_up(self, job: Job, state: str, code: str = "") -> None:
        """Delete the photos that came with an ended job, and count and log its end."""
        self.store.people.delete_uploads(job.request.get("temporary") or [], job.owner)
        self.counts.ended[state] += 1
        LOG.info("job ended", extra={"job": job.id, "kind": job.kind, "state": state, "code": code})

    @torch.no_grad()
    def preview(self, latents: Tensor, number: int) -> dict[str, Any]:
        """Return the body of a preview event: a small JPEG of the first picture."""
        (image,) = self.pipe._decode(latents[:1], "pil")
        encoded = base64.b64encode(preview_jpeg(image)).decode()
        return {"number": number, "width": image.width, "height": image.height, "jpeg": encoded}

    def _settings(self, job: Job, seed: int, shared: int) -> dict[str, Any]:
        """Return what repeats a picture; photos and people are named by their ids only."""
        kept = {name: value for name, value in job.request.items() if name not in ("temporary", "previews", "label")}
        return {
            **kept, "seed": seed, "n": 1, "imagine": __version__, "device": str(self.pipe.device),
            "dtype": str(self.pipe.dtype).removeprefix("torch."), "shared_steps_with": shared,
        }  # fmt: skip


def _described(out: ImagineOutput) -> dict[str, Any]:
    """Return what a job reports beside its pictures."""
    return {
        "faces": [face.as_dict() for face in out.faces],
        "notes": list(out.notes),
        "flags": list(out.flags),
        "refined": out.refined,
        "people_found": list(out.people_found),
        "people": [[person.as_dict() for person in each] for each in out.people],
        "attempts": list(out.attempts),
    }
