"""`/v1/uploads`, `/v1/photos/check` and `/v1/personas`: photos, what is seen in them, and people that are kept."""

from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from imagine.serving.api.access import Owner, TheSettings, TheStore
from imagine.serving.api.errors import ApiError, not_found
from imagine.serving.api.intake import parse, read_body, store_photo
from imagine.serving.api.routes.pictures import attach_files, body_schema, check_people
from imagine.serving.api.schemas import (
    EnrollRequest,
    JobAnswer,
    PersonaAnswer,
    PersonaChange,
    PersonaList,
    PhotoCheck,
    UploadAnswer,
)
from imagine.serving.api.submitting import limit_rate, raise_failure, submit, wait_for
from imagine.serving.api.views import job_answer, persona_answer, upload_answer
from imagine.serving.settings import DAY

router = APIRouter(prefix="/v1", tags=["people"])
PersonaIdInPath = Annotated[str, Path(pattern=r"^per_[0-9a-f]{32}$")]
UploadIdInPath = Annotated[str, Path(pattern=r"^upl_[0-9a-f]{32}$")]
ENROLLING = 60.0  # seconds
_FILE = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"photos": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                    "required": ["photos"],
                    "additionalProperties": False,
                }
            }
        },
    }
}
_LATER: dict[int | str, dict[str, Any]] = {202: {"model": JobAnswer, "description": "The job, which is not done yet"}}


@router.post("/uploads", status_code=201, response_model=list[UploadAnswer], openapi_extra=_FILE)
async def upload_photos(request: Request, owner: Owner, store: TheStore, settings: TheSettings) -> list[UploadAnswer]:
    """Store photos, or a persona's file, for an hour, to use them in several requests."""
    await limit_rate(store, settings, owner)
    body = await read_body(request, settings)
    if body.fields or list(body.files) != [""]:
        raise ApiError("invalid_request", "Send one or more files in the field photos, and nothing else.", "photos")
    return [upload_answer(await store_photo(store, settings, owner, data)) for data in body.files[""]]


@router.delete("/uploads/{upload}", status_code=204)
async def delete_upload(upload: UploadIdInPath, owner: Owner, store: TheStore) -> Response:
    """Delete an uploaded photo with its file."""
    if not await run_sync(store.people.delete_uploads, [upload], owner):
        raise not_found("upload")
    return Response(status_code=204)


@router.get("/uploads/{upload}/content", response_class=FileResponse, responses={200: {"content": {"image/png": {}}}})
async def get_upload(upload: UploadIdInPath, owner: Owner, store: TheStore) -> Response:
    """Return an uploaded photo as it was understood: upright, and in the pixels that face boxes refer to."""
    found = await run_sync(store.people.upload, upload, owner)
    path = None if found is None or found.kind != "photo" else store.files.photo(found.id)
    if path is None or not path.is_file():
        raise not_found("photo")
    return FileResponse(path, media_type="image/png")


@router.post("/photos/check", response_model=dict[str, Any], responses=_LATER)
async def check_photo(
    request: Request, wanted: PhotoCheck, owner: Owner, store: TheStore, settings: TheSettings
) -> Any:
    """Look at an uploaded photo: its faces, the one that would be used, its crop, and advice.

    The job is deleted when it has been answered, because its result holds a face.
    """
    await limit_rate(store, settings, owner)
    if await run_sync(store.people.upload, wanted.upload, owner) is None:
        raise not_found("upload")
    job, _ = await submit(request, owner, "photo", wanted.model_dump(mode="json"))
    job = await wait_for(request, job, ENROLLING, cancel_if_left=True)
    if not job.ended:
        return JSONResponse(job_answer(job).model_dump(mode="json"), 202)
    if "idempotency-key" not in request.headers:  # whoever sends one may ask again
        await run_sync(store.delete_job, job.id)
    raise_failure(job)
    return job.result


@router.post(
    "/personas",
    status_code=201,
    response_model=PersonaAnswer,
    responses=_LATER,
    openapi_extra=body_schema("EnrollRequest", "photos"),
)
async def create_persona(request: Request, owner: Owner, store: TheStore, settings: TheSettings) -> Any:
    """Encode a person from photos, or take in a persona's file, and keep the persona under a name."""
    await limit_rate(store, settings, owner)
    body = await read_body(request, settings)
    placeholder = {"uploads": ["upl_" + "0" * 32] * sum(map(len, body.files.values()))} if body.files else {}
    wanted: EnrollRequest = parse(EnrollRequest, {**placeholder, **body.fields})
    if request.app.state.keys_required and wanted.consent is None:
        raise ApiError(
            "invalid_request",
            "Say on what basis the person may be shown: consent=self, agreed or invented.",
            "consent",
        )
    if list(body.files) not in ([], [""]):
        raise ApiError("invalid_request", "A persona is one person: send the files in the field photos.", "photos")
    people: dict[str, Any] = {"": {"persona": None, "uploads": wanted.uploads}}
    temporary = await attach_files(people, body, store, settings, owner)
    await check_people({"people": people}, store, owner, skip=bool(temporary))
    keep = settings.keep_personas if wanted.keep_days is None else wanted.keep_days * DAY
    job = {**wanted.model_dump(mode="json", exclude={"keep_days"}), **people[""], "keep": keep, "temporary": temporary}
    accepted, _ = await submit(request, owner, "persona", job, fingerprint=body.fingerprint(wanted))
    accepted = await wait_for(request, accepted, ENROLLING, cancel_if_left=False)
    if not accepted.ended:
        return JSONResponse(job_answer(accepted).model_dump(mode="json"), 202)
    raise_failure(accepted)
    found = await run_sync(store.people.persona, (accepted.result or {})["persona"], owner)
    if found is None:
        raise not_found("persona")
    location = {"location": f"/v1/personas/{found.id}"}
    return JSONResponse(persona_answer(found).model_dump(mode="json"), 201, location)


@router.get("/personas", response_model=PersonaList)
async def list_personas(owner: Owner, store: TheStore) -> PersonaList:
    """Return the owner's personas, the newest first."""
    return PersonaList(personas=[persona_answer(each) for each in await run_sync(store.people.list_personas, owner)])


@router.get("/personas/{persona}", response_model=PersonaAnswer)
async def get_persona(persona: PersonaIdInPath, owner: Owner, store: TheStore) -> PersonaAnswer:
    """Return a persona."""
    found = await run_sync(store.people.persona, persona, owner)
    if found is None:
        raise not_found("persona")
    return persona_answer(found)


@router.patch("/personas/{persona}", response_model=PersonaAnswer)
async def change_persona(
    persona: PersonaIdInPath, wanted: PersonaChange, owner: Owner, store: TheStore
) -> PersonaAnswer:
    """Rename a persona, or change for how many days from now it is kept."""
    changes: dict[str, Any] = {} if wanted.name is None else {"name": wanted.name}
    if wanted.keep_days is not None:
        changes["expires"] = store.people.clock() + wanted.keep_days * DAY
    found = await run_sync(store.people.change_persona, persona, owner, changes)
    if found is None:
        raise not_found("persona")
    return persona_answer(found)


@router.delete("/personas/{persona}", status_code=204)
async def delete_persona(persona: PersonaIdInPath, owner: Owner, store: TheStore) -> Response:
    """Delete a persona with its file."""
    if not await run_sync(store.people.delete_persona, persona, owner):
        raise not_found("persona")
    return Response(status_code=204)


@router.get(
    "/personas/{persona}/file",
    response_class=FileResponse,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
async def get_persona_file(persona: PersonaIdInPath, owner: Owner, store: TheStore) -> Response:
    """Return a persona's file, which `imagine generate --reference` and this server read."""
    found = await run_sync(store.people.persona, persona, owner)
    path = None if found is None else store.files.persona(found.id)
    if path is None or not path.is_file():
        raise not_found("persona")
    return FileResponse(path, media_type="application/octet-stream", filename=f"{persona}.safetensors")
