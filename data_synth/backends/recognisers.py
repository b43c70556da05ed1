"""Find the faces in pictures and compute their identity embeddings, with our judge or with InsightFace.

The measurer and the import of photos grouped by person compare faces with a recogniser, and your own code can use one
too. The similarities of different recognisers have different scales, so a threshold is valid for one recogniser only.
With ArcFace, real photos of one person have a median cosine near 0.46 (arXiv 2510.14975). Movie Gen drops pairs below
0.7 (arXiv 2410.13720).
"""

import functools
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from data_synth.backends.contracts import Backend, Failed
from data_synth.backends.local_models import choose_device, failure, fingerprint, identity_of, loading, source_identity
from imagine.errors import ConfigError, ImagineError, PictureError, WeightsError
from imagine.networks.recogniser import Recogniser as RecogniserNetwork
from imagine.networks.weights import default_folder
from imagine.people import photo_finder, photo_recogniser
from imagine.people.faces import (
    LEARNED,
    AutoFinder,
    FaceFinder,
    InsightFaceFinder,
    LearnedFinder,
    crop_faces,
    default_finder,
    model_pack,
)
from imagine.people.photo_finder import YuNetFinder
from imagine.people.photo_recogniser import PhotoRecogniser
from imagine.people.photos import PhotoSource, open_photo
from imagine.records import FaceBox
from imagine.settings import validated

RECOGNISERS: Mapping[str, str] = {
    "judge": "data_synth.backends.recognisers:JudgeRecogniser",
    "dlib": "data_synth.backends.recognisers:DlibRecogniser",
    "insightface": "data_synth.backends.recognisers:InsightFaceRecogniser",
}


@dataclass(frozen=True, eq=False)
class KnownFace:
    """One face in a picture and its identity embedding."""

    box: FaceBox  # in pixels of the upright picture
    embedding: NDArray[np.float32] = field(repr=False)  # (D,), of length 1


class Recogniser(Backend, Protocol):
    """A backend that finds faces and computes their identity embeddings."""

    def recognise(self, pictures: Sequence[PhotoSource]) -> list[tuple[KnownFace, ...] | Failed]:
        """Return all faces of each picture, largest first; () if a picture has none.

        pictures: paths, contents of files, Pillow images and other photo sources.
        """
        ...


def similarity(one: KnownFace, two: KnownFace) -> float:
    """Return the cosine of two embeddings from the same recogniser, -1 to 1."""
    return float(np.clip(one.embedding @ two.embedding, -1.0, 1.0))


def make_recogniser(name: str, settings: Mapping[str, Any] | None = None) -> Recogniser:
    """Return a recogniser by its name: "judge", "insightface" or "package.module:Class". Call its `load()` before use.

    Raises ConfigError for an unknown name or setting.
    """
    class_path = RECOGNISERS.get(name, name)
    module, _, kind = class_path.partition(":")
    try:
        recogniser_class = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"There is no recogniser {name!r}. Choose {', '.join(RECOGNISERS)}, or name a class (package.module:Class)."
        ) from error
    recogniser: Recogniser = recogniser_class(
        validated(recogniser_class.Settings, settings or {}, f"recogniser {name}")
    )
    return recogniser


class JudgeRecogniser:
    """A recogniser with our judge, for people of the portrait world or of the judge's own training data."""

    class Settings(BaseModel):
        """The judge and its device."""

        model_config = ConfigDict(frozen=True, extra="forbid")

        # a folder with recogniser/, and optionally finder/ beside the folder; "": the shipped judge
        judge: str = Field(default="", exclude=True)
        device: str = Field(default="cpu", exclude=True)  # a CPU is fast enough, because the network is small

    def __init__(self, settings: "JudgeRecogniser.Settings") -> None:
        self.settings = settings
        self.network: RecogniserNetwork
        self.finder: FaceFinder  # set by load(); may be replaced

    @property
    def _folder(self) -> Path:
        return Path(self.settings.judge).expanduser() if self.settings.judge else default_folder() / "judge"

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """The class, the version, and the weights of the judge and of the finder beside it."""
        finder_folder = self._folder.parent / "finder"
        finder = fingerprint(finder_folder) if finder_folder.is_dir() else ""
        licence = "" if self.settings.judge else "Apache-2.0"  # of the shipped weights
        return identity_of(self, 1, **source_identity(str(self._folder / "recogniser"), licence=licence), finder=finder)

    def load(self) -> None:
        """Load the recogniser and the face finder beside it. Raises WeightsError if the recogniser cannot be loaded.

        Without a finder beside it, the default finder is used.
        """
        self._device = choose_device(self.settings.device)
        self.network = RecogniserNetwork.load(self._folder / "recogniser").to(self._device).requires_grad_(False)
        finder_folder = self._folder.parent / "finder"
        # Only a finder trained on the same kind of pictures counts their faces reliably.
        self.finder = LearnedFinder.from_folder(finder_folder) if finder_folder.is_dir() else default_finder()

    @torch.inference_mode()
    def recognise(self, pictures: Sequence[PhotoSource]) -> list[tuple[KnownFace, ...] | Failed]:
        """Return all faces of each picture, largest first."""
        return [self._recognise(picture) for picture in pictures]

    def _recognise(self, picture: PhotoSource) -> tuple[KnownFace, ...] | Failed:
        try:
            image = open_photo(picture)
        except PictureError as error:
            return failure(error)
        found = self.finder.find(image)
        if not found:
            return ()
        boxes = torch.tensor([[box.left, box.top, box.width, box.height] for box in found])
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        crops = crop_faces(pixels.expand(len(found), -1, -1, -1), boxes, self.network.size)
        rows = self.network(crops.to(self._device)).float().cpu().numpy()
        return tuple(KnownFace(box, row) for box, row in zip(found, rows, strict=True))


class DlibRecogniser:
    """YuNet's faces and dlib's embeddings, for photographs: `pip install -e '.[photos]'`; free for any use.

    The cosine of two photos of one person is mostly above 0.95, that of two people below 0.85; dlib's own limit, a
    distance of 0.6, is a cosine of 0.907. It does not know drawings: a picture of the portrait world is a failure.
    """

    class Settings(BaseModel):
        """What counts as a face."""

        model_config = ConfigDict(frozen=True, extra="forbid")

        threshold: float = Field(default=0.6, gt=0, lt=1)  # lowest score of a face
        licence: str = Field(default="CC0-1.0", exclude=True)  # of dlib's weights

    def __init__(self, settings: "DlibRecogniser.Settings") -> None:
        self.settings = settings
        self.finder: FaceFinder  # set by load()
        self._recogniser: PhotoRecogniser

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """Class, version, and the hashes of both networks."""
        hashes = {**photo_recogniser.SHA256, "finder": photo_finder.SHA256}
        return identity_of(self, 1, source="dlib", licence=self.settings.licence, **hashes)

    def load(self) -> None:
        """Load both networks; ImagineError if a package is missing."""
        photos = YuNetFinder(self.settings.threshold)
        folder = default_folder() / "finder"
        self.finder = AutoFinder(LearnedFinder.from_folder(folder), photos) if folder.is_dir() else photos
        self._recogniser = PhotoRecogniser()

    def recognise(self, pictures: Sequence[PhotoSource]) -> list[tuple[KnownFace, ...] | Failed]:
        """Return all faces of each picture, largest first."""
        return [self._recognise(picture) for picture in pictures]

    def _recognise(self, picture: PhotoSource) -> tuple[KnownFace, ...] | Failed:
        try:
            image = open_photo(picture)
        except PictureError as error:
            return failure(error)
        found = self.finder.find(image)
        if any(face.finder == LEARNED for face in found):
            return Failed("a drawing, which the recogniser for photographs does not know")
        rows = [self._recogniser.embed(image, face) for face in found]
        return tuple(KnownFace(face, row / np.linalg.norm(row)) for face, row in zip(found, rows, strict=True))


class InsightFaceRecogniser:
    """A recogniser for photographs with InsightFace's detectors and ArcFace embeddings.

    It needs `pip install -e '.[faces]'` and a model pack, which you download yourself and name in the settings. The
    packs are for non-commercial research only.
    """

    class Settings(BaseModel):
        """The model pack and the detector's threshold."""

        model_config = ConfigDict(frozen=True, extra="forbid")

        pack: str = Field(default="buffalo_l", exclude=True)  # its name in root/models, or a folder of ONNX files
        root: str = Field(default="~/.insightface", exclude=True)
        threshold: float = Field(default=0.5, gt=0, lt=1)  # minimum score of a face
        device: Literal["cpu", "cuda"] = Field(default="cpu", exclude=True)
        licence: str = Field(default="non-commercial research only", exclude=True)

    def __init__(self, settings: "InsightFaceRecogniser.Settings") -> None:
        self.settings = settings
        self._analysis: Any = None

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """The class, the version, and the name, content and licence of the pack."""
        return identity_of(self, 1, **source_identity(str(self._pack()), licence=self.settings.licence))

    def _pack(self) -> Path:
        return model_pack(self.settings.pack, Path(self.settings.root).expanduser())

    def load(self) -> None:
        """Load the detector and the recogniser.

        Raises ImagineError if insightface is not installed, and WeightsError if the pack is missing or incomplete.
        """
        pack = self._pack()
        if not pack.is_dir():
            raise WeightsError(f"{pack} is a file. Name the folder with the ONNX files of a detector and a recogniser.")
        try:
            analysis = importlib.import_module("insightface.app.face_analysis").FaceAnalysis
            self._face = importlib.import_module("insightface.app.common").Face
        except ImportError as error:
            raise ImagineError(
                "This recogniser needs insightface. Install it with pip install -e '.[faces]'."
            ) from error
        on_gpu = self.settings.device == "cuda"
        providers = ["CUDAExecutionProvider"] * on_gpu + ["CPUExecutionProvider"]
        try:
            with loading(str(pack)):
                loaded = analysis(
                    str(pack.resolve()), allowed_modules=["detection", "recognition"], providers=providers
                )
        except AssertionError as error:  # insightface raises it for a pack without a detector
            raise WeightsError(f"{pack} holds no face detector. Name the folder of a complete model pack.") from error
        if "recognition" not in loaded.models:
            raise WeightsError(f"{pack} holds no recogniser. Name the folder of a complete model pack.")
        loaded.prepare(0 if on_gpu else -1, det_thresh=self.settings.threshold, det_size=(640, 640))
        self._analysis = loaded

    def recognise(self, pictures: Sequence[PhotoSource]) -> list[tuple[KnownFace, ...] | Failed]:
        """Return all faces of each picture, largest first; each is aligned by its five landmarks for its embedding."""
        return [self._recognise(picture) for picture in pictures]

    def _recognise(self, picture: PhotoSource) -> tuple[KnownFace, ...] | Failed:
        try:
            image = open_photo(picture)
        except PictureError as error:
            return failure(error)
        pixels = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])  # insightface expects BGR
        edges, landmarks = self._detect(pixels)
        faces = [self._embed(pixels, row, marks) for row, marks in zip(edges, landmarks, strict=True)]
        return tuple(sorted(faces, key=lambda face: face.box.width * face.box.height, reverse=True))

    def _detect(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return boxes with scores (N, 5) and landmarks (N, 5, 2).

        If no face is found, the detector runs again at smaller sizes, because a face can be too large for it.
        """
        detector = self._analysis.det_model
        fixed = isinstance(detector.input_shape[2], int)
        edges, landmarks = detector.detect(pixels)
        for side in () if fixed else (320, 160):
            if not len(edges):
                edges, landmarks = detector.detect(pixels, input_size=(side, side))
        if landmarks is None:
            raise WeightsError(
                "This face detector gives no landmarks, which the alignment of faces needs. Use another model pack."
            )
        return edges, landmarks

    def _embed(self, pixels: NDArray[np.uint8], row: NDArray[np.float32], marks: NDArray[np.float32]) -> KnownFace:
        embedding = self._analysis.models["recognition"].get(pixels, self._face(bbox=row[:4], kps=marks))
        left, top, right, bottom, score = (float(number) for number in row)
        brow = top + InsightFaceFinder.brow * (bottom - top)  # our boxes start lower (see imagine.people.faces)
        length = max(float(np.linalg.norm(embedding)), 1e-12)
        box = FaceBox(left, brow, right - left, bottom - brow, score)
        return KnownFace(box, np.asarray(embedding / length, np.float32))


def make_finder(pack: str = "") -> FaceFinder:
    """Return a face finder for photographs: InsightFace's if a pack is named, else the built-in ones.

    The built-in finders include the shipped network.
    """
    return InsightFaceFinder(pack) if pack else default_finder(default_folder() / "finder")
