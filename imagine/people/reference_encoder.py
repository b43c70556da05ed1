"""Encode references for a pipeline: photo to face crop to vision features to persona, and then to tokens.

Every pipeline with an identity adapter uses this mixin, whatever its denoiser, so that a persona means the same in all
of them. The features of a photo's file are cached until the file changes: a person is encoded once for any number of
pictures. The encoder is our `VisionEncoder`, or the transformers encoder in Stable Diffusion's folders.
"""

import os
import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from imagine.adapter.adapter import Adapter, BranchSpec
from imagine.adapter.router import MAX_PEOPLE
from imagine.errors import ConfigError, FaceError, PictureError, PromptError, WeightsError
from imagine.networks import weights
from imagine.networks.device import execution_device
from imagine.networks.encoders import CLIP_MEAN, CLIP_STD, VisionEncoder
from imagine.networks.finite import is_finite, why_not_finite
from imagine.paths import as_path, kind_of
from imagine.people import photo_recogniser
from imagine.people.arcface import DEFAULT_PACK, InsightFaceEmbedder
from imagine.people.crops import crop_as_trained
from imagine.people.drawing_recogniser import FOLDER as RECOGNISER
from imagine.people.drawing_recogniser import DrawingRecogniser
from imagine.people.faces import LEARNED, TURNS, FaceChoice, FaceFinder, crop_face, default_finder
from imagine.people.persona import Face, Persona
from imagine.people.photo_recogniser import PhotoRecogniser
from imagine.people.photos import open_photo
from imagine.people.pooling import Pooling, checked_pooling, photo_weight, pool
from imagine.people.readings import FACE_SIDE, FaceEmbedder, Reader, Reading, face_embedding, with_embedding
from imagine.people.safety import SafetyClassifier, refuse_flagged
from imagine.people.strangers import FaceRecogniser, Identity, find_stranger
from imagine.personas.consent import Consent, joined
from imagine.records import VISION, FaceCrop, Tokens, repeat
from imagine.request import Person, Request

FINDER = "finder"  # the finder's folder among a pipeline's files
MAX_CACHED_PERSONAS = 64  # cached personas of photos; each takes about a megabyte

OnNoFace = Literal["error", "whole"]


def vision_features(encoder: nn.Module, crops: Tensor, pooled: bool = False) -> Tensor:
    """Encode crops (B, 3, S, S), 0 to 1, to penultimate tokens (B, T, W) or, with `pooled`, to embeddings (B, 1, E)."""
    crops = crops.to(cast(Any, encoder).dtype)
    if isinstance(encoder, VisionEncoder):
        if not pooled:
            return cast(Tensor, encoder(crops))
        if (hook := getattr(encoder, "_hf_hook", None)) is not None:  # offloaded: accelerate hooks only `forward`
            hook.pre_forward(encoder)
        return encoder.embed(crops)[:, None]
    is_siglip = str(cast(Any, encoder).config.model_type).startswith("siglip")
    statistics = _SIGLIP_MEAN_STD if is_siglip else _CLIP_MEAN_STD
    mean, std = (torch.tensor(each, device=crops.device, dtype=crops.dtype).view(3, 1, 1) for each in statistics)
    output = encoder((crops - mean) / std, output_hidden_states=True)
    return cast(Tensor, output.image_embeds[:, None] if pooled else output.hidden_states[-2])


_CLIP_MEAN_STD = (CLIP_MEAN, CLIP_STD)
_SIGLIP_MEAN_STD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class EncoderInfo:
    """Facts about a vision encoder: its fingerprint, the side of its crops in pixels, and its tokens per crop."""

    fingerprint: str
    image_size: int
    tokens: int

    @classmethod
    def of(cls, encoder: nn.Module) -> "EncoderInfo":
        config = cast(Any, encoder).config
        patches = int(config.image_size) // int(config.patch_size)
        return cls(weights.fingerprint(encoder), int(config.image_size), 1 + patches**2)


class ReferenceEncoderMixin:
    """The part of a pipeline that encodes references; the pipeline adds `adapter`, `reference_encoder` and a device."""

    adapter: Adapter | None
    _finder: FaceFinder | None = None
    _safety: SafetyClassifier | None = None
    _finder_folder: Path | None = None
    _encoder_info: "tuple[nn.Module | None, int, EncoderInfo] | None" = None
    _zero_features: "tuple[str, Tensor] | None" = None
    _face_recogniser: FaceEmbedder | None = None

    @property
    @abstractmethod
    def reference_encoder(self) -> nn.Module | None:
        """Return the encoder for references; each pipeline defines its own."""

    @property
    def encoder_fingerprint(self) -> str:
        """Return the fingerprint of this vision encoder, which personas and adapters store."""
        return self._current_encoder_info().fingerprint

    @property
    def finder(self) -> FaceFinder:
        """The finder of faces in photos; set it to use another. By default the weights' own finder and the cascade."""
        if self._finder is None:
            folder = self._finder_folder
            self._finder = default_finder(folder if folder is not None and folder.is_dir() else _shipped_finder())
        return self._finder

    @finder.setter
    def finder(self, finder: FaceFinder) -> None:
        self._finder = finder
        self.__dict__.pop("_persona_cache", None)

    @property
    def safety(self) -> SafetyClassifier | None:
        """The classifier of prompts, photos and pictures (`imagine.people.safety`); None, the default, for none."""
        return self._safety

    @safety.setter
    def safety(self, classifier: SafetyClassifier | None) -> None:
        self._safety = classifier
        self.__dict__.pop("_persona_cache", None)  # its photos were not checked by this classifier

    @property
    def face_recogniser(self) -> FaceEmbedder:
        """The recogniser whose embeddings FaceID adapters read: by default InsightFace's. Set it to use another."""
        if self._face_recogniser is None:
            self._face_recogniser = InsightFaceEmbedder()
        return self._face_recogniser

    @face_recogniser.setter
    def face_recogniser(self, recogniser: FaceEmbedder) -> None:
        self._face_recogniser = recogniser
        self.__dict__.pop("_persona_cache", None)

    def _readers(self) -> list[Reader]:
        """Return the branches that read the references; without an identity adapter there are none."""
        return [] if self.adapter is None or identity_spec(self.adapter) is None else [Reader(self.adapter)]

    def _readings(self) -> list[Reading]:
        """Return what a persona for this pipeline must hold, the features of the first branch first."""
        return list(dict.fromkeys(reader.reading for reader in self._readers())) or [Reading()]

    def _key(self, reading: Reading) -> str:
        """Return the key of a reading's features in a persona."""
        fingerprint = self.encoder_fingerprint if reading.reads_encoder else ""
        # The default recogniser need not be installed where only personas are used.
        return reading.key(fingerprint, DEFAULT_PACK if self._face_recogniser is None else self._face_recogniser.name)

    # --- from photos to personas ------------------------------------------------------------------------------------

    @torch.no_grad()
    def enroll(
        self,
        photos: Any,
        face: FaceChoice | Sequence[FaceChoice] = "largest",
        on_no_face: OnNoFace = "error",
        check_identity: bool = True,
        pooling: Pooling = "concatenate",
        consent: Consent | None = None,
    ) -> Persona:
        """Encode one photo, or several of the same person, and return the persona.

        `face` is one choice for all photos, or a list with one choice for each.
        By default the tokens of several photos are concatenated, so that attention can use all of them; with
        pooling="mean" they are averaged, each photo weighted by its quality (`imagine.people.pooling`). `consent` is
        recorded in the persona, and replaces that of personas among `photos`. Raises PictureError or FaceError, with
        the photo's name, if one cannot be used, and ConsentError for a persona whose consent has expired. With
        `check_identity`, also raises FaceError if a photograph shows another person than the others; for drawings,
        `Face.quality` warns of it instead.
        """
        pooling = checked_pooling(pooling)
        references = tuple(photos) if isinstance(photos, (list, tuple)) else (photos,)
        if not references:
            raise PromptError("There is no photo to enroll: give at least one.")
        if isinstance(face, (list, tuple)) and len(face) != len(references):
            raise FaceError(
                f"There are {len(references)} photos but {len(face)} choices of a face: give one for each photo, or "
                "one for all."
            )
        person = Person("", references)
        made = self._enroll_person(person, face, on_no_face, check_identity, identify=check_identity, pooling=pooling)
        return made if consent is None else replace(made, consent=consent)

    def _current_encoder_info(self) -> EncoderInfo:
        """Return facts about the encoder; compute them again only if its weights have changed."""
        encoder = self.reference_encoder
        known = self._encoder_info
        if encoder is None and known is not None and known[0] is None:  # freed, but its personas are still valid
            return known[2]
        if encoder is None:
            raise WeightsError(
                "This pipeline has no encoder for references: give it the one that the adapter was trained with, as in "
                "vision_encoder=VisionEncoder.from_pretrained(FOLDER)."
            )
        if known is not None and known[0] is encoder and any(each.is_meta for each in encoder.parameters()):
            return known[2]  # offloaded layer by layer, so the weights are not available
        version = hash(tuple((id(each), 0 if each.is_inference() else each._version) for each in encoder.parameters()))
        if known is None or known[0] is not encoder or known[1] != version:
            known = self._encoder_info = (encoder, version, EncoderInfo.of(encoder))
        return known[2]

    def check_persona(self, persona: Persona) -> None:
        """Raise WeightsError unless the persona holds what this pipeline reads of a person."""
        for reading in self._readings():
            persona.check_encoder(self._key(reading))

    def _encoder_name(self) -> str:
        """Return what the encoder is called: as the adapter's file calls it, else its class."""
        named = {} if self.adapter is None else self.adapter.metadata
        encoder = self.reference_encoder
        return str(named.get("encoder") or ("" if encoder is None else type(encoder).__name__))

    def _enroll_person(
        self, person: Person, face: FaceChoice | Sequence[FaceChoice], on_no_face: OnNoFace,
        check_identity: bool = True, identify: bool = False, pooling: Pooling = "concatenate",
    ) -> Persona:  # fmt: skip
        """Combine one person's photos and personas into one persona; faces are named after the photos.

        With `identify` each face keeps its embedding, so that faces of pictures can be compared with it.
        """
        check_identity = check_identity and len(person.references) > 1
        identify = identify or check_identity
        choices = face if isinstance(face, (list, tuple)) else [face] * len(person.references)
        encoded = [
            each if isinstance(each, Persona) else self._enroll_photo(each, number, choice, on_no_face, identify)
            for number, (each, choice) in enumerate(zip(person.references, choices, strict=True), 1)
        ]
        for each in encoded:
            each.check_consent()
        readings = self._readings()
        keys, weights = [self._key(reading) for reading in readings], [each.photo_weights for each in encoded]
        tokens = self._current_encoder_info().tokens if any(reading.reads_encoder for reading in readings) else 1
        features = {
            key: pool([each.features_of(key).to("cpu") for each in encoded], weights, reading.length(tokens), pooling)
            for key, reading in zip(keys, readings, strict=True)
        }
        faces = [one for each in encoded for one in each.faces]
        if check_identity:
            faces = _check_one_person(faces)
        if person.name:
            faces = [replace(one, reference=f"{person.name}: {one.reference}") for one in faces]
        every = tuple(one for each in weights for one in each) if all(weights) else ()
        consent = joined([each.consent for each in encoded])
        kept = encoded[0].pooling if len(encoded) == 1 and pooling == "concatenate" else pooling
        first = features.pop(keys[0])
        return Persona(first, keys[0], tuple(faces), every, kept, consent, self._encoder_name(), others=features)

    def _enroll_photo(
        self, photo: Any, number: int, face: FaceChoice, on_no_face: OnNoFace, identify: bool = False
    ) -> Persona:
        file = as_path(photo) if isinstance(photo, (str, os.PathLike)) else None
        if file is not None and file.suffix == ".safetensors":
            return Persona.load(file)
        readings = self._readings()
        keys = tuple(self._key(reading) for reading in readings)
        is_file = file is not None and kind_of(file, PictureError) == "file"
        key = (_file_state(cast(Path, file)), face, on_no_face, keys, identify) if is_file else None
        cache: dict[Any, Persona] = self.__dict__.setdefault("_persona_cache", {})
        for known in () if key is None else ((*key[:-1], True), key):  # one with the embedding also serves without it
            if (persona := cache.get(known)) is not None:
                return persona
        reads_encoder = any(reading.reads_encoder for reading in readings)
        if reads_encoder and self.reference_encoder is None:
            raise WeightsError("The vision encoder was freed: give a persona that was enrolled before, not a photo.")
        image, name = open_photo(photo), f"photo {number}" if file is None else os.fspath(photo)
        if self._safety is not None:
            refuse_flagged(self._safety.check_photo(image), name)
        size = self._current_encoder_info().image_size if reads_encoder else FACE_SIDE
        crop = crop_face(image, self.finder, size, face, on_no_face)
        cuts = [crop_as_trained(image, crop, reading.crop, size) for reading in readings]
        features = [self._features(reading, image, cut) for reading, cut in zip(readings, cuts, strict=True)]
        identity = self._identify(image, crop) if identify else None
        shown, weight = (Face.of(cuts[0], name, identity),), (photo_weight(crop, size),)
        persona = Persona(features[0], keys[0], shown, weight, others=dict(zip(keys[1:], features[1:], strict=True)))
        if key is not None:
            while len(cache) >= MAX_CACHED_PERSONAS:
                cache.pop(next(iter(list(cache))), None)  # another thread may have removed it
            cache[key] = persona
        return persona

    def _features(self, reading: Reading, image: Image.Image, crop: FaceCrop) -> Tensor:
        """Return what a reading reads of one photo and its crop, (length, width), in float32 on the CPU."""
        tokens, embedding = torch.empty(0), torch.empty(0)
        if reading.reads_encoder:
            encoder = cast(nn.Module, self.reference_encoder)
            pixels = torch.from_numpy(np.array(crop.image)).permute(2, 0, 1)[None].float() / 255
            pixels = pixels.to(execution_device(self))
            tokens = vision_features(encoder, pixels, reading.output == "pooled")[0].float().cpu()
            if not is_finite(tokens):  # a persona with such numbers would make every picture of the person black
                raise WeightsError(why_not_finite({"the vision encoder": encoder}))
        if not reading.reads_face:
            return tokens
        spec = next(reader.spec for reader in self._readers() if reader.reading == reading)
        upright = image.transpose(TURNS[crop.turned]) if crop.turned else image
        embedding = face_embedding(self.face_recogniser, upright, crop.box, spec.face_width or spec.input_width)
        if reading.output != "raw face":
            embedding = torch.nn.functional.normalize(embedding, dim=0)
        return with_embedding(embedding, tokens) if reading.reads_encoder else embedding[None]

    def _identify(self, image: Image.Image, crop: FaceCrop) -> Identity | None:
        """Embed the face of a crop with the recogniser for its kind of picture; None if that is not installed."""
        if crop.box is None:
            return None
        recogniser = self._drawing_recogniser() if crop.box.finder == LEARNED else _photo_recogniser()
        if recogniser is None:
            return None
        upright = image.transpose(TURNS[crop.turned]) if crop.turned else image
        return Identity(recogniser, recogniser.embed(upright, crop.box))

    def _drawing_recogniser(self) -> FaceRecogniser | None:
        folder = self._finder_folder or _shipped_finder()
        return None if folder is None else _load_drawing_recogniser(folder.parent)

    def _save_small_networks(self, folder: Path) -> None:
        """Copy the finder, and the recogniser that checks drawings, from the pipeline's weights to `folder`."""
        if self._finder_folder is None:
            return
        for name in (FINDER, RECOGNISER):
            if (source := self._finder_folder.parent / name).is_dir():
                shutil.copytree(source, folder / name)

    def _picture_recogniser(self) -> FaceRecogniser | None:
        """Return the recogniser for the pictures that this pipeline draws: by default photographs; None without one."""
        return _photo_recogniser()

    def _personas_for(
        self, requests: Sequence[Request], face: FaceChoice, on_no_face: OnNoFace, identify: bool = False
    ) -> list[list[Persona]]:
        """Encode each person once, even if in several pictures; return one list of personas per request."""
        if not self._readers() and any(request.people for request in requests):
            raise WeightsError(
                "This pipeline has no identity adapter: load one with load_adapter, or give no reference."
            )
        enrolled: dict[tuple[Any, ...], Persona] = {}
        people: list[list[Persona]] = []
        for request in requests:
            people.append([])
            for person in request.people:
                # Paths are compared by value; pictures and personas by identity, and the requests keep them alive.
                key = (
                    person.name,
                    *(each if isinstance(each, (str, os.PathLike)) else id(each) for each in person.references),
                )
                if key not in enrolled:
                    enrolled[key] = self._enroll_person(person, face, on_no_face, identify=identify)
                people[-1].append(enrolled[key])
        return people

    # --- from personas to tokens ------------------------------------------------------------------------------------

    def _vision_tokens(
        self, personas: Sequence[Sequence[Persona]], copies: int, reader: Reader | None = None
    ) -> Tokens | None:
        """Return vision tokens (pictures, people * longest, width); None if no picture shows a person.

        If a picture has several people, every person of every picture has equally many tokens, some of them masked.
        """
        if not any(personas):
            return None
        reader = reader or self._identity_reader()
        key = self._key(reader.reading)
        rows = [[persona.features_of(key) for persona in people] for people in personas]
        return repeat(self._project(rows, reader), copies)

    def _identity_reader(self) -> Reader:
        """Return the identity adapter's branch, which exists where there are people (`_personas_for`)."""
        assert self.adapter is not None
        return Reader(self.adapter)

    def _vision_groups(
        self, personas: Sequence[Sequence[Persona]], copies: int, reader: Reader | None = None
    ) -> Tensor | None:
        """Return which people each picture has (pictures, people), to tell their tokens apart; None if at most one.

        Raises ConfigError if a picture has more people than the adapter's routers tell apart.
        """
        most = max(map(len, personas), default=0)
        spec = identity_spec(self.adapter) if reader is None else reader.spec
        if most < 2:
            return None
        if most > MAX_PEOPLE and spec is not None and spec.router:
            raise ConfigError(f"A picture can show {MAX_PEOPLE} people, not {most}: leave some of them out.")
        counts = torch.tensor([len(people) for people in personas])
        present = torch.arange(most) < counts[:, None]
        return present.repeat_interleave(copies, 0).to(execution_device(self))

    def _absent_tokens(self, count: int, reader: Reader | None = None) -> Tokens:
        """Return a branch's tokens for `count` pictures without people, if it was trained with "zeros".

        As in IP-Adapters: the features of a picture that is zero after normalisation, or a zero embedding.
        """
        reader = reader or self._identity_reader()
        reading = reader.reading
        needs_picture = reading.reads_encoder and reading.output != "pooled"
        row = reading.zeros(reader.spec, self._zero_picture_features() if needs_picture else None)
        return repeat(self._project([[row]], reader), count)

    def _zero_picture_features(self) -> Tensor:
        """Return the encoder's features of a picture of zeros, (tokens, width), computed once."""
        info, encoder = self._current_encoder_info(), self.reference_encoder
        if self._zero_features is None or self._zero_features[0] != info.fingerprint:
            assert encoder is not None  # `_keep_encoder_info` is called before the encoder is freed
            grey = torch.tensor(CLIP_MEAN, device=execution_device(self)).view(3, 1, 1)
            crops = grey.expand(1, 3, info.image_size, info.image_size)
            self._zero_features = (info.fingerprint, vision_features(encoder, crops)[0].float().cpu())
        return self._zero_features[1]

    def _keep_encoder_info(self) -> None:
        """Store the facts about the encoder that are needed after it is freed."""
        self._zero_picture_features()
        self._encoder_info = (None, 0, self._current_encoder_info())

    def _project(self, rows: Sequence[Sequence[Tensor]], reader: Reader) -> Tokens:
        """Return a branch's tokens of the features (length, width) of each person in each row.

        The tokens are (rows, people * longest, width), where `people` is the greatest number in a row; what a row lacks
        is masked.
        """
        adapter, spec, reading = reader.adapter, reader.spec, reader.reading
        present = [person for row in rows for person in row]
        most, longest, width = max(map(len, rows)), max(map(len, present)), present[0].shape[1]
        if width != spec.feature_width:
            raise WeightsError(
                f"The identity adapter reads vision features of width {spec.feature_width}, but the vision "
                f"encoder gives {width}: use the encoder that belongs to the adapter."
            )
        features = torch.zeros(len(rows), most, longest, width)
        mask = torch.zeros(len(rows), most, longest, dtype=torch.bool)
        for number, row in enumerate(rows):
            for place, person in enumerate(row):
                features[number, place, : len(person)] = person
                mask[number, place, : len(person)] = True
        features, mask = features.flatten(1, 2), mask.flatten(1)
        if spec.projection in ("plus", "faceid-plus"):  # it projects each picture separately
            length = reading.length(self._current_encoder_info().tokens if reading.reads_encoder else 1)
            features, mask = features.unflatten(1, (-1, length)), mask[:, ::length]
        device = execution_device(self)
        values = adapter.tokens(reader.branch, features.to(device, adapter.dtype)).values
        if mask.all():
            return Tokens(values)
        return Tokens(values, mask.repeat_interleave(values.shape[1] // mask.shape[1], 1).to(device))

    def _identity_strength(self, scale: Any, personas: Sequence[Sequence[Persona]], copies: int) -> Tensor:
        """Return the identity scale of every picture, (pictures,); 0 where there are no people."""
        try:
            scales = torch.as_tensor(scale, dtype=torch.float32).flatten()
        except (TypeError, ValueError, RuntimeError):  # text, None, nested lists
            scales = torch.empty(0)
        has_bool = any(isinstance(each, bool) for each in (scale if isinstance(scale, (list, tuple)) else [scale]))
        if has_bool or len(scales) not in (1, len(personas)) or not scales.isfinite().all():
            raise ConfigError(
                f"identity_scale={scale!r} must be one number, or one for each of {len(personas)} prompts."
            )
        present = torch.tensor([bool(people) for people in personas], dtype=torch.float32)
        return (scales * present).repeat_interleave(copies).to(execution_device(self))


@lru_cache(maxsize=1)
def _photo_recogniser() -> FaceRecogniser | None:
    return PhotoRecogniser() if photo_recogniser.is_installed() else None


@lru_cache(maxsize=4)
def _load_drawing_recogniser(weights: Path) -> FaceRecogniser | None:
    return DrawingRecogniser.from_weights(weights)


def _check_one_person(faces: list[Face]) -> list[Face]:
    """Raise FaceError if a photograph shows another person than the others; add a warning to a drawing's quality."""
    stranger = find_stranger([face.identity for face in faces])
    if stranger is None:
        return faces
    found = faces[stranger.index]
    limit = f"distance {stranger.distance:.2f}, one person is below {stranger.recogniser.same:.2f}"
    if stranger.recogniser.is_certain:
        raise FaceError(
            f"{found.reference} shows another person than the other photos ({limit}): leave it out, choose another of "
            "its faces, or pass check_identity=False (--no-identity-check) to use it all the same."
        )
    warning = f"It may show another person than the other pictures ({limit})."
    quality = warning if found.quality == "good" else f"{found.quality} {warning}"
    return [replace(face, quality=quality) if face is found else face for face in faces]


def identity_spec(adapter: Adapter | None) -> BranchSpec | None:
    """Return the adapter's identity branch, if it has one."""
    specs = () if adapter is None else adapter.branch_specs
    return next((spec for spec in specs if spec.name == VISION), None)


def check_encoder(adapter: Adapter, encoder: str) -> None:
    """Raise WeightsError if the adapter's metadata names another vision encoder."""
    trained = adapter.metadata.get("encoder_fingerprint", encoder)
    if identity_spec(adapter) is not None and not weights.same_encoder(trained, encoder):
        raise WeightsError(
            f"This adapter was trained with the vision encoder {trained}, but the pipeline has {encoder}: "
            "use the image_encoder folder that belongs to the adapter."
        )


def saved_metadata(adapter: Adapter) -> Mapping[str, str]:
    """Return the metadata for a saved adapter, taken from its own file if it came from one."""
    unknown = {name: "unspecified" for name in ("base", "encoder", "feature_layer", "tokens", "licence")}
    return {**unknown, **adapter.metadata}


def _file_state(file: Path) -> tuple[str, int, int]:
    """Return values that change whenever the file changes."""
    found = file.stat()
    return str(file.resolve()), found.st_mtime_ns, found.st_size


def _shipped_finder() -> Path | None:
    """Return the finder among the shipped weights, for pipelines whose own folder has none."""
    try:
        folder = weights.default_folder() / FINDER
    except WeightsError:
        return None
    return folder if folder.is_dir() else None
