"""What clients see of jobs, pictures, personas and photos."""

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from imagine.serving.api.schemas import (
    JobAnswer,
    JobFailure,
    PersonaAnswer,
    PictureAnswer,
    UploadAnswer,
)
from imagine.serving.store.people import StoredPersona, Upload
from imagine.serving.store.records import Job


def job_answer(job: Job, pictures: "Sequence[sa.Row[Any]]" = ()) -> JobAnswer:
    """Return the answer for a job and the rows of its pictures."""
    error = None if job.error_code is None else JobFailure(code=job.error_code, message=job.error or "")
    shown = {name: value for name, value in job.request.items() if name != "temporary"}
    return JobAnswer(
        id=job.id, kind=job.kind, state=job.state, position=job.position, stage=job.stage, step=job.step,
        steps=job.steps, attempt=job.attempt, n=job.count, created=job.created, started=job.started,
        finished=job.finished, expires=job.expires, error=error, request=shown, result=job.result,
        pictures=[picture_answer(row) for row in pictures], url=f"/v1/jobs/{job.id}",
        events_url=f"/v1/jobs/{job.id}/events",
    )  # fmt: skip


def picture_answer(row: "sa.Row[Any]") -> PictureAnswer:
    """Return the answer for the row of a picture."""
    return PictureAnswer(
        id=row.id, job=row.job, number=row.number, url=f"/v1/pictures/{row.id}/content", media_type=row.media,
        width=row.width, height=row.height, seed=row.seed, sha256=row.sha256, created=row.created,
        expires=row.expires, settings=json.loads(row.settings),
    )  # fmt: skip


def persona_answer(persona: StoredPersona) -> PersonaAnswer:
    """Return the answer for a persona."""
    return PersonaAnswer(**{name: value for name, value in vars(persona).items() if name != "owner"})


def upload_answer(upload: Upload) -> UploadAnswer:
    """Return the answer for an uploaded photo."""
    kind: Any = upload.kind
    return UploadAnswer(
        id=upload.id, kind=kind, width=upload.width, height=upload.height, created=upload.created,
        expires=upload.expires,
    )  # fmt: skip
