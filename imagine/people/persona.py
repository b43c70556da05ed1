"""A persona: one person, looked at once.

`ImaginePipeline.enroll` makes one from one or many photos; every later call takes it in place of the photo, without a
face finder or a vision encoder having to run. It holds what the vision encoder saw (its penultimate features, before
the adapter's projection), so it fits every adapter trained on that encoder and refuses any other encoder. It holds no
picture: the file can be kept where the photo should not be.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imagine.errors import WeightsError
from imagine.networks.weights import same_encoder
from imagine.paths import as_path, kind_of, shorten_path
from imagine.records import FaceBox, FaceCrop

FORMAT_VERSION = "1"
KIND = "persona"
TENSOR = "vision_features"


@dataclass(frozen=True)
class Face:
    """One face that was used: where it lay in which photo, and how good the photo is."""

    reference: str  # the photo's path, or which one it was; for a dict of references "name: photo"
    box: FaceBox | None  # pixels of the upright photo; None: no face was found and the whole picture was used
    found: int  # how many faces the photo holds
    index: int  # which of them was used, 0 being the largest; -1 for the whole picture
    sharpness: float  # as FaceCrop.sharpness
    quality: str  # "good", or one sentence that says what is poor about the photo
    crop: Image.Image | None = field(default=None, compare=False)  # what the vision encoder saw; never saved

    @classmethod
    def of(cls, crop: FaceCrop, reference: str) -> "Face":
        """Describe a face crop made from the photo called `reference`."""
        return cls(reference, crop.box, len(crop.found), crop.index, crop.sharpness, crop.quality, crop.image)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, words and lists, ready for JSON."""
        box = None if self.box is None else {name: round(value, 3) for name, value in asdict(self.box).items()}
        plain = {name: getattr(self, name) for name in ("reference", "found", "index", "sharpness", "quality")}
        return {**plain, "box": box}


@dataclass(frozen=True, eq=False)
class Persona:
    """What a vision encoder saw of one person: features (tokens, width) of all photos, one after the other.

    `encoder` is the encoder's fingerprint (weights.fingerprint); `faces` has one entry per photo.
    """

    features: Tensor
    encoder: str
    faces: tuple[Face, ...] = ()

    @property
    def tokens(self) -> int:
        """How many vision tokens the person has."""
        return int(self.features.shape[0])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one small safetensors file, whole or not at all. Photo names and pictures are left out."""
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
        """Read a saved persona, bit for bit. Raises WeightsError if the file is not one."""
        file_path = as_path(path)
        if kind_of(file_path, WeightsError) != "file":
            raise WeightsError(
                f"There is no persona file {shorten_path(path)}; check the path, or make one with `imagine enroll`."
            )
        try:
            with safe_open(file_path, framework="pt") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                features = file.get_tensor(TENSOR) if TENSOR in file.keys() else None  # noqa: SIM118  (not a dict)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is not a complete safetensors file; enroll the person again.") from error
        if metadata.get("kind") != KIND or features is None or features.dim() != 2 or "encoder" not in metadata:
            raise WeightsError(f"{path} is not a persona; give a file made by `imagine enroll`.")
        if metadata.get("format_version") != FORMAT_VERSION:
            raise WeightsError(
                f"{path} is a persona of format version {metadata.get('format_version')}, but this version of imagine "
                f"reads {FORMAT_VERSION}; enroll the person again."
            )
        return cls(features, metadata["encoder"], _faces(metadata.get("faces", "[]"), path))

    def check_encoder(self, encoder: str) -> None:
        """Raise WeightsError unless the persona was made by the encoder with this fingerprint."""
        if not same_encoder(self.encoder, encoder):
            raise WeightsError(
                f"This persona was made by the vision encoder {self.encoder}, but the pipeline has {encoder}; "
                "enroll the person again with these weights."
            )


def concatenate(features: list[Tensor]) -> Tensor:
    """Join the features of several photos, each (tokens, width), along the sequence (paper, section 3.6)."""
    return features[0] if len(features) == 1 else torch.cat(features)


def _faces(text: str, path: str | os.PathLike[str]) -> tuple[Face, ...]:
    try:
        entries = json.loads(text)
        return tuple(
            Face(**{**entry, "box": None if entry["box"] is None else FaceBox(**entry["box"])}) for entry in entries
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} does not describe its faces properly; enroll the person again.") from error
