"""`/v1/pictures`: ask for pictures, and fetch or delete them."""

import re
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from imagine.serving.api.access import Owner, TheSettings, TheStore
from imagine.serving.api.errors import ApiError, not_found
from imagine.serving.api.intake import Body, parse, read_body, store_photo
from imagine.serving.api.schemas import JobAnswer, PictureAnswer, PictureRequest, too_much
from imagine.serving.api.submitting import limit_rate, submit, wait_for
from imagine.serving.api.views import job_answer, picture_answer
from imagine.serving.settings import ServeSettings
from imagine.serving.store.store import Store

router = APIRouter(prefix="/v1/pictures", tags=["pictures"])
PictureId = Annotated[str, Path(pattern=r"^pic_[0-9a-f]{32}$")]
_WAIT = re.compile(r"(?:^|[,;\s])wait=(\d{1,5})(?:$|[,;\s])")


def body_schema(model: str, files: str) -> dict[str, Any]:
    """Return OpenAPI's description of a body that is JSON, or a form with files and the same JSON in `request`."""
    form = {
        "type": "object",
        "properties": {
            "request": {"type": "string", "contentMediaType": "application/json"},
            files: {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": 16},
        },
        "required": ["request"],
        "additionalProperties": False,
    }
    content = {
        "application/json": {"schema": {"$ref": f"#/components/schemas/{model}"}},
        "multipart/form-data": {"schema": form},
    }
    return {"requestBody": {"required": True, "content": content}}


@router.post(
    "",
    status_code=202,
    response_model=JobAnswer,
    responses={200: {"model": JobAnswer, "description": "The job, which has ended"}},
    openapi_extra=body_schema("PictureRequest", "photos"),
)
async def create_pictures(request: Request, owner: Owner, store: TheStore, settings: TheSettings) -> JSONResponse:
    """Ask for pictures; return the job, after `Prefer: wait=SECONDS` if the client sends that."""
    await limit_rate(store, settings, owner)
    body = await read_body(request, settings)
    wanted: PictureRequest = parse(PictureRequest, body.fields)
    job = await picture_job(wanted, body, store, settings, owner)
    same = body.fingerprint(wanted)
    accepted, is_new = await submit(request, owner, "pictures", job, wanted.n, wanted.seed, same)
    if not is_new:
        await run_sync(store.people.delete_uploads, job["temporary"], owner)
    wait = _WAIT.search(request.headers.get("prefer", ""))
    if wait is not None:
        keyed = request.headers.get("idempotency-key") is not None
        accepted = await wait_for(request, accepted, float(wait[1]), cancel_if_left=not keyed)
    pictures = await run_sync(store.jobs.pictures_of, accepted.id)
    answer = job_answer(accepted, pictures)
    return JSONResponse(
        answer.model_dump(mode="json"), 200 if accepted.ended else 202, {"location": f"/v1/jobs/{accepted.id}"}
    )


async def picture_job(
    wanted: PictureRequest, body: Body, store: Store, settings: ServeSettings, owner: str
) -> dict[str, Any]:
    """Return a checked request as the job's, with the files of its body stored. Raises ApiError."""
    workers = await run_sync(store.access.living_workers, settings.lease)
    if (problem := too_much(wanted, settings, workers[0]["facts"] if workers else None)) is not None:
        raise ApiError("invalid_request", problem[1], problem[0])
    if body.files and (wanted.persona or wanted.uploads or wanted.people):
        raise ApiError("invalid_request", "Give the people either as files of the form or by their ids.", "people")
    placeholder = {"uploads": ["upl_" + "0" * 32]}
    given = wanted.model_copy(
        update={} if not body.files else {"uploads": placeholder["uploads"]} if list(body.files) == [""] else {
            "people": parse(PictureRequest, {"prompt": "x", "people": dict.fromkeys(body.files, placeholder)}).people
        }
    )  # fmt: skip
    job = given.as_job()  # checks prompt and names before any photo is decoded
    temporary = await attach_files(job["people"], body, store, settings, owner)
    await check_people(job, store, owner, skip=bool(temporary))
    return {**job, "temporary": temporary}


async def attach_files(
    people: dict[str, Any], body: Body, store: Store, settings: ServeSettings, owner: str
) -> list[str]:
    """Store the files of a body as the photos of its people, and return their ids, which end with the job."""
    temporary: list[str] = []
    for name, files in body.files.items():
        stored = [await store_photo(store, settings, owner, data) for data in files]
        people[name]["uploads"] = [upload.id for upload in stored]
        temporary += people[name]["uploads"]
    return temporary


async def check_people(job: dict[str, Any], store: Store, owner: str, skip: bool = False) -> None:
    """Raise ApiError if a persona or an upload of a job does not exist, or belongs to somebody else."""
    for person in () if skip else job["people"].values():
        if person["persona"] and await run_sync(store.people.persona, person["persona"], owner) is None:
            raise not_found("persona")
        for upload in person["uploads"]:
            if await run_sync(store.people.upload, upload, owner) is None:
                raise not_found("upload")


@router.get("/{picture}", response_model=PictureAnswer)
async def get_picture(picture: PictureId, owner: Owner, store: TheStore) -> PictureAnswer:
    """Return what is known of a picture."""
    row = await run_sync(store.jobs.picture, picture, owner)
    if row is None:
        raise not_found("picture")
    return picture_answer(row)


@router.get(
    "/{picture}/content",
    response_class=FileResponse,
    responses={200: {"content": {kind: {} for kind in ("image/png", "image/jpeg", "image/webp")}}},
)
async def get_content(picture: PictureId, owner: Owner, store: TheStore) -> Response:
    """Return the file of a picture."""
    row = await run_sync(store.jobs.picture, picture, owner)
    path = None if row is None else store.files.picture(row.id, row.media)
    if row is None or path is None or not path.is_file():
        raise not_found("picture")
    return FileResponse(path, media_type=row.media, headers={"cache-control": "private, max-age=3600"})


@router.delete("/{picture}", status_code=204)
async def delete_picture(picture: PictureId, owner: Owner, store: TheStore) -> Response:
    """Delete a picture with its file."""
    if not await run_sync(store.delete_picture, picture, owner):
        raise not_found("picture")
    return Response(status_code=204)
