"""Train the network of the likeness loss: a recogniser of latents that matches two pictures of one person.

It trains on the people that the adapter trains on. Its input is latents, which the denoiser predicts, so the loss needs
no decoding. Noise on the latents simulates the errors of a prediction.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from imagine.world import People
from train.cache.latents import Latents, WorldCodec, autoencoder_of, check_autoencoder
from train.cache.pictures import Pictures
from train.data.language import parameters
from train.data.order import chance, normals, uniforms
from train.data.portraits import check_two_pictures, data_settings, draw_rows, held_out_pictures, training_pictures
from train.run.grids import save_grid
from train.task import Loss, TaskContext, Weight
from train.tasks.contrastive_loss import Temperature, info_nce
from train.tasks.likeness_loss import DIMENSIONS, LikenessNetwork
from train.tasks.trait_loss import TRAIT_OUTPUTS, trait_loss


class LikenessSettings(BaseModel):
    """The noise on the latents, and the weight of the auxiliary loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    latent_channels: Annotated[int, Field(ge=1)] = 32  # of the latents as the denoiser sees them
    noise: Weight = 0.5  # highest noise level on the latents, whose standard deviation is 1
    traits: Weight = 5.0  # weight of predicting the world's traits from the embedding


@dataclass(frozen=True)
class LikenessBatch:
    """Two pictures of each person: latents, face masks and people."""

    latents: Tensor  # (B, 2, C, h, w)
    faces: Tensor  # (B, 2, 1, h, w)
    people: People  # (B) the people in the first pictures
    drifted: People  # (B) the people in the second pictures: the same, with a slightly drifted identity


class LikenessTask:
    """Train the likeness network, which is not part of the shipped weights."""

    Settings: ClassVar[type[BaseModel]] = LikenessSettings
    PARTS: ClassVar[tuple[str, ...]] = ("likeness",)
    VALIDATION_PEOPLE: ClassVar[int] = 500

    def __init__(self, settings: LikenessSettings, context: TaskContext) -> None:
        self.settings, self.context = settings, context
        self.likeness = LikenessNetwork(settings.latent_channels)
        self.reading, self.temperature = nn.Linear(DIMENSIONS, TRAIT_OUTPUTS), Temperature(1)
        self.modules: dict[str, nn.Module] = {
            "likeness": self.likeness, "reading": self.reading, "temperature": self.temperature,
        }  # fmt: skip

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"likeness": parameters(self.likeness, self.reading, self.temperature)}

    def check(self) -> list[str]:
        check_two_pictures(self.context.data)
        check_autoencoder(self.context)
        return []

    def prepare(self) -> None:
        self.pictures = training_pictures(self.context.data)
        self.codec = WorldCodec(autoencoder_of(self.context), self.context.device)
        self.codec.check_channels(self.settings.latent_channels, self.context.name)
        self.latents = self._latents(self.pictures, "train")

    def _latents(self, pictures: Pictures, name: str) -> Latents:
        folder = data_settings(self.context.data).folder / name
        return Latents(pictures, self.codec, folder)

    def batch(self, images_seen: int, size: int) -> LikenessBatch:
        gallery = self.pictures.gallery
        who = draw_rows(self.context, "people", images_seen, size, gallery.identities)
        first = chance(self.context.seed, "which", images_seen, size, 0.5).long()
        rows = torch.stack((who * gallery.pictures + first, who * gallery.pictures + 1 - first), 1)
        latents, faces = (
            take(rows.flatten()).unflatten(0, rows.shape) for take in (self.latents.take, self.latents.faces)
        )
        return LikenessBatch(latents, faces, gallery.people(rows[:, 0]), gallery.people(rows[:, 1]))

    def show(self, batch: LikenessBatch, path: Path) -> None:
        some = batch.latents[:16].flatten(0, 1).to(self.context.device)
        save_grid(self.codec.decode(some).cpu(), path, columns=8)

    def loss(self, batch: LikenessBatch, images_seen: int) -> Loss:
        count, seed, device = len(batch.latents), self.context.seed, batch.latents.device
        level = self.settings.noise * uniforms(seed, "level", images_seen, count, (2, 1, 1, 1), device)
        noise = level * normals(seed, "noise", images_seen, count, batch.latents.shape[1:], device)
        embeddings = self.likeness((batch.latents + noise).flatten(0, 1), batch.faces.flatten(0, 1))
        embeddings = embeddings.unflatten(0, (count, 2))
        person, hits = info_nce(embeddings[:, 0], embeddings[:, 1], self.temperature.scales()[0])
        read = self.reading(embeddings * DIMENSIONS**0.5)
        traits = (trait_loss(read[:, 0], batch.people) + trait_loss(read[:, 1], batch.drifted)) / 2
        return Loss(person + self.settings.traits * traits, {"person_hits": hits, "traits": traits.mean()})

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        held_out = held_out_pictures(self.context.data, self.VALIDATION_PEOPLE)
        latents = self._latents(held_out, f"held-out-{self.VALIDATION_PEOPLE}")
        rows = torch.arange(2 * self.VALIDATION_PEOPLE)
        parts = [(latents.take(some), latents.faces(some)) for some in rows.split(100)]
        embeddings = torch.cat([self.likeness(*(x.to(self.context.device) for x in part)) for part in parts])
        similarity = embeddings[::2] @ embeddings[1::2].T
        hits = (similarity.argmax(1) == torch.arange(len(similarity), device=similarity.device)).float().mean()
        other = similarity[~torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)].mean()
        return {"rank1": float(hits), "same": float(similarity.diag().mean()), "other": float(other)}

    def export(self, folder: Path) -> None:
        """Write nothing: later stages load the averaged weights of this stage."""
