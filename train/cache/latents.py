"""Cached latents of the training pictures: encoded once and stored on disk, so that steps need no autoencoder."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from torch import Tensor

from imagine.errors import ConfigError
from imagine.networks.diffusion import denormalise_latents, normalise_latents, pack_latents, unpack_latents
from imagine.networks.weights import fingerprint, read_index
from imagine.world import camera_noise
from train.cache.pictures import AnyPictures, FacePictures
from train.cache.rows import cache_rows
from train.task import TaskContext


class Codec(Protocol):
    """The interface of an autoencoder for the cache of latents: pictures to normalised latents, and back."""

    @property
    def mark(self) -> str:
        """A fingerprint of everything that the latents depend on besides their picture."""
        ...

    def shape(self, side: int) -> tuple[int, int, int]:
        """Return channels, height and width of the latents of a picture of `side` pixels."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Return latents (B, C, h, w) of images (B, 3, S, S), -1 to 1, on any device; without gradients."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures (B, 3, S, S), 0 to 1; without gradients."""
        ...


class WorldCodec:
    """The portrait world's autoencoder, loaded from the export of its stage."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        trained = load_autoencoder(folder)
        self.vae, self.mean, self.std, self.patch = trained.vae, trained.mean, trained.std, trained.patch
        self.vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # a fifth faster on a CPU
        self.device = device

    @property
    def mark(self) -> str:
        # Latents depend only on the encoder and the statistics: they stay valid when the decoder is trained further.
        facts = f"{fingerprint(self.vae.encoder)[:16]} {self.mean.tolist()} {self.std.tolist()}"
        facts += "" if self.patch == 1 else f" patch {self.patch}"
        return hashlib.sha256(facts.encode()).hexdigest()[:12]

    def shape(self, side: int) -> tuple[int, int, int]:
        step = int(self.vae.spatial_compression_ratio) * self.patch
        cells, left = divmod(side, step)
        if left:
            raise ConfigError(
                f"resolution: the autoencoder cannot divide {side} pixels evenly; choose a multiple of {step}."
            )
        return int(self.vae.config.latent_channels) * self.patch**2, cells, cells

    def check_channels(self, channels: int, stage: str) -> None:
        """Raise ConfigError unless the latents have as many channels as the networks of a stage expect."""
        if len(self.mean) != channels:
            raise ConfigError(
                f"Stage {stage} expects latents of {channels} channels, but its autoencoder gives {len(self.mean)}: "
                f"set latent_channels to {len(self.mean)} in the stage's settings."
            )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        latents = self.vae.encode(images.to(self.device, memory_format=torch.channels_last)).latent
        return normalise_latents(pack_latents(latents, self.patch), self.mean, self.std)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.decode_with_gradients(latents)

    def decode_with_gradients(self, latents: Tensor) -> Tensor:
        """Return pictures (B, 3, S, S), 0 to 1, through which a loss can reach the latents."""
        latents = unpack_latents(denormalise_latents(latents, self.mean, self.std), self.patch)
        drawn: Tensor = self.vae.decode(latents).sample
        return (drawn / 2 + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class TrainedAutoencoder:
    """An autoencoder and how its latents are packed (`pack_latents`) and normalised for the denoiser."""

    vae: AutoencoderDC
    mean: Tensor  # (C,) of each packed channel
    std: Tensor
    patch: int = 1  # positions that are joined into one, in each direction


def load_autoencoder(folder: Path) -> TrainedAutoencoder:
    """Load an autoencoder from an export, or from a folder of weights, whose configuration holds the same facts."""
    vae = cast(AutoencoderDC, AutoencoderDC.from_pretrained(folder / "vae", torch_dtype=torch.float32))
    if (folder / "latents.json").exists():
        statistics: dict[str, Any] = json.loads((folder / "latents.json").read_text())
        mean, std = torch.tensor(statistics["mean"]), torch.tensor(statistics["std"])
        return TrainedAutoencoder(vae, mean, std, int(statistics.get("patch", 1)))
    index = read_index(folder)
    mean, std = torch.tensor(index["latents_mean"]), torch.tensor(index["latents_std"])
    return TrainedAutoencoder(vae, mean, std, int(index.get("latents_patch", 1)))


class Latents:
    """Normalised latents (N, C, h, w) of all pictures; each person's first, the real one, with cheap camera noise."""

    def __init__(self, pictures: AnyPictures, codec: Codec, folder: Path, side: int | None = None) -> None:
        """Encode the pictures that are not cached, scaled to `side` pixels if given (for stages at low resolution)."""
        self.pictures, self.codec, full = pictures, codec, pictures.gallery.size
        self.side = side or full
        mark = codec.mark + ("" if self.side == full else f"-{self.side}px")
        path, shape = folder / f"latents-{mark}.f16", codec.shape(self.side)
        self.values = cache_rows(path, pictures.gallery, shape, np.float16, self._encode, "encoding pictures")

    def take(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self.values[rows.numpy()]).float()

    def faces(self, rows: Tensor) -> Tensor:
        """Return the face masks of these rows on the latent grid, (B, 1, h, w), 1 or 0."""
        boxes = torch.from_numpy(self.pictures.boxes[rows.numpy()])
        return self._cells(boxes)

    def letters(self, rows: Tensor) -> Tensor:
        """Return the masks of the words on shirts in these rows, (B, 1, h, w), 1 or 0."""
        return self._cells(self.pictures.gallery.letters(rows))

    def _cells(self, boxes: Tensor) -> Tensor:
        side, cells = self.pictures.gallery.size, self.values.shape[-1]
        return box_mask(boxes, (side, side), (cells, cells))

    def _encode(self, rows: Tensor) -> Tensor:
        images = with_camera_noise(self.pictures, rows)[0] * 2 - 1
        if self.side != images.shape[-1]:
            images = F.interpolate(images, size=(self.side, self.side), mode="area")
        return self.codec.encode(images).half().cpu()


def with_camera_noise(pictures: FacePictures, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return images and boxes of these rows; real pictures get camera noise, the same at every call."""
    images, boxes = pictures.take(rows)
    noisy = (rows % pictures.gallery.pictures == 0) & pictures.gallery.camera
    for i in noisy.nonzero().squeeze(1).tolist():
        images[i : i + 1] = camera_noise(images[i : i + 1], int(rows[i]))
    return images, boxes


def box_mask(boxes: Tensor, shape: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Return (B, 1, *cells): 1 where a latent cell of a picture of `shape` (height, width) touches the box, else 0.

    A box (left, top, width, height), (B, 4), of width 0 touches no cell. Several boxes per picture, (B, P, 4), give the
    cells that any of them touches.
    """
    if boxes.dim() == 3:
        return box_mask(boxes.flatten(0, 1), shape, cells).unflatten(0, boxes.shape[:2]).amax(1)
    (height, width), (rows, columns) = shape, cells
    across = _touched(boxes[:, :1], boxes[:, 2:3], width, columns)
    down = _touched(boxes[:, 1:2], boxes[:, 3:], height, rows)
    there = (boxes[:, 2] > 0).view(-1, 1, 1)
    return (down.unsqueeze(2) & across.unsqueeze(1) & there).unsqueeze(1).float()


def _touched(start: Tensor, length: Tensor, side: int, cells: int) -> Tensor:
    """Return which of the cells along one side touch the interval, (B, cells)."""
    middle = (torch.arange(cells) + 0.5) * side / cells
    half = side / cells / 2
    return (middle > start - half) & (middle < start + length + half)


def squared_error(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Return the mean squared error (B,) of latents (B, C, h, w) in float32, each cell weighted by (B, 1, h, w)."""
    square = (prediction.float() - target.float()).square().mean(1, keepdim=True)
    return (square * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)


def autoencoder_of(context: TaskContext) -> Path:
    """Return the folder of the autoencoder: the export of an earlier stage, or the stage's initial weights."""
    check_autoencoder(context)
    folder = context.earlier.get("autoencoder", context.initial)
    assert folder is not None, "check_autoencoder raises otherwise"
    return folder


def check_autoencoder(context: TaskContext) -> None:
    """Raise ConfigError if neither the earlier stages nor the initial weights hold an autoencoder."""
    if "autoencoder" not in context.earlier and context.initial is None:
        raise ConfigError(
            f"Stage {context.name} needs an autoencoder. Name a stage `autoencoder` in its start_from, or a "
            "folder of weights in its initial."
        )
    if "autoencoder" not in context.earlier and context.initial is not None and not (context.initial / "vae").is_dir():
        raise ConfigError(
            f"Stage {context.name} needs an autoencoder, and {context.initial} holds none (vae/). Name a stage "
            "`autoencoder` in its start_from, or a complete folder of weights in its initial."
        )
