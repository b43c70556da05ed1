"""Measure candidates against their references: numbers for the filters, attributes for the data card.

Identity comes from a recogniser (recognisers.py). Attributes come from the judge's attribute reader, if the settings
enable it. All other measures are computed from pixels; the docstring of each function states its limits. If a
picture's facts contain the "box" of the face or its "attributes", as those of rendered pictures do, these are used
instead, because they are exact and need no computation.

The measures do not judge beauty or realism. They find clear faults: no face, another person, a copy, noise, haze,
blur, writing.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch.nn import functional as F

from data_synth.backends.contracts import Draft, Failed
from data_synth.backends.local_models import identity_of, source_identity
from data_synth.backends.recognisers import KnownFace, Recogniser, make_recogniser, similarity
from data_synth.backends.text_detector import LETTERS, text_share
from data_synth.records import Measures
from imagine.errors import PictureError
from imagine.evaluation.judge import Reader
from imagine.networks.weights import default_folder
from imagine.people.faces import crop_unmasked, sharpness
from imagine.people.photos import Photo, read_photo
from imagine.records import FaceBox

POSE = ("expression", "gaze", "yaw", "pitch", "roll")  # the attributes that a pair should change
UNREADABLE = "a picture that cannot be read"
VERSION = 1  # of the arithmetic in this file; increase it whenever a measure changes

_QUOTED = re.compile(rf'["“][^"“”]{{{LETTERS},}}["”]')  # text_share ignores shorter writing
_QUALITY_SIDE = 256
_NOISE = 0.15  # standard deviation of noise, of brightness 0 to 1, at which the quality is 0
_FACE_SIDE, _MAX_SHIFT = 32, 3  # pixels: side of the compared face, and maximum shift of its bands
_BANDS = ((0.1, 0.55), (0.5, 1.0))  # in heights of the face box: brows and eyes; mouth and chin


class Measurer:
    """A measurer for candidates of any origin; it implements `contracts.Measurer`.

    Numbers are rounded, so that results do not differ in the last bits between machines.
    """

    class Settings(BaseModel):
        """The networks and what they measure."""

        model_config = ConfigDict(frozen=True, extra="forbid")

        recogniser: str = "judge"  # a name or module:Class (recognisers.py); "none": only boxes in the facts count
        recogniser_settings: dict[str, Any] = Field(default_factory=dict, exclude=True)  # part of `identity`
        reader: bool = False  # predict attributes with the judge's reader, which works on the portrait world only
        judge: str = Field(default="", exclude=True)  # the folder that contains reader/; "": the shipped judge
        # attributes: share of POSE that differs; face: difference of eyes and mouth; auto: attributes if both are known
        difference: Literal["auto", "attributes", "face"] = "auto"
        crop: int = Field(default=64, ge=16)  # pixels a side of the face crop for sharpness, as the encoder's input
        text: bool = True  # detect writing, the slowest of the measures from pixels

    def __init__(self, settings: "Measurer.Settings") -> None:
        self.settings = settings
        self._recogniser: Recogniser | None = None
        if settings.recogniser != "none":
            self._recogniser = make_recogniser(settings.recogniser, settings.recogniser_settings)
        self._reader: Reader | None = None

    @property
    def _reader_folder(self) -> Path:
        return (
            Path(self.settings.judge).expanduser() if self.settings.judge else default_folder() / "judge"
        ) / "reader"

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The class, the version, the recogniser with its settings, and the reader's weights."""
        facts: dict[str, Any] = {"licence": "Apache-2.0"}
        if self._recogniser is not None:
            settings = self._recogniser.Settings(**self.settings.recogniser_settings).model_dump(mode="json")
            facts["recogniser"] = {**self._recogniser.identity, "settings": settings}
            facts["licence"] = facts["recogniser"].get("licence", "")
        if self.settings.reader:
            facts["reader"] = source_identity(str(self._reader_folder))
        return identity_of(self, VERSION, **facts)

    def load(self) -> None:
        """Load recogniser and reader. Raises WeightsError or ImagineError if one is missing."""
        if self._recogniser is not None:
            self._recogniser.load()
        if self.settings.reader:
            self._reader = Reader.load(self._reader_folder).requires_grad_(False)

    def measure(self, drafts: Sequence[Draft]) -> list[Measures | Failed]:
        """Return the measures of each candidate; Failed if it or its reference cannot be read."""
        references: dict[str, _InspectedPicture | Failed] = {}
        for draft in drafts:
            if draft.reference.key not in references:
                references[draft.reference.key] = self._inspect(draft.reference.image, draft.reference.facts)
        return [self._measured(draft, references[draft.reference.key]) for draft in drafts]

    def _inspect(self, content: bytes, facts: Mapping[str, Any]) -> "_InspectedPicture | Failed":
        try:
            photo = read_photo(content)
        except PictureError as error:
            return Failed(UNREADABLE, str(error))
        faces = self._recogniser.recognise([photo.image])[0] if self._recogniser is not None else ()
        if isinstance(faces, Failed):
            return faces
        box = known_box(photo, facts)
        face = _nearest(faces, box) if box is not None else next(iter(faces), None)
        count = int(box is not None) if self._recogniser is None else len(faces)
        around = face.box if box is None and face is not None else box
        return _InspectedPicture(photo.image, count, face, around, self._attributes(photo.image, facts))

    def _attributes(self, image: Image.Image, facts: Mapping[str, Any]) -> Mapping[str, str]:
        known = facts.get("attributes")
        if isinstance(known, Mapping):
            return {str(name): str(word) for name, word in known.items()}
        if self._reader is None:
            return {}
        side = (self._reader.size, self._reader.size)
        with torch.inference_mode():
            picture = F.interpolate(_tensor(image)[None], size=side, mode="bilinear", antialias=True)
            words = self._reader.words(self._reader(picture))[0]
        return {name: word for name, word in words.items() if name in self._reader.attributes}

    def _measured(self, draft: Draft, reference: "_InspectedPicture | Failed") -> Measures | Failed:
        if isinstance(reference, Failed):
            return reference
        inspected = self._inspect(draft.candidate.image, draft.candidate.facts)
        if isinstance(inspected, Failed):
            return inspected
        both = reference.face is not None and inspected.face is not None
        return Measures(
            faces=inspected.count,
            similarity=_rounded(similarity(reference.face, inspected.face) if both else None),  # type: ignore[arg-type]
            difference=_rounded(self._difference(reference, inspected)),
            quality=_rounded(quality(inspected.image)),
            sharpness=_rounded(
                face_sharpness(inspected.image, inspected.box, self.settings.crop) if inspected.box else None, 6
            ),
            text=_rounded(text_share(inspected.image, inspected.box) if self._looks_for_text(draft) else None),
            picture_hash=picture_hash(inspected.image),
            attributes=inspected.attributes,
        )

    def _difference(self, one: "_InspectedPicture", two: "_InspectedPicture") -> float | None:
        words = attribute_difference(one.attributes, two.attributes)
        if self.settings.difference == "attributes" or (self.settings.difference == "auto" and words is not None):
            return words
        return face_difference(one.image, one.box, two.image, two.box) if one.box and two.box else None

    def _looks_for_text(self, draft: Draft) -> bool:
        """Return whether to detect writing.

        If the prompt contains long writing in quotation marks, it cannot be distinguished from unwanted writing.
        """
        return self.settings.text and not _QUOTED.search(draft.spec.prompt)


@dataclass(frozen=True)
class _InspectedPicture:
    """A decoded picture with its faces and attributes."""

    image: Image.Image
    count: int  # number of faces
    face: KnownFace | None  # the person's face
    box: FaceBox | None  # of that face
    attributes: Mapping[str, str]


def known_box(photo: Photo, facts: Mapping[str, Any]) -> FaceBox | None:
    """Return the face's "box" from a record's facts, in pixels of `photo.image`; None if there is none.

    The facts give it in pixels of the stored picture, turned upright.
    """
    box = facts.get("box")
    if not isinstance(box, Sequence) or len(box) != 4:
        return None
    scale = max(photo.image.size) / max(photo.size)
    left, top, width, height = (float(number) * scale for number in box)
    return FaceBox(left, top, width, height, 1.0)


def _nearest(faces: Sequence[KnownFace], box: FaceBox) -> KnownFace | None:
    return min(faces, key=lambda face: math.dist(face.box.centre, box.centre), default=None)


def _tensor(image: Image.Image) -> torch.Tensor:
    """Return the picture as (3, H, W), 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _rounded(number: float | None, digits: int = 4) -> float | None:
    return None if number is None else round(float(number), digits)


# --- pixels -----------------------------------------------------------------------------------------------------------
def picture_hash(image: Image.Image) -> str:
    """Return the dHash as 16 hexadecimal digits: 64 bits, row by row, one per pair of adjacent cells of 9 x 8.

    A bit is set if the brightness increases to the right. Another size, file format or exposure changes few bits. A
    crop or a mirror image changes many, so it is not recognised as a duplicate.
    """
    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes().hex()


def quality(image: Image.Image) -> float:
    """Return the minimum of three scores from 0 to 1, for faults of broken generators that affect a whole picture.

    Exposure: 1 if at most half of the colour values are clipped (0 or 255), down to 0 if all are. Contrast: the entropy
    of brightness, 1 from 3 of 5 bits on, so haze and flat colour score low, and dark pictures and dark skin do not.
    Noise: its standard deviation by Immerkaer's mask (Computer Vision and Image Understanding 64, 1996); 0.15 and more
    score 0, and fine texture counts as noise too. Wrong hands or eyes and poor composition are not detected.
    """
    small = image.copy()
    small.thumbnail((_QUALITY_SIDE, _QUALITY_SIDE), Image.Resampling.BOX)
    colours, grey = np.asarray(small), np.asarray(small.convert("L"), np.float32) / np.float32(255)
    clipped = float(np.mean((colours <= 1) | (colours >= 254)))
    counts = np.bincount((grey * 31.999).astype(np.int64).ravel(), minlength=32)
    shares = counts[counts > 0] / grey.size
    entropy = float(-(shares * np.log2(shares)).sum())
    return max(0.0, min(1.0, 2 * (1 - clipped), entropy / 3, 1 - _noise(grey) / _NOISE))


def _noise(grey: NDArray[np.float32]) -> float:
    """Return the standard deviation of white noise in (H, W), with a mask of two Laplacians that removes structure."""
    rows = grey[:-2] - 2 * grey[1:-1] + grey[2:]
    mask = rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]
    return float(np.sqrt(np.pi / 2) * np.abs(mask).mean() / 6)


def face_sharpness(image: Image.Image, box: FaceBox, crop: int) -> float:
    """Return the variance of the Laplacian of the face crop at `crop` pixels, as `imagine.people.faces.sharpness`."""
    edges = torch.tensor([[box.left, box.top, box.width, box.height]])
    return sharpness(crop_unmasked(_tensor(image)[None], edges, crop)[0])


def face_difference(one: Image.Image, one_box: FaceBox, two: Image.Image, two_box: FaceBox) -> float:
    """Return the difference of eyes and mouth in two pictures, from 0 (the same picture) to 1 (nothing in common).

    Both face boxes are resized to 32 x 32 pixels, and local brightness is subtracted. The band of the eyes and the band
    of the mouth are each compared by correlation, at the best of all shifts of up to 3 pixels. The result is 1 minus
    the mean of the two correlations, so a pasted copy scores near 0 at any size, place and exposure.

    A low value means a copy. A high value does not prove another expression, because another person, style or
    direction of light also increases it. In the portrait world, a slightly drifted drawing of the same picture has 0.01
    to 0.06, and another picture of the person has 0.5 to 0.8.
    """
    a, b = _detail(one, one_box), _detail(two, two_box)
    bands = [(round(low * _FACE_SIDE), round(high * _FACE_SIDE)) for low, high in _BANDS]
    alike = [_best_correlation(a[low:high], b[low:high]) for low, high in bands]
    return float(1 - np.mean(alike))


def _detail(image: Image.Image, box: FaceBox) -> NDArray[np.float32]:
    """Return the face at _FACE_SIDE pixels minus its blurred copy: the features without light and skin colour."""
    left, top = max(0.0, box.left), max(0.0, box.top)
    right, bottom = min(float(image.width), box.left + box.width), min(float(image.height), box.top + box.height)
    side = (_FACE_SIDE, _FACE_SIDE)
    if right - left < 1 or bottom - top < 1:
        return np.zeros(side, np.float32)
    grey = image.convert("L")
    small = np.asarray(grey.resize(side, Image.Resampling.BILINEAR, (left, top, right, bottom)), np.float32)
    mean = np.pad(small, 4, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(mean, (9, 9))
    detail: NDArray[np.float32] = small - windows.mean(axis=(2, 3))
    return detail


def _best_correlation(one: NDArray[np.float32], two: NDArray[np.float32]) -> float:
    """Return the highest correlation of the middle of `one` with any place in `two`, at least 0."""
    middle = one[_MAX_SHIFT:-_MAX_SHIFT, _MAX_SHIFT:-_MAX_SHIFT]
    places = np.lib.stride_tricks.sliding_window_view(two, middle.shape)
    middle = middle - middle.mean()
    places = places - places.mean(axis=(2, 3), keepdims=True)
    lengths = np.sqrt((middle**2).sum() * (places**2).sum(axis=(2, 3)))
    products = (places * middle).sum(axis=(2, 3))
    return float(np.max(products / np.maximum(lengths, 1e-6), initial=0.0))


def attribute_difference(one: Mapping[str, str], two: Mapping[str, str]) -> float | None:
    """Return the share of differing values among the attributes of POSE that both have; None if they share none."""
    both = [name for name in POSE if name in one and name in two]
    return sum(one[name] != two[name] for name in both) / len(both) if both else None
