"""A persona: the encoded features of one person, computed once.

`ImaginePipeline.enroll` makes a persona from one or several photos. Every later call can use it in place of the photos,
without running a face finder or a vision encoder. It holds the vision encoder's output (the penultimate features,
before the adapter's projection), so it fits every adapter trained with that encoder and is refused with any other
encoder. It holds no picture, so the file may be kept where the photo may not.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imagine.errors import WeightsError
from imagine.networks.files import why_unreadable
from imagine.networks.finite import check_finite
from imagine.networks.weights import same_encoder
from imagine.paths import as_path, kind_of, shorten_path, why_no_file
from imagine.people.strangers import Identity
from imagine.records import FaceBox, FaceCrop

FORMAT_VERSION = "1"
KIND = "persona"
TENSOR = "vision_features"


@dataclass(frozen=True)
class Face:
    """One face that was used: its position in the photo, and the quality of the photo."""

    reference: str  # the photo's path, or its number; for a dict of references "name: photo"
    box: FaceBox | None  # pixels of the upright photo; None: no face was found and the whole picture was used
    found: int  # number of faces in the photo
    index: int  # index of the face that was used, 0 being the largest; -1 for the whole picture
    sharpness: float  # as FaceCrop.sharpness
    quality: str  # "good", or one sentence on the photo's defects
    crop: Image.Image | None = field(default=None, compare=False)  # the vision encoder's input; never saved
    identity: Identity | None = field(default=None, compare=False)  # to compare several photos; never saved

    @classmethod
    def of(cls, crop: FaceCrop, reference: str, identity: Identity | None = None) -> "Face":
        """Describe a face crop made from the photo called `reference`."""
        return cls(reference, crop.box, len(crop.found), crop.index, crop.sharpness, crop.quality, crop.image, identity)

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, words and lists, ready for JSON."""
        box = None if self.box is None else self.box.as_dict()
        plain = {name: getattr(self, name) for name in ("reference", "found", "index", "sharpness", "quality")}
        return {**plain, "box": box}


@dataclass(frozen=True, eq=False)
class Persona:
    """The vision features (tokens, width) of one person, those of several photos concatenated.

    `encoder` is the encoder's fingerprint (weights.fingerprint); `faces` has one entry per photo.
    """

    features: Tensor
    encoder: str
    faces: tuple[Face, ...] = ()

    @property
    def tokens(self) -> int:
        """Return the number of vision tokens."""
        return int(self.features.shape[0])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one small safetensors file, without photo names and pictures; on failure, no partial file replaces it.

        Raises WeightsError if it cannot be written.
        """
        path = as_path(path)
        faces = [{**face.as_dict(), "reference": f"photo {number}"} for number, face in enumerate(self.faces, 1)]
        metadata = {
            "format_version": FORMAT_VERSION,
            "kind": KIND,
            "encoder": self.encoder,
            "tokens": str(self.tokens),
            "faces": json.dumps(faces),
        }
        unfinished = path.with_name(f"{path.name}.partial")
        try:
            save_file({TENSOR: self.features.detach().cpu().contiguous()}, unfinished, metadata)
            unfinished.replace(path)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{path} cannot be written ({error}); choose a folder that exists.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Persona":
        """Load a saved persona, bit-identical. Raise WeightsError if the file is not a persona."""
        file_path = as_path(path)
        if (kind := kind_of(file_path, WeightsError)) == "other":
            raise WeightsError(why_no_file(path, kind))
        if kind != "file":
            raise WeightsError(
                f"There is no persona file {shorten_path(path)}; check the path, or make one with `imagine enroll`."
            )
        try:
            with safe_open(file_path, framework="pt") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                features = file.get_tensor(TENSOR) if TENSOR in file.keys() else None  # noqa: SIM118  (not a dict)
        except (SafetensorError, OSError) as error:
            raise WeightsError(why_unreadable(file_path, "enroll the person again")) from error
        if metadata.get("kind") != KIND or features is None or features.dim() != 2 or "encoder" not in metadata:
            raise WeightsError(f"{path} is not a persona; give a file made by `imagine enroll`.")
        if metadata.get("format_version") != FORMAT_VERSION:
            raise WeightsError(
                f"{path} is a persona of format version {metadata.get('format_version')}, but this version of imagine "
                f"reads {FORMAT_VERSION}; enroll the person again."
            )
        check_finite(str(path), {TENSOR: features})
        return cls(features, metadata["encoder"], _faces(metadata.get("faces", "[]"), path))

    def check_encoder(self, encoder: str) -> None:
        """Raise WeightsError unless the persona was made by the encoder with this fingerprint."""
        if not same_encoder(self.encoder, encoder):
            raise WeightsError(
                f"This persona was made by the vision encoder {self.encoder}, but the pipeline has {encoder}; "
                "enroll the person again with these weights."
            )


def concatenate(features: list[Tensor]) -> Tensor:
    """Concatenate the features of several photos, each (tokens, width), along the sequence (paper, section 3.6)."""
    return features[0] if len(features) == 1 else torch.cat(features)


def _faces(text: str, path: str | os.PathLike[str]) -> tuple[Face, ...]:
    try:
        entries = json.loads(text)
        boxes = [None if entry["box"] is None else FaceBox.from_dict(entry["box"]) for entry in entries]
        return tuple(Face(**{**entry, "box": box}) for entry, box in zip(entries, boxes, strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} does not describe its faces properly; enroll the person again.") from error
