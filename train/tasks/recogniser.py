"""Train a recogniser: one embedding per face, with a margin between people (CosFace, arXiv 1801.09414).

The judge has two, of different architectures and people. A third one trains on the generator's people.

During training a second head predicts the traits of the world from the embedding. With four pictures per person the
margin loss alone learns slowly (docs/experiments.md); the trait loss speeds up the first steps.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from imagine.evaluation.judge import margin_loss
from imagine.networks.recogniser import AnyRecogniser, Recogniser, TransformerRecogniser
from imagine.people.faces import crop_faces
from imagine.world import render, sample_contexts, sample_people
from imagine.world.seeds import HELD_OUT
from train.cache.face_crops import FaceCrops
from train.cache.pictures import Pictures
from train.data.language import parameters
from train.data.order import normals, uniforms
from train.data.portraits import (
    DataSettings,
    data_settings,
    draw_rows,
    judge_pictures,
    second_judge_pictures,
    training_pictures,
)
from train.run.grids import save_grid
from train.task import Loss, TaskContext, Weight
from train.tasks.trait_loss import TRAIT_OUTPUTS, trait_loss

TEACHER = "teacher"  # the module's name if it is trained on the generator's people
MODULES = {"judge": "recogniser", "second_judge": "second_recogniser", "train": TEACHER}  # people -> module's name
ARCHITECTURES: dict[str, Callable[..., AnyRecogniser]] = {
    "residual": Recogniser, "transformer": TransformerRecogniser,
}  # fmt: skip
MISSED = 0.05  # share of the pairs of one person beyond the limit that is stored with the network
HELD_OUT_COUNT = 500  # held-out people, two pictures each; none of them is used by the evaluation


class RecogniserSettings(BaseModel):
    """Settings of the margin loss and of the auxiliary trait loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scale: float = 24.0
    margin: Weight = 0.25
    dimensions: PositiveInt = 128
    traits: Weight = 10.0  # weight of the trait loss
    # images with the trait loss alone; over as many images after them, the weight of the margin loss rises to 1
    ramp: PositiveInt = 30_000
    # whose pictures it trains on. "second_judge": people for a second opinion. "train": the generator's people, for a
    # teacher of the adapter's preview loss, or for the check of finished pictures. The judge must train on its own
    # people, and neither a teacher nor the check may be the judge.
    people: Literal["judge", "second_judge", "train"] = "judge"
    architecture: Literal["residual", "transformer"] = "residual"


class Prototypes(nn.Module):
    """One direction per person, (people, dimensions); discarded after training."""

    def __init__(self, people: int, dimensions: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(people, dimensions) / dimensions**0.5)


class RecogniserTask:
    """Train a recogniser on the judge's own people, unless settings say otherwise; the generator trains on no judge's.

    The exported folder is always called `recogniser`.
    """

    Settings: ClassVar[type[BaseModel]] = RecogniserSettings
    PARTS: ClassVar[tuple[str, ...]] = ("recogniser",)
    HELD_OUT_PEOPLE: ClassVar[int] = HELD_OUT_COUNT

    def __init__(self, settings: RecogniserSettings, context: TaskContext) -> None:
        self.settings, self.context = settings, context
        self.recogniser = ARCHITECTURES[settings.architecture](dimensions=settings.dimensions)
        people = self._identities()
        self.prototypes = Prototypes(people, settings.dimensions)
        self.reading = nn.Linear(settings.dimensions, TRAIT_OUTPUTS)
        self.modules: dict[str, nn.Module] = {
            MODULES[settings.people]: self.recogniser, "prototypes": self.prototypes, "reading": self.reading,
        }  # fmt: skip

    def _identities(self) -> int:
        """Return the number of people that it trains on."""
        data = data_settings(self.context.data)
        return data.limited(_identities(data)[self.settings.people])

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"recogniser": parameters(self.recogniser, self.prototypes, self.reading)}

    def check(self) -> list[str]:
        data_settings(self.context.data)
        return []

    def prepare(self) -> None:
        self.pictures = PICTURES[self.settings.people](self.context.data)
        folder = data_settings(self.context.data).folder / self.settings.people
        # The training people's crops are those that the adapter's stages cache, with the camera's noise.
        self.face_crops = FaceCrops(self.pictures, self.recogniser.size, folder, self.settings.people == "train")
        first = self.pictures.gallery.first_seed
        self.people = sample_people([first + i for i in range(self.pictures.gallery.identities)])

    def batch(self, images_seen: int, size: int) -> tuple[Tensor, Tensor]:
        rows = draw_rows(self.context, "rows", images_seen, size, len(self.pictures.gallery))
        seed = self.context.seed
        crops = self.face_crops.take(rows, uniforms(seed, "shift", images_seen, size, (2,)))
        # Simulated camera noise, so that the embedding does not depend on exposure, colour cast and grain.
        cast = torch.tensor([1.0, 0.5, 1.0]).view(3, 1, 1)
        gain = 1 + 0.12 * normals(seed, "gain", images_seen, size, (3, 1, 1)) * cast
        level = 0.04 * uniforms(seed, "level", images_seen, size, (1, 1, 1))
        grain = level * normals(seed, "grain", images_seen, size, crops.shape[1:])
        return (crops * gain + grain).clamp(0, 1), rows // self.pictures.gallery.pictures

    def show(self, batch: tuple[Tensor, Tensor], path: Path) -> None:
        save_grid(batch[0], path, columns=8)

    def loss(self, batch: tuple[Tensor, Tensor], images_seen: int) -> Loss:
        crops, labels = batch
        embeddings = self.recogniser(crops)
        cosines = embeddings @ nn.functional.normalize(self.prototypes.weight, dim=1).T
        hits = (cosines.argmax(1) == labels).float().mean()
        loss = margin_loss(embeddings, labels, self.prototypes.weight, self.settings.scale, self.settings.margin)
        traits = trait_loss(self.reading(embeddings * self.settings.dimensions**0.5), self.people[labels.cpu()])
        share = min(1.0, max(0.0, images_seen / self.settings.ramp - 1))
        return Loss(share * loss + self.settings.traits * traits, {"accuracy": hits, "traits": traits.mean()})

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        """Return how well it recognises held-out people, any two pictures of each.

        rank1: share whose nearest of all people is right. limit: the distance that MISSED of the pairs of one person
        exceed, which is exported with the network. mistaken: share of the pairs of two people within it.
        """
        first, second = (
            torch.cat([self.recogniser(part.to(self.context.device)) for part in crops.split(100)])
            for crops in held_out_crops(self.recogniser.size, self.HELD_OUT_PEOPLE)
        )
        similarity = first @ second.T
        hits = (similarity.argmax(1) == torch.arange(len(first), device=similarity.device)).float().mean()
        off = similarity[~torch.eye(len(first), dtype=torch.bool, device=similarity.device)]
        own = similarity.diag()
        limit = 1 - float(own.float().quantile(MISSED))
        self.recogniser.config["limit"] = round(limit, 4)
        mistaken = float((off >= 1 - limit).float().mean())
        return {
            "rank1": float(hits), "same": float(own.mean()), "other": float(off.mean()), "limit": limit,
            "mistaken": mistaken,
        }  # fmt: skip

    def export(self, folder: Path) -> None:
        self.recogniser.save(folder / "recogniser", torch.float16)


PICTURES: dict[str, Callable[[Mapping[str, Any]], Pictures]] = {
    "judge": judge_pictures, "second_judge": second_judge_pictures, "train": training_pictures,
}  # fmt: skip


def _identities(data: DataSettings) -> dict[str, int]:
    """Return the number of people of each setting `people`."""
    return {
        "judge": data.judge_identities,
        "second_judge": data.second_judge_identities,
        "train": data.identities,
    }


@lru_cache(maxsize=2)
def held_out_crops(size: int, count: int = HELD_OUT_COUNT) -> tuple[Tensor, Tensor]:
    """Return face crops of two pictures of each of `count` held-out people; rendered once per process."""
    seeds = range(HELD_OUT.stop - count, HELD_OUT.stop)
    people = sample_people(seeds)
    pair = []
    for picture in (0, 1):
        out = render(people, sample_contexts([seed * 2 + picture for seed in seeds]))
        pair.append(crop_faces(out.images, out.boxes, size))
    return pair[0], pair[1]
