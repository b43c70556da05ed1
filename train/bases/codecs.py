"""The autoencoders of diffusion transformers: each gives the latents that its transformer sees, normalised as it wants.

    AutoencoderKL             (z - shift) * scale                     FLUX.1, Z-Image, Stable Diffusion 3.5
    AutoencoderKLFlux2        2 x 2 cells joined, then a batch norm   FLUX.2
    AutoencoderKLQwenImage    (z - mean) / std of each channel        Qwen-Image, a video's first frame
    AutoencoderDC             z * scale                               Sana

`patch` is how many cells in each direction the transformer joins to one token; a picture must divide into them.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from imagine.errors import ConfigError
from imagine.networks.diffusion import pack_latents, unpack_latents
from train.data.public_base import BaseCodec, BaseFiles


class FluxTwoCodec(BaseCodec):
    """FLUX.2's autoencoder: its latents are joined to 2 x 2 and normalised by the statistics of a batch norm."""

    autoencoder = "AutoencoderKLFlux2"
    joined = 2

    @property
    def pixels(self) -> int:
        return super().pixels * self.joined

    @property
    def channels(self) -> int:
        return super().channels * self.joined**2

    def to_latents(self, vae: Any, images: Tensor) -> Tensor:
        mean, std = self._statistics(vae)
        return (pack_latents(vae.encode(images).latent_dist.mode(), self.joined) - mean) / std

    def to_pictures(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = self._statistics(vae)
        decoded: Tensor = vae.decode(unpack_latents(latents * std + mean, self.joined)).sample
        return decoded

    def _statistics(self, vae: Any) -> tuple[Tensor, Tensor]:
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        return vae.bn.running_mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


class QwenCodec(BaseCodec):
    """Qwen-Image's autoencoder of videos, for single frames."""

    autoencoder = "AutoencoderKLQwenImage"

    @property
    def pixels(self) -> int:
        return int(2 ** len(self.config["temperal_downsample"]))

    @property
    def channels(self) -> int:
        return int(self.config["z_dim"])

    def to_latents(self, vae: Any, images: Tensor) -> Tensor:
        mean, std = self._statistics(images)
        found: Tensor = vae.encode(images.unsqueeze(2)).latent_dist.mode()
        return (found[:, :, 0] - mean) / std

    def to_pictures(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        decoded: Tensor = vae.decode((latents * std + mean).unsqueeze(2)).sample
        return decoded[:, :, 0]

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        both = (torch.tensor(self.config[name], device=like.device) for name in ("latents_mean", "latents_std"))
        mean, std = (values.view(1, -1, 1, 1) for values in both)
        return mean, std


class DeepCodec(BaseCodec):
    """The deep compression autoencoder of Sana (arXiv 2410.10733)."""

    autoencoder = "AutoencoderDC"

    @property
    def pixels(self) -> int:
        return int(2 ** (len(self.config["encoder_block_out_channels"]) - 1))

    def to_latents(self, vae: Any, images: Tensor) -> Tensor:
        found: Tensor = vae.encode(images).latent * self.scale
        return found

    def to_pictures(self, vae: Any, latents: Tensor) -> Tensor:
        decoded: Tensor = vae.decode(latents / self.scale).sample
        return decoded


CODECS: Mapping[str, type[BaseCodec]] = {
    codec.autoencoder: codec for codec in (BaseCodec, FluxTwoCodec, QwenCodec, DeepCodec)
}


class _Files(BaseFiles, Protocol):
    """The files of a base, which name the classes of its components."""

    @property
    def index(self) -> Mapping[str, Any]:
        """The content of its model_index.json."""
        ...


def open_codec(files: _Files, device: torch.device, patch: int) -> BaseCodec:
    """Return the codec of a base's autoencoder. Raises ConfigError if its class is not known."""
    kind = str((files.index.get("vae") or [None, None])[1])
    if kind not in CODECS:
        raise ConfigError(
            f"The autoencoder of {files.folder} is a {kind}; training knows {', '.join(CODECS)}: name a base with one "
            "of them."
        )
    return CODECS[kind](files, device, patch)
