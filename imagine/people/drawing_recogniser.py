"""Compare people in drawings of the portrait world with a recogniser that ships with the weights.

The pipeline enrolls photos and checks finished pictures with it, so it is not the judge's: a picture that was chosen by
the judge would be judged by the network that chose it. It is in recogniser/ of the weights. Weights that are older than
this folder only have the judge's recogniser, which then takes its place.

It recognises drawings only, and less surely than dlib recognises photographs: at its limit 5 % of two pictures of one
person seem to show two people.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from imagine.networks.recogniser import AnyRecogniser, load_recogniser
from imagine.people.faces import crop_faces
from imagine.records import FaceBox

FOLDER = "recogniser"  # among the weights
JUDGES = Path("judge", "recogniser")
# Largest distance, 1 minus the cosine of two embeddings, of two pictures of one person, of networks whose files do not
# say it. For the judge's recogniser it tells 98 % of two people apart (300 held-out people).
SAME_PERSON = 0.75


class DrawingRecogniser:
    """The recogniser of the portrait world, which is not certain enough to refuse a picture."""

    is_certain = False

    def __init__(self, network: AnyRecogniser) -> None:
        self.network = network.eval()
        limit = network.config["limit"]
        self.same: float = SAME_PERSON if limit is None else limit

    @classmethod
    def from_weights(cls, weights: Path) -> "DrawingRecogniser | None":
        """Load the network of a folder of weights; None without one. Raises WeightsError if its files do not fit."""
        found = next((weights / name for name in (FOLDER, JUDGES) if (weights / name).is_dir()), None)
        return None if found is None else cls(load_recogniser(found))

    @torch.inference_mode()
    def embed(self, image: Image.Image, face: FaceBox) -> NDArray[np.float32]:
        """Return the embedding (128,), of length 1, of a face of an upright RGB picture."""
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        box = torch.tensor([[face.left, face.top, face.width, face.height]])
        embedding: NDArray[np.float32] = self.network(crop_faces(pixels, box, self.network.size))[0].numpy()
        return embedding

    def distance(self, one: NDArray[np.float32], two: NDArray[np.float32]) -> float:
        """Return 1 minus the cosine of two embeddings: 0 for the same picture, about 1 for two people."""
        return 1 - float(one @ two)
