"""Requests of OpenAI's images API as ours: what a field means here, and what is refused because it has no meaning.

Nothing is ignored silently: a known field with a value that cannot act is an error that names the field.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from imagine.serving.api.errors import ApiError
from imagine.serving.api.schemas import Face, Name, Number, PersonaId, PictureRequest

MODEL = "imagine"
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_DATA_URL = re.compile(r"data:image/[a-z.+-]{1,20};base64,(.*)", re.DOTALL)
_STEPS = {"low": 0.5, "high": 2.0}  # times the default number of steps
_FIDELITY = {"low": 0.7, "high": 1.0}  # strength of the identity
_REFUSED = {
    "background": ("auto", "opaque", "pictures have no transparency"),
    "moderation": ("auto", "low", "there is no other setting"),
    "style": ("vivid", "natural", "describe the style in the prompt"),
}


class ImageReference(BaseModel):
    """A picture in a JSON body: a data URL, or the id of an upload. Web addresses are never fetched."""

    model_config = ConfigDict(extra="forbid")

    image_url: str | None = None
    file_id: str | None = None


def _one_or_none(value: Any) -> Any:
    return None if value in ("", "null") else value


Optional = BeforeValidator(_one_or_none)  # a form sends an absent value as an empty text


class ImagesRequest(BaseModel):
    """The body of both routes, with our own fields and the names that other servers use for them."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=4000)
    model: str | None = None
    n: Annotated[int | None, Optional] = Field(1, ge=1, le=10)
    size: str | None = None
    quality: Literal["auto", "low", "medium", "high", "standard"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)
    user: str | None = Field(None, max_length=512)
    background: str | None = None
    moderation: str | None = None
    style: str | None = None
    mask: Any = None
    input_fidelity: Literal["low", "high"] | None = None
    images: list[ImageReference] = Field(default=[], max_length=16)

    persona: PersonaId | dict[Name, PersonaId] | None = None
    seed: int | None = Field(None, ge=0, le=2**53)
    steps: int | None = Field(None, ge=1, le=1000, validation_alias=AliasChoices("steps", "num_inference_steps"))
    guidance_scale: Number | None = Field(
        None, validation_alias=AliasChoices("guidance_scale", "guidance", "true_cfg_scale")
    )
    identity_scale: Number | None = Field(None, validation_alias=AliasChoices("identity_scale", "identity"))
    identity_guidance_scale: Number | None = Field(
        None, validation_alias=AliasChoices("identity_guidance_scale", "identity_guidance")
    )
    negative_prompt: str = Field("", max_length=4000)
    face: Face = "largest"

    @property
    def form(self) -> str:
        return self.output_format or "png"

    def check(self) -> None:
        """Raise ApiError for a known field whose value cannot act here."""
        if self.model not in (None, "", MODEL):
            raise ApiError("model_not_found", f"There is no such model; this server has {MODEL!r}.", "model")
        for name, (*accepted, reason) in _REFUSED.items():
            if getattr(self, name) not in (None, *(accepted if name != "style" else ())):
                raise ApiError("invalid_request", f"{name} has no effect here, because {reason}; leave it out.", name)
        if self.mask is not None:
            raise ApiError("invalid_request", "mask has no effect, because this model does not inpaint.", "mask")
        if self.output_compression is not None and self.form == "png":
            raise ApiError(
                "invalid_request", "output_compression needs output_format=jpeg or webp.", "output_compression"
            )
        if self.partial_images and not self.stream:
            raise ApiError("invalid_request", "partial_images needs stream=true.", "partial_images")

    def as_native(self, facts: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the fields of our own request. facts: of a living worker, if there is one. Raises ApiError."""
        self.check()
        width, height = self._sides()
        steps = self.steps
        if steps is None and self.quality in _STEPS and facts is not None:
            steps = max(1, round(_STEPS[self.quality] * facts["steps"]))
        identity = self.identity_scale
        if identity is None and self.input_fidelity is not None:
            identity = _FIDELITY[self.input_fidelity]
        native: dict[str, Any] = {
            "prompt": self.prompt, "n": self.n or 1, "seed": self.seed, "steps": steps, "width": width,
            "height": height, "guidance_scale": self.guidance_scale, "identity_scale": identity,
            "identity_guidance_scale": self.identity_guidance_scale, "negative_prompt": self.negative_prompt,
            "face": self.face, "format": self.form, "previews": self.partial_images or 0,
        }  # fmt: skip
        if self.output_compression is not None:
            native["quality"] = max(1, self.output_compression)
        if isinstance(self.persona, str):
            native["persona"] = self.persona
        elif self.persona:
            native["people"] = {name: {"persona": persona} for name, persona in self.persona.items()}
        return native

    def _sides(self) -> tuple[int | None, int | None]:
        if self.size in (None, "", "auto"):
            return None, None
        found = _SIZE.fullmatch(str(self.size))
        if found is None:
            raise ApiError("invalid_request", 'size must be "auto" or WIDTHxHEIGHT, such as 128x128.', "size")
        return int(found[1]), int(found[2])

    def pictures(self) -> tuple[list[bytes], list[str]]:
        """Return the bytes of the data URLs and the ids of the uploads in a JSON body. Raises ApiError."""
        data, uploads = list[bytes](), list[str]()
        for each in self.images:
            if (each.image_url is None) == (each.file_id is None):
                raise ApiError("invalid_request", "An image is either image_url or file_id.", "images")
            if each.file_id is not None:
                uploads.append(each.file_id)
                continue
            found = _DATA_URL.fullmatch(str(each.image_url))
            if found is None:
                raise ApiError(
                    "invalid_request", "image_url must be a data URL, because nothing is downloaded.", "images"
                )
            try:
                data.append(base64.b64decode(found[1], validate=True))
            except (binascii.Error, ValueError) as error:
                raise ApiError("invalid_request", "The data URL is not valid base64.", "images") from error
        return data, uploads


NATIVE_FIELDS = frozenset(PictureRequest.model_fields)
