"""Latents of the training pictures: encoded once, kept on disk, so that the denoiser's steps never see a pixel."""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from imagine.diffusion import normalise_latents
from imagine.errors import ConfigError
from imagine.weights import fingerprint
from imagine.world import camera_noise
from train.kept import keep
from train.pictures import AnyPictures
from train.task import Start
from train.task_autoencoder import load_autoencoder


class Latents:
    """Normalised latents (N, C, h, w) of every picture; each person's first, the real one, as cheap cameras take it."""

    def __init__(
        self, pictures: AnyPictures, autoencoder: Path, folder: Path, device: torch.device, side: int | None = None
    ) -> None:
        """Of pictures scaled to `side` pixels if given; a stage at low resolution sees the same pictures smaller."""
        self.vae, self.mean, self.std = load_autoencoder(autoencoder)
        self.vae.to(device).eval().requires_grad_(False)
        self.pictures, self.device, full = pictures, device, pictures.gallery.size
        self.side = side or full
        # Latents depend on the encoder and its statistics: a decoder that trained on leaves them valid.
        facts = f"{fingerprint(self.vae.encoder)} {self.mean.tolist()} {self.std.tolist()}"
        mark = hashlib.sha256(facts.encode()).hexdigest()[:12] + ("" if self.side == full else f"-{self.side}px")
        cells = self.side // int(self.vae.spatial_compression_ratio)
        path, shape = folder / f"latents-{mark}.f16", (int(self.vae.config.latent_channels), cells, cells)
        self.values = keep(path, pictures.gallery, shape, np.float16, self._encode, "encoding pictures")

    def take(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self.values[rows.numpy()]).float()

    def faces(self, rows: Tensor) -> Tensor:
        """Where the faces of these rows are, (B, 1, h, w), 1 or 0."""
        boxes = torch.from_numpy(self.pictures.boxes[rows.numpy()])
        return face_places(boxes, self.pictures.gallery.size, self.values.shape[-1])

    @torch.no_grad()
    def _encode(self, rows: Tensor) -> Tensor:
        images = as_taken(self.pictures, rows)[0].to(self.device) * 2 - 1
        if self.side != images.shape[-1]:
            images = F.interpolate(images, size=(self.side, self.side), mode="area")
        return normalise_latents(self.vae.encode(images).latent, self.mean, self.std).half().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, S, S), 0 to 1."""
        std, mean = (v.to(latents.device).view(1, -1, 1, 1) for v in (self.std, self.mean))
        drawn: Tensor = self.vae.decode(latents * std + mean).sample
        return (drawn / 2 + 0.5).clamp(0, 1)


def as_taken(pictures: AnyPictures, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Images and boxes of these rows; real pictures with the noise of their camera, the same at every call."""
    images, boxes = pictures.take(rows)
    noisy = (rows % pictures.gallery.pictures == 0) & pictures.gallery.camera
    for i in noisy.nonzero().squeeze(1).tolist():
        images[i : i + 1] = camera_noise(images[i : i + 1], int(rows[i]))
    return images, boxes


def face_places(boxes: Tensor, side: int, cells: int) -> Tensor:
    """(B, 1, cells, cells): 1 where a latent cell of a picture of `side` pixels touches the face, 0 elsewhere."""
    middle = (torch.arange(cells) + 0.5) * side / cells
    half = side / cells / 2
    across = (middle > boxes[:, :1] - half) & (middle < boxes[:, :1] + boxes[:, 2:3] + half)
    down = (middle > boxes[:, 1:2] - half) & (middle < boxes[:, 1:2] + boxes[:, 3:] + half)
    return (down.unsqueeze(2) & across.unsqueeze(1)).unsqueeze(1).float()


def autoencoder_of(start: Start) -> Path:
    """The folder that holds it: what an earlier stage left, or the weights that the stage begins with."""
    folder = start.earlier.get("autoencoder", start.initial)
    if folder is None:
        raise ConfigError(
            f"Stage {start.name} needs an autoencoder: name a stage `autoencoder` in its start_from, or a "
            "folder of weights as its initial."
        )
    return folder
