"""The bodies of requests and answers. Unknown fields are refused, so that a misspelt one is not silently ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from imagine.request import MOST_PEOPLE, read_requests
from imagine.serving.settings import ServeSettings

PersonaId = Annotated[str, StringConstraints(pattern=r"^per_[0-9a-f]{32}$")]
UploadId = Annotated[str, StringConstraints(pattern=r"^upl_[0-9a-f]{32}$")]
# Printable text, without the control characters that would break a line of a log or a header.
Name = Annotated[str, StringConstraints(min_length=1, max_length=80, pattern=r"^[^\x00-\x1f\x7f]+$")]
Face = Literal["largest", "centre"] | Annotated[int, Field(ge=0, le=99)]
Faces = Face | Annotated[list[Face], Field(min_length=1, max_length=16)]  # for all photos, or one for each
Number = Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Consent = Literal["self", "agreed", "invented"]
Place = tuple[Share, Share, Share, Share]


class Strict(BaseModel):
    """A body whose unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class Person(Strict):
    """One person of a picture: a persona, or uploaded photos of them."""

    persona: PersonaId | None = None
    uploads: list[UploadId] = Field(default=[], max_length=16)
    face: Faces = "largest"
    on_no_face: Literal["error", "whole"] = "error"

    @model_validator(mode="after")
    def _one_source(self) -> "Person":
        if (self.persona is None) == (not self.uploads):
            raise ValueError("give either persona or uploads")
        check_faces(self.face, self.uploads)
        return self


def check_faces(face: Any, uploads: list[str]) -> None:
    """Raise ValueError if there is a list of faces that does not have one for each photo."""
    if isinstance(face, list) and len(face) != len(uploads):
        raise ValueError(f"face has {len(face)} choices for {len(uploads)} photos; give one for each, or one for all")


class PictureRequest(Strict):
    """A picture to draw, or `n` pictures of the same request; what is left out takes the weights' defaults."""

    prompt: str = Field(min_length=1, max_length=4000, examples=["smiling, on a beach"])
    persona: PersonaId | None = None
    uploads: list[UploadId] = Field(default=[], max_length=16)
    people: dict[Name, Person] = Field(default={}, max_length=MOST_PEOPLE)
    face: Face = "largest"
    on_no_face: Literal["error", "whole"] = "error"
    n: int = Field(1, ge=1, le=10)
    seed: int | None = Field(None, ge=0, le=2**53)
    steps: int | None = Field(None, ge=1, le=1000)
    width: int | None = Field(None, ge=1, le=8192)
    height: int | None = Field(None, ge=1, le=8192)
    guidance_scale: Number | None = None
    identity_guidance_scale: Number | None = None
    guidance_rescale: Share | None = None
    guidance_balance: bool | None = None
    identity_scale: Number | None = None
    identity_window: tuple[Share, Share] | None = None
    identity_blocks: (
        Literal["all", "coarse", "fine", "down", "mid", "up", "early", "middle", "late", "double", "single"] | None
    ) = None
    refine_faces: bool | None = None
    layout: Literal["left to right"] | dict[Name, Place] | None = None
    attempts: int = Field(1, ge=1, le=10)
    negative_prompt: str = Field("", max_length=4000)
    format: Literal["png", "jpeg", "webp"] = "png"
    quality: int = Field(95, ge=1, le=100)
    previews: int = Field(0, ge=0, le=10)
    label: str = Field("", max_length=100, description="a note of the client, which is returned with the job")

    @model_validator(mode="after")
    def _one_form_of_people(self) -> "PictureRequest":
        if sum((self.persona is not None, bool(self.uploads), bool(self.people))) > 1:
            raise ValueError("give only one of persona, uploads and people")
        if self.identity_window is not None and self.identity_window[0] > self.identity_window[1]:
            raise ValueError("identity_window must begin before it ends")
        return self

    def as_job(self) -> dict[str, Any]:
        """Return the request as the worker reads it, with all people under `people`; one without a name is "".

        Raises PromptError if prompt and people do not fit together.
        """
        plain = self.model_dump(
            mode="json", exclude={"persona", "uploads", "people", "face", "on_no_face", "n", "seed"}
        )
        people = {name: person.model_dump(mode="json") for name, person in self.people.items()}
        if self.persona is not None or self.uploads:
            person = Person(persona=self.persona, uploads=self.uploads, face=self.face, on_no_face=self.on_no_face)
            people = {"": person.model_dump(mode="json")}
        reference: Any = None if not people else "photo" if "" in people else dict.fromkeys(people, "photo")
        read_requests(self.prompt, reference)
        return {**plain, "people": people}


def too_much(request: PictureRequest, settings: ServeSettings, facts: dict[str, Any] | None) -> tuple[str, str] | None:
    """Return the field that is beyond a limit of this server or its model, and one sentence; None if there is none.

    facts: of a living worker, if there is one.
    """
    if request.n > settings.max_pictures:
        return "n", f"n={request.n} is more than the {settings.max_pictures} pictures that one request may ask for."
    if request.steps is not None and request.steps > settings.max_steps:
        return "steps", f"steps={request.steps} is more than the {settings.max_steps} that this server allows."
    for name in ("width", "height"):
        side = getattr(request, name)
        if side is None:
            continue
        if side > settings.max_side:
            return name, f"{name}={side} is more than the {settings.max_side} pixels that this server allows."
        if facts is not None and (side % facts["multiple"] or side < facts["multiple"]):
            return name, f"{name}={side} must be a multiple of {facts['multiple']} pixels for this model."
    return None


class EnrollRequest(Strict):
    """A person to keep: uploaded photos, or the file of a persona."""

    name: Name
    uploads: list[UploadId] = Field(min_length=1, max_length=16)
    face: Faces = "largest"
    on_no_face: Literal["error", "whole"] = "error"
    check_identity: bool = True
    consent: Consent | None = Field(None, description="this is me, the person agreed, or an invented person")
    keep_days: int | None = Field(None, ge=1, le=3650)

    @model_validator(mode="after")
    def _one_face_for_each(self) -> "EnrollRequest":
        check_faces(self.face, self.uploads)
        return self


class PersonaChange(Strict):
    """What can be changed of a persona."""

    name: Name | None = None
    keep_days: int | None = Field(None, ge=1, le=3650)


class PhotoCheck(Strict):
    """A photo to look at before it is used."""

    upload: UploadId
    face: Face = "largest"


class ServerAnswer(BaseModel):
    """What a client must know to ask for pictures."""

    version: str
    key_needed: bool
    model: dict[str, Any] | None = Field(description="the loaded weights; null while no worker has loaded them")
    weights: str | None = Field(description="the folder of the weights; only for clients on the same machine")
    limits: dict[str, int]
    keep_seconds: dict[str, float] = Field(description="how long pictures, photos and personas are kept")
    examples: list[str] = Field(description="photos that come with the weights, while the app is served")


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class JobFailure(BaseModel):
    """Why a job ended without a result."""

    code: str
    message: str


class PictureAnswer(BaseModel):
    """One finished picture."""

    id: str
    job: str
    number: int
    url: str
    media_type: str
    width: int
    height: int
    seed: int
    sha256: str
    created: float
    expires: float
    settings: dict[str, Any]


class JobAnswer(BaseModel):
    """One job, with its pictures once they are there."""

    id: str
    kind: Literal["pictures", "persona", "photo"]
    state: Literal["queued", "running", "succeeded", "failed", "canceled", "expired"]
    position: int | None = Field(description="place in the queue, from 1")
    stage: str | None
    step: int
    steps: int
    attempt: int
    n: int
    created: float
    started: float | None
    finished: float | None
    expires: float
    error: JobFailure | None
    request: dict[str, Any]
    result: dict[str, Any] | None
    pictures: list[PictureAnswer]
    url: str
    events_url: str


class JobList(BaseModel):
    """One page of jobs, the newest first; `next` is the cursor of the following page."""

    jobs: list[JobAnswer]
    next: str | None


class UploadAnswer(BaseModel):
    """One uploaded photo, upright and without metadata, or a persona's file."""

    id: str
    kind: Literal["photo", "persona"]
    width: int
    height: int
    created: float
    expires: float


class PersonaAnswer(BaseModel):
    """One persona, and what was understood from each of its photos."""

    id: str
    name: str
    encoder: str
    photos: int
    consent: str | None
    faces: list[dict[str, Any]]
    created: float
    expires: float


class PersonaList(BaseModel):
    """An owner's personas, the newest first."""

    personas: list[PersonaAnswer]
