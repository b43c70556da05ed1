"""Latents of the training pictures: encoded once, kept on disk, so that the denoiser's steps never see a pixel."""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from imagine.diffusion import normalise_latents
from imagine.weights import fingerprint
from imagine.world import camera_noise
from train.kept import keep
from train.pictures import AnyPictures
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
