"""A face recogniser at a tiny size for adapters that read embeddings, and files of such adapters."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from imagine.ip_adapter.layout import ARCFACE_WIDTH, projection_shapes
from imagine.people.crops import align
from imagine.records import FaceBox
from tests import tiny, tiny_ip


class RandomEmbedder:
    """Embeds a face as a fixed random projection of its aligned crop of 8 x 8 pixels."""

    def __init__(self, width: int, name: str = "tiny") -> None:
        self.name = name
        self._matrix = np.random.default_rng(3).standard_normal((width, 3 * 64)).astype(np.float32)

    def embed(self, image: Image.Image, face: FaceBox) -> NDArray[np.float32]:
        pixels = np.asarray(align(image, face, 8), np.float32).flatten() / 255 - 0.5
        return np.asarray(self._matrix @ pixels, np.float32)


def instant_id(denoiser: Any, seed: int = 2) -> dict[str, Tensor]:
    """Return InstantID's file, a Plus projection of a face's embedding, at tiny inner sizes."""
    file = {name: each for name, each in tiny_ip.tensors("plus", denoiser, seed).items() if name.startswith("ip_")}
    width = denoiser.config.cross_attention_dim
    shapes = projection_shapes("plus", 3, ARCFACE_WIDTH, width, 64, 128)
    generator = tiny.generator(seed + 1)
    for name, shape in shapes.items():
        file[f"image_proj.{name}"] = torch.randn(shape, generator=generator) / max(shape[-1], 1) ** 0.5
    return file
