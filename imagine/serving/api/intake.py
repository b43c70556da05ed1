"""Take in what clients send: JSON or multipart bodies, and photos, which are re-encoded before anything is stored.

A photo's header is read first, so that a picture of too many pixels is refused before it is decoded. What is stored is
the upright picture as bare pixels: position, camera and all other metadata of the file are gone.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
from anyio.to_thread import run_sync
from fastapi import Request
from PIL import Image
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from imagine.errors import ImagineError
from imagine.serving.api.errors import ApiError, describe_validation, error_of
from imagine.serving.settings import ServeSettings
from imagine.serving.store.files import write_whole
from imagine.serving.store.people import Upload
from imagine.serving.store.records import draw_id
from imagine.serving.store.store import Store

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF")
_HEIC = re.compile(rb"....ftyp(heic|heix|hevc|hevx|heim|heis|mif1|msf1)", re.DOTALL)
_NAMED = re.compile(r"(photos|image|images)(?:\[(?P<name>[^\[\]\x00-\x1f]{0,80})\])?")
MOST_FIELDS = 60
PERSONA_FILE = 32 << 20  # bytes
_decoding = anyio.CapacityLimiter(2)  # each may need a few hundred megabytes


@dataclass(frozen=True)
class Body:
    """A body: its fields, and its files by the name of the person whom they show ("" without a name)."""

    fields: Mapping[str, Any]
    files: Mapping[str, list[bytes]] = field(default_factory=dict)

    def fingerprint(self, wanted: BaseModel) -> list[Any]:
        """Return what makes two requests the same: the parsed fields, and the contents of the files."""
        hashes = {name: [hashlib.sha256(data).hexdigest() for data in each] for name, each in self.files.items()}
        return [wanted.model_dump(mode="json"), hashes]


async def read_body(request: Request, settings: ServeSettings) -> Body:
    """Read a JSON object, or a form with files. Raises ApiError for anything else.

    A form's field `request` may hold the JSON object; other fields of the form are added to it as text. Files are the
    fields `photos`, `photos[NAME]` and, as in OpenAI's API, `image`, `image[]` and `image[0]`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return Body(_json_object(await request.body()))
    if kind != "multipart/form-data":
        raise ApiError("unsupported_media_type", "Send application/json, or multipart/form-data if there are photos.")
    try:
        async with request.form(max_files=settings.max_photos, max_fields=MOST_FIELDS, max_part_size=1 << 20) as form:
            return await _read_form(form.multi_items(), settings)
    except ApiError:
        raise
    except HTTPException as error:
        code = "too_large" if "Too many" in str(error.detail) or "exceeded" in str(error.detail) else "invalid_request"
        raise ApiError(code, f"The form cannot be read: {str(error.detail).rstrip('.')}.") from error


async def _read_form(items: list[tuple[str, Any]], settings: ServeSettings) -> Body:
    fields: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    for name, value in items:
        if isinstance(value, UploadFile):
            matched = _NAMED.fullmatch(name)
            if matched is None:
                raise ApiError("invalid_request", "Files are sent in the field photos, or photos[NAME].", "photos")
            person = matched["name"] or ""
            person = "" if matched[1] != "photos" else person  # OpenAI's fields are numbered, not named
            files.setdefault(person, []).append(await value.read())
        elif name == "request":
            fields |= _json_object(value.encode("utf-8", "surrogatepass"))
        elif name in fields:
            raise ApiError("invalid_request", "A field of the form is given twice.", None)
        else:
            fields[name] = value
    if sum(map(len, files.values())) > settings.max_photos:
        raise ApiError("too_large", f"At most {settings.max_photos} photos can be sent at once.", "photos")
    return Body(fields, files)


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError("invalid_request", "The body is not valid JSON.") from error
    if not isinstance(found, dict):
        raise ApiError("invalid_request", "The body must be a JSON object.")
    return found


def parse(model: type[Any], fields: Mapping[str, Any]) -> Any:
    """Return a body's fields as a model. Raises ApiError with the first field that is wrong."""
    assert issubclass(model, BaseModel)
    try:
        return model.model_validate(fields)
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise ApiError("invalid_request", "The body is nested too deeply.") from error
        raise ApiError("invalid_request", *describe_validation(error.errors())) from error


async def store_photo(store: Store, settings: ServeSettings, owner: str, data: bytes) -> Upload:
    """Check, re-encode and store a photo or a persona's file. Raises ApiError if it cannot be used."""
    now = store.people.clock()
    upload = draw_id("upl")
    digest = hashlib.sha256(data).hexdigest()
    if _is_persona(data):
        if len(data) > PERSONA_FILE:
            raise ApiError("too_large", f"A persona's file has at most {PERSONA_FILE >> 20} MB.", "photos")
        path = store.files.uploaded_persona(upload)
        await run_sync(lambda: write_whole(path, lambda file: file.write(data)))
        found = Upload(upload, owner, "persona", digest, 0, 0, now, now + settings.keep_photos)
    else:
        png, size = await run_sync(lambda: bare_pixels(data, settings), limiter=_decoding)
        path = store.files.photo(upload)
        await run_sync(lambda: write_whole(path, lambda file: file.write(png)))
        found = Upload(upload, owner, "photo", digest, *size, now, now + settings.keep_photos)
    await run_sync(store.people.add_upload, found)
    return found


def bare_pixels(data: bytes, settings: ServeSettings) -> tuple[bytes, tuple[int, int]]:
    """Return a photo as an upright PNG without metadata, and its width and height. Raises ApiError."""
    from imagine.people.photos import open_photo  # which loads torch, and only servers that get photos need it

    if not _HEIC.match(data[:12]):
        _check_header(data, settings)
    try:
        image = open_photo(data)
    except ImagineError as error:
        raise error_of(error) from error
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue(), image.size


def _check_header(data: bytes, settings: ServeSettings) -> None:
    """Raise ApiError for a file of another kind, or with too many pixels, without decoding it."""
    Image.init()
    try:
        with Image.open(io.BytesIO(data), formats=[each for each in FORMATS if each in Image.OPEN]) as image:
            width, height = image.size
    except Exception as error:  # a damaged header can raise any error in a decoder
        raise ApiError(
            "photo_not_usable", "A photo is damaged or of another kind: send JPEG, PNG or WebP.", "photos"
        ) from error
    if width * height > settings.max_photo_pixels or max(width, height) > settings.max_photo_side:
        raise ApiError(
            "photo_not_usable",
            f"A photo has {width} x {height} pixels: send at most {settings.max_photo_pixels // 1_000_000} million, "
            f"and {settings.max_photo_side} on a side.",
            "photos",
        )


def _is_persona(data: bytes) -> bool:
    """Return whether a file begins like a safetensors file: the length of a JSON header, and the header."""
    return len(data) > 9 and data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data)
