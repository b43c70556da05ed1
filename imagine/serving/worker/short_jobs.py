"""Jobs that draw nothing and take a fraction of a second: enrolling a person, and checking a photo."""

import base64
import io
import math
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from imagine.people.doctor import report_photo
from imagine.personas.consent import Consent
from imagine.serving.settings import DAY
from imagine.serving.store.people import StoredPersona
from imagine.serving.store.records import Job, draw_id
from imagine.serving.store.store import Store
from imagine.serving.worker.requests import Reader
from imagine.serving.worker.saving import save_persona

CROP_SIDE = 256  # of the face crop in a photo's report


def run_short_job(job: Job, pipe: Any, reader: Reader, store: Store) -> None:
    """Run a job that is not a picture, and record its result. Raises ImagineError with one sentence."""
    if job.kind == "persona":
        _enroll(job, reader, store)
    else:
        store.jobs.succeed(job, result=_check(job, pipe, reader))


def _enroll(job: Job, reader: Reader, store: Store) -> None:
    """Encode a person from photos or a persona's file, and keep the persona."""
    request = job.request
    persona = reader.persona(job, request)
    reader.pipe.check_persona(persona)
    if request.get("consent") and persona.consent is None:  # a persona's file keeps the consent that it records
        days = math.ceil(float(request["keep"]) / DAY)
        persona = replace(persona, consent=Consent.state(request["consent"], days=max(1, days)))
    faces = [face.as_dict() for face in persona.faces]
    stored = StoredPersona(
        draw_id("per"), job.owner, request["name"], persona.encoder, max(1, len(faces)), request.get("consent"), faces,
        job.created, job.created + float(request["keep"]),
    )  # fmt: skip
    save_persona(store.files, persona, stored.id)

    def also(connection: sa.Connection) -> None:
        store.people.add_persona(connection, stored)

    if not store.jobs.succeed(job, result={"persona": stored.id}, also=also):
        store.files.remove_persona(stored.id)


def _check(job: Job, pipe: Any, reader: Reader) -> dict[str, Any]:
    """Return the report on a photo: its faces, the one that is used, its crop, and advice."""
    face: Any = job.request.get("face") or "largest"
    report = report_photo(reader.photo(job), pipe.finder, pipe._current_encoder_info().image_size, face)
    crop = report.crop.image.resize((CROP_SIDE, CROP_SIDE))
    encoded = io.BytesIO()
    crop.save(encoded, "PNG")
    plain = {**report.as_dict(), "crop_png": base64.b64encode(encoded.getvalue()).decode()}
    plain.pop("name")
    return plain
