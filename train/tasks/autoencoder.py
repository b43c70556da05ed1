"""Train the autoencoder: pictures to 8x8 latents and back, with a decoder that is robust to errors in the latents.

Training adds noise to the latents, and a loss keeps each of their channels near mean 0 and standard deviation 1. The
decoder learns to map a neighbourhood of each latent to a clean picture, so small errors of the denoiser do not show.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from imagine.errors import ConfigError
from imagine.networks.diffusion import pack_latents
from imagine.networks.encoders import VisionEncoder
from imagine.networks.models import build_autoencoder
from imagine.people.faces import ellipse
from train.cache.latents import load_autoencoder
from train.data.order import chance, normals, uniforms
from train.data.portraits import SIDE, data_settings, draw_rows, training_pictures
from train.run.grids import save_grid
from train.run.reconstructions import ReconstructionJudge
from train.task import Loss, Share, TaskContext, Weight


class AutoencoderSettings(BaseModel):
    """Sizes of the network, and the weights of its losses."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    latent_channels: Annotated[int, Field(ge=1)] = 32
    patch: Annotated[int, Field(ge=1)] = 1  # positions joined into one for the denoiser, in each direction
    widths: tuple[int, ...] = (16, 64, 128, 256)
    crop: Annotated[int, Field(ge=16, le=SIDE, multiple_of=16)] = 64  # side of the training crops, pixels
    noise: Weight = 0.3  # highest noise level on the latents, whose standard deviation is about 1
    unit: Weight = 0.1  # weight of the loss that keeps each channel at mean 0 and standard deviation 1
    edges: Weight = 1.0  # weight of the loss on differences between neighbouring pixels
    faces: Share = 0.0  # share of the crops that are placed on the face; the others are at random places
    features: Weight = 0.0  # weight of the vision encoder's feature loss, on the crops placed on the face
    # weight of the loss that decodes latents shrunk by half to the picture shrunk by half (arXiv 2502.14831)
    equivariance: Weight = 0.0


@dataclass(frozen=True)
class AutoencoderBatch:
    """Square crops of pictures, and which of them are placed on the face."""

    crops: Tensor  # (B, 3, crop, crop), -1 to 1
    on_face: Tensor  # (B,) bool


class AutoencoderTask:
    """Train the autoencoder on crops, which is cheaper, and validate it on whole pictures: it is convolutional.

    If a stage trains the part `decoder` alone, the latents do not change, so everything trained on them remains valid.
    """

    Settings: ClassVar[type[BaseModel]] = AutoencoderSettings
    PARTS: ClassVar[tuple[str, ...]] = ("encoder", "decoder")

    def __init__(self, settings: AutoencoderSettings, context: TaskContext) -> None:
        self.settings, self.context = settings, context
        self.vae = build_autoencoder(settings.latent_channels, settings.widths)
        self.modules: dict[str, nn.Module] = {"vae": self.vae}
        self.judge: ReconstructionJudge | None = None
        if settings.features:
            if context.initial is None:
                raise ConfigError(
                    f"Stage {context.name} has a feature loss, which needs a trained vision encoder: name a folder of "
                    "weights as its initial, or set features to 0."
                )
            self.modules["image_encoder"] = VisionEncoder()

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"encoder": list(self.vae.encoder.parameters()), "decoder": list(self.vae.decoder.parameters())}

    def check(self) -> list[str]:
        data_settings(self.context.data)
        return []

    def prepare(self) -> None:
        self.pictures = training_pictures(self.context.data)
        self.judge = ReconstructionJudge.from_stages(self.context.earlier)

    def batch(self, images_seen: int, size: int) -> AutoencoderBatch:
        rows = draw_rows(self.context, "rows", images_seen, size, len(self.pictures.gallery))
        images, boxes = self.pictures.take(rows)
        side, crop, seed = images.shape[-1], self.settings.crop, self.context.seed
        anywhere = uniforms(seed, "crop", images_seen, size, (2,)) * ((side - crop) // 16 + 1)
        centres = (boxes[:, :2] + boxes[:, 2:] / 2).flip(1)  # (y, x)
        on_face = ((centres - crop / 2) / 16).round().clamp(0, (side - crop) // 16)
        which = chance(seed, "faces", images_seen, size, self.settings.faces)
        corners = torch.where(which[:, None], on_face, anywhere).long() * 16
        cut = [image[:, y : y + crop, x : x + crop] for image, (y, x) in zip(images, corners.tolist(), strict=True)]
        return AutoencoderBatch(torch.stack(cut) * 2 - 1, which)

    def show(self, batch: AutoencoderBatch, path: Path) -> None:
        save_grid(batch.crops / 2 + 0.5, path, columns=8)

    def loss(self, batch: AutoencoderBatch, images_seen: int) -> Loss:
        crops = batch.crops
        latents = self.vae.encode(crops).latent
        mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        unit = (mean.square() + (spread - 1).square()).mean()
        count, device, seed = len(crops), latents.device, self.context.seed
        level = self.settings.noise * uniforms(seed, "level", images_seen, count, (1, 1, 1), device)
        noise = level * normals(seed, "noise", images_seen, count, latents.shape[1:], device)
        drawn = cast(Tensor, self.vae.decode(latents + noise).sample)
        plain = (drawn - crops).abs().flatten(1).mean(1)
        edges = sum((_edges(drawn, axis) - _edges(crops, axis)).abs().flatten(1).mean(1) for axis in (-1, -2))
        square = F.mse_loss(drawn, crops, reduction="none").flatten(1).mean(1)
        per_sample = plain + self.settings.edges * edges + square + self.settings.unit * unit
        numbers = {"l1": plain.mean(), "square": square.mean(), "spread": spread.mean()}
        if self.settings.equivariance:
            small = cast(Tensor, self.vae.decode(F.avg_pool2d(latents, 2)).sample)
            apart = (small - F.avg_pool2d(crops, 2)).abs().flatten(1).mean(1)
            per_sample = per_sample + self.settings.equivariance * apart
            numbers["equivariance"] = apart.mean()
        if self.settings.features and batch.on_face.any():
            feature_loss = self._feature_loss(drawn[batch.on_face], crops[batch.on_face])
            per_sample = per_sample.index_add(
                0, batch.on_face.nonzero().squeeze(1), self.settings.features * feature_loss
            )
            numbers["features"] = feature_loss.mean()
        return Loss(per_sample, numbers)

    def _feature_loss(self, drawn: Tensor, crops: Tensor) -> Tensor:
        """Return the perceptual loss (arXiv 1603.08155) of drawn crops (B, 3, S, S), -1 to 1, against the real ones.

        It is (B,), and 0 for equal features. The features are those of the vision encoder, because a drawn face may be
        sharp and still show a different person.
        """
        encoder = cast(VisionEncoder, self.modules["image_encoder"])
        size = int(encoder.config.image_size)
        mask = ellipse(size, drawn.device) / 2  # the mask of a face crop, halved to map -1 to 1 onto 0 to 1
        both = F.interpolate(torch.cat((drawn, crops)), size=(size, size), mode="area") * mask + 0.5
        features, target = encoder(both).float().chunk(2)  # under autocast the encoder returns bf16
        target = target.detach()
        return (features - target).square().flatten(1).mean(1) / target.var()

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        count = len(self.pictures.gallery)
        rows = torch.arange(0, count, max(1, count // 32))[:32]
        images = self.pictures.take(rows)[0].to(self.context.device)
        drawn = self._reconstruct(images)
        save_grid(torch.stack((images[:16], drawn[:16]), 1).flatten(0, 1).cpu(), folder / "pictures.png", columns=8)
        numbers = {"psnr": float(-10 * torch.log10(F.mse_loss(drawn, images)))}
        return numbers if self.judge is None else {**numbers, **self.judge.scores(self._reconstruct_all)}

    def _reconstruct(self, images: Tensor) -> Tensor:
        """Return pictures (B, 3, S, S), 0..1, encoded and decoded."""
        return cast(Tensor, self.vae.decode(self.vae.encode(images * 2 - 1).latent).sample / 2 + 0.5).clamp(0, 1)

    def _reconstruct_all(self, images: Tensor) -> Tensor:
        device = self.context.device
        return torch.cat([self._reconstruct(part.to(device)).cpu() for part in images.split(32)])

    def export(self, folder: Path) -> None:
        self.vae.save_pretrained(folder / "vae")
        (folder / "latents.json").write_text(json.dumps(self._statistics()))

    def _statistics(self) -> dict[str, Any]:
        """Return the patch of the packing, and mean and standard deviation of each packed channel.

        A frozen encoder keeps the values of the folder that it was loaded from.
        """
        frozen = not any(parameter.requires_grad for parameter in self.vae.encoder.parameters())
        if frozen and self.context.initial is not None:
            found = load_autoencoder(self.context.initial)
            return {"mean": found.mean.tolist(), "std": found.std.tolist(), "patch": found.patch}
        rows = draw_rows(self.context, "statistics", 0, 512, len(self.pictures.gallery))
        images = self.pictures.take(rows)[0].to(self.context.device) * 2 - 1
        patch = self.settings.patch
        parts = [pack_latents(self.vae.encode(part).latent, patch) for part in images.split(64)]
        latents = torch.cat(parts).float().cpu()
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        return {"mean": mean.tolist(), "std": std.tolist(), "patch": patch}


def _edges(images: Tensor, axis: int) -> Tensor:
    return images.diff(dim=axis)
