"""A persona: the encoded features of one person, computed once.

`ImaginePipeline.enroll` makes a persona from one or several photos. Every later call can use it in place of the photos,
without running a face finder or a vision encoder. It holds the vision encoder's output (the penultimate features,
before the adapter's projection), so it fits every adapter trained with that encoder and is refused with any other
encoder. It holds no picture, so the file may be kept where the photo may not.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from imagine.errors import WeightsError
from imagine.networks.files import why_unreadable
from imagine.networks.finite import check_finite
from imagine.networks.weights import same_encoder
from imagine.paths import as_path, kind_of, shorten_path, why_no_file
from imagine.people.pooling import Pooling, checked_pooling
from imagine.people.strangers import Identity
from imagine.personas.consent import UNRECORDED, Consent, from_text, to_text, today_utc
from imagine.personas.files import KIND, PARTIAL, SEALED_KIND, read_header, read_metadata
from imagine.personas.sealing import seal, unseal
from imagine.records import FaceBox, FaceCrop

FORMAT_VERSION = "2"  # 1 knew neither consent nor weights of photos
READABLE_VERSIONS = ("1", FORMAT_VERSION)
TENSOR = "vision_features"
SEALED_TENSOR = "encrypted"


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
    """The vision features (tokens, width) of one person: those of several photos concatenated, or their mean.

    `encoder` is the encoder's fingerprint (weights.fingerprint), or another key of a `readings.Reading`; `faces` has
    one entry per photo. `others` holds further features of the same photos by their keys, for a pipeline whose adapters
    read several.
    """

    features: Tensor
    encoder: str
    faces: tuple[Face, ...] = ()
    photo_weights: tuple[float, ...] = ()  # one per photo, 0 to 1 (`pooling.photo_weight`); empty in older files
    pooling: Pooling = "concatenate"
    consent: Consent | None = None
    encoder_name: str = ""  # what the encoder is called, for messages
    created: str = ""  # the day, as in 2026-11-30; empty in older files
    file: str = field(default="", compare=False)  # where it was loaded from, for messages
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Return the number of vision tokens."""
        return int(self.features.shape[0])

    @property
    def hash(self) -> str:
        """Return the first 12 hexadecimal digits of the SHA-256 of the features, which pictures record."""
        data = self.features.detach().float().cpu().contiguous()
        return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:12]

    @property
    def consent_basis(self) -> str:
        """Return the basis of the consent, or "not recorded"."""
        return UNRECORDED if self.consent is None else self.consent.basis

    def check_consent(self) -> None:
        """Raise ConsentError if the consent has expired; a persona without a consent is accepted."""
        if self.consent is not None:
            self.consent.check(f"The persona {self.file}" if self.file else "This persona")

    def save(self, path: str | os.PathLike[str], passphrase: str | None = None) -> None:
        """Write one small safetensors file, without photo names and pictures; on failure, no partial file replaces it.

        With a passphrase the file is encrypted (`imagine.personas.sealing`). Raises WeightsError if it cannot be
        written, and ConfigError if it cannot be encrypted.
        """
        path = as_path(path)
        faces = [{**face.as_dict(), "reference": f"photo {number}"} for number, face in enumerate(self.faces, 1)]
        metadata = {
            "format_version": FORMAT_VERSION,
            "kind": KIND,
            "encoder": self.encoder,
            "encoder_name": self.encoder_name,
            "tokens": str(self.tokens),
            "references": str(len(faces)),
            "pooling": self.pooling,
            "photo_weights": json.dumps(self.photo_weights),
            "consent": to_text(self.consent),
            "created": self.created or today_utc().isoformat(),
            "faces": json.dumps(faces),
        }
        tensors = {TENSOR: self.features, **{f"{TENSOR}.{n}": each for n, each in enumerate(self.others.values(), 1)}}
        if self.others:
            metadata["others"] = json.dumps(list(self.others))
        data = to_bytes({name: each.detach().cpu().contiguous() for name, each in tensors.items()}, metadata)
        if passphrase is not None:
            sealed, parameters = seal(data, passphrase)
            described = {"format_version": FORMAT_VERSION, "kind": SEALED_KIND, "encryption": parameters}
            data = to_bytes({SEALED_TENSOR: torch.frombuffer(bytearray(sealed), dtype=torch.uint8)}, described)
        unfinished = path.with_name(f"{path.name}{PARTIAL}")
        try:
            unfinished.write_bytes(data)
            unfinished.replace(path)
        except OSError as error:
            raise WeightsError(f"{path} cannot be written ({error}); choose a folder that exists.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], passphrase: str | None = None) -> "Persona":
        """Load a saved persona, bit-identical; the passphrase is needed only for an encrypted one.

        Raises WeightsError if the file is not a persona, or if the passphrase is missing or wrong. An expired consent
        does not prevent loading: the persona is refused where it is used (`check_consent`).
        """
        file_path = as_path(path)
        if (kind := kind_of(file_path, WeightsError)) == "other":
            raise WeightsError(why_no_file(path, kind))
        if kind != "file":
            raise WeightsError(
                f"There is no persona file {shorten_path(path)}; check the path, or make one with `imagine enroll`."
            )
        metadata = read_metadata(file_path)  # first, because the file may be gigabytes of something else
        if metadata.get("kind") not in (KIND, SEALED_KIND):
            return cls._read(path, metadata, {})
        try:
            data = file_path.read_bytes()
            tensors = from_bytes(data)
        except (SafetensorError, OSError) as error:
            raise WeightsError(why_unreadable(file_path, "enroll the person again")) from error
        if metadata.get("kind") == SEALED_KIND and SEALED_TENSOR in tensors and "encryption" in metadata:
            if passphrase is None:
                raise WeightsError(
                    f"{path} is encrypted: give its passphrase, as in Persona.load(FILE, passphrase=...), or with "
                    "--passphrase-file on the command line."
                )
            sealed = tensors[SEALED_TENSOR].numpy().tobytes()
            data = unseal(sealed, metadata["encryption"], passphrase, str(path))
            metadata, tensors = read_header(data), from_bytes(data)
        return cls._read(path, metadata, tensors)

    @classmethod
    def _read(
        cls, path: str | os.PathLike[str], metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
    ) -> "Persona":
        """Return the persona of a file's metadata and tensors. Raises WeightsError if they are not a persona's."""
        features = tensors.get(TENSOR)
        if metadata.get("kind") != KIND or features is None or features.dim() != 2 or "encoder" not in metadata:
            raise WeightsError(f"{path} is not a persona; give a file made by `imagine enroll`.")
        if metadata.get("format_version") not in READABLE_VERSIONS:
            raise WeightsError(
                f"{path} is a persona of format version {metadata.get('format_version')}, but this version of imagine "
                f"reads {' and '.join(READABLE_VERSIONS)}; enroll the person again."
            )
        others = _others(metadata.get("others", "[]"), tensors, path)
        check_finite(str(path), {TENSOR: features, **others})
        try:
            weights = tuple(map(float, json.loads(metadata.get("photo_weights", "[]"))))
            consent = from_text(metadata.get("consent", "null"))
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{path} does not describe its persona properly; enroll the person again.") from error
        faces = _faces(metadata.get("faces", "[]"), path)
        return cls(
            features, metadata["encoder"], faces, weights, checked_pooling(metadata.get("pooling", "concatenate")),
            consent, metadata.get("encoder_name", ""), metadata.get("created", ""), os.fspath(path), others,
        )  # fmt: skip

    def check_encoder(self, encoder: str) -> None:
        """Raise WeightsError unless the persona was made by the encoder with this fingerprint."""
        self.features_of(encoder)

    def features_of(self, encoder: str) -> Tensor:
        """Return the features that this key names. Raise WeightsError if the persona has none of them."""
        for known, features in ((self.encoder, self.features), *self.others.items()):
            if same_encoder(known, encoder):
                return features
        made = f"{self.encoder_name} ({self.encoder})" if self.encoder_name else self.encoder
        raise WeightsError(
            f"{f'The persona {self.file}' if self.file else 'This persona'} was made by the vision encoder {made}, "
            f"but the pipeline has {encoder}; enroll the person again with these weights."
        )


def _others(text: str, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    try:
        return {str(key): tensors[f"{TENSOR}.{number}"] for number, key in enumerate(json.loads(text), 1)}
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} does not describe its features properly; enroll the person again.") from error


def _faces(text: str, path: str | os.PathLike[str]) -> tuple[Face, ...]:
    try:
        entries = json.loads(text)
        boxes = [None if entry["box"] is None else FaceBox.from_dict(entry["box"]) for entry in entries]
        return tuple(Face(**{**entry, "box": box}) for entry, box in zip(entries, boxes, strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} does not describe its faces properly; enroll the person again.") from error
