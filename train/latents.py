"""Latents of the training pictures: encoded once, kept on disk, so that the denoiser's steps never see a pixel."""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from imagine.diffusion import normalise_latents
from imagine.world import camera_noise
from train.pictures import Pictures
from train.task_autoencoder import load_autoencoder

_BLOCK = 256


class Latents:
    """Normalised latents (N, C, h, w) of every picture; each person's first, the real one, as cheap cameras take it."""

    def __init__(self, pictures: Pictures, autoencoder: Path, folder: Path, device: torch.device) -> None:
        self.vae, self.mean, self.std = load_autoencoder(autoencoder)
        self.vae.to(device).eval().requires_grad_(False)
        self.pictures, self.device = pictures, device
        side = pictures.gallery.size // self.vae.spatial_compression_ratio
        shape = (len(pictures.gallery), self.vae.config.latent_channels, side, side)
        folder.mkdir(parents=True, exist_ok=True)
        weights = (autoencoder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
        mark = hashlib.sha256(weights).hexdigest()[:12]
        path, count = folder / f"latents-{mark}.f16", folder / f"latents-{mark}.count"
        mode: Literal["r+", "w+"] = "r+" if path.exists() and path.stat().st_size == 2 * int(np.prod(shape)) else "w+"
        self.values = np.memmap(path, np.float16, mode, shape=shape)
        done = int(count.read_text()) if mode == "r+" and count.exists() else 0
        for start in track(range(done, shape[0], _BLOCK), "encoding pictures", disable=done >= shape[0]):
            rows = torch.arange(start, min(start + _BLOCK, shape[0]))
            self.values[start : start + len(rows)] = self._encode(rows).half().cpu().numpy()
            self.values.flush()
            count.write_text(str(start + len(rows)))

    def take(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self.values[rows.numpy()]).float()

    @torch.no_grad()
    def _encode(self, rows: Tensor) -> Tensor:
        images = as_taken(self.pictures, rows)[0].to(self.device) * 2 - 1
        return normalise_latents(self.vae.encode(images).latent, self.mean, self.std)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, S, S), 0 to 1."""
        std, mean = (v.to(latents.device).view(1, -1, 1, 1) for v in (self.std, self.mean))
        drawn: Tensor = self.vae.decode(latents * std + mean).sample
        return (drawn / 2 + 0.5).clamp(0, 1)


def as_taken(pictures: Pictures, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Images and boxes of these rows; real pictures with the noise of their camera, the same at every call."""
    images, boxes = pictures.take(rows)
    for i in (rows % pictures.gallery.pictures == 0).nonzero().squeeze(1).tolist():
        images[i : i + 1] = camera_noise(images[i : i + 1], int(rows[i]))
    return images, boxes
