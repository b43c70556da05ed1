"""Compare people in drawings of the portrait world with the recogniser that ships with the weights.

It recognises drawings only, and less surely than dlib recognises photographs: at the limit used here 5 % of two
pictures of one person seem to show two people, and 98 % of two people are told apart (300 held-out people).
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from imagine.networks.recogniser import Recogniser
from imagine.people.faces import crop_faces
from imagine.records import FaceBox

SAME_PERSON = 0.75  # largest distance, 1 minus the cosine of two embeddings, of two pictures of one person


class DrawingRecogniser:
    """The recogniser of the portrait world, which is not certain enough to refuse a picture."""

    same, is_certain = SAME_PERSON, False

    def __init__(self, network: Recogniser) -> None:
        self.network = network.eval()

    @classmethod
    def from_folder(cls, folder: Path) -> "DrawingRecogniser":
        """Load the network from weights/judge/recogniser. Raises WeightsError if the files do not fit."""
        return cls(Recogniser.load(folder))

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
