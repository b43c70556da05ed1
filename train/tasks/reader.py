"""Train the judge's reader: it classifies each attribute of a picture and reads the letters on a shirt.

With `people: train` it is instead the reader of the denoiser's reader loss, which must not be the judge.
"""

from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from imagine.evaluation.judge import Reader, reading_loss
from imagine.world import attributes, render, sample_contexts, sample_people
from imagine.world.seeds import HELD_OUT
from imagine.world.vocabulary import ATTRIBUTES, TRAITS
from train.data.order import normals, uniforms
from train.data.portraits import data_settings, draw_rows, judge_pictures, training_pictures
from train.run.grids import save_grid
from train.task import Loss, TaskContext, Weight
from train.tasks.auxiliary import READER


class ReaderSettings(BaseModel):
    """The weights of the attributes in the loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    letters: Weight = 3.0  # weight of the letters; every other attribute has weight 1
    # whose pictures it trains on. "train": the generator's people, for the denoiser's reader loss. The judge must train
    # on its own people, and the reader of a loss must not be the judge.
    people: Literal["judge", "train"] = "judge"


class ReaderTask:
    """Train the reader on the judge's own people, so that it does not share the weaknesses of the generator."""

    Settings: ClassVar[type[BaseModel]] = ReaderSettings
    PARTS: ClassVar[tuple[str, ...]] = ("reader",)
    HELD_OUT_PICTURES: ClassVar[int] = 400

    def __init__(self, settings: ReaderSettings, context: TaskContext) -> None:
        self.settings, self.context = settings, context
        self.reader = Reader({**ATTRIBUTES, "letters": ()}, TRAITS)
        self.modules: dict[str, nn.Module] = {READER if settings.people == "train" else "reader": self.reader}

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"reader": list(self.reader.parameters())}

    def check(self) -> list[str]:
        data_settings(self.context.data)
        return []

    def prepare(self) -> None:
        judge = self.settings.people == "judge"
        self.pictures = judge_pictures(self.context.data) if judge else training_pictures(self.context.data)
        gallery = self.pictures.gallery
        rows = torch.arange(len(gallery))
        self.targets = self.reader.targets(attributes(gallery.people(rows), gallery.contexts(rows)))
        seeds = range(HELD_OUT.stop - data_settings(self.context.data).limited(self.HELD_OUT_PICTURES), HELD_OUT.stop)
        people, contexts = sample_people(seeds), sample_contexts(seeds)
        self.held_out = render(people, contexts).images, attributes(people, contexts)

    def batch(self, images_seen: int, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        rows = draw_rows(self.context, "rows", images_seen, size, len(self.pictures.gallery))
        images = self.pictures.take(rows)[0]
        seed = self.context.seed
        level = 0.05 * uniforms(seed, "level", images_seen, size, (1, 1, 1))
        images = images + level * normals(seed, "grain", images_seen, size, images.shape[1:])
        shifts = (uniforms(seed, "shift", images_seen, size, (2,)) * 9).long() - 4
        moved = [image.roll(shift, (1, 2)) for image, shift in zip(images, shifts.tolist(), strict=True)]
        return torch.stack(moved).clamp(0, 1), {name: target[rows] for name, target in self.targets.items()}

    def show(self, batch: tuple[Tensor, dict[str, Tensor]], path: Path) -> None:
        save_grid(batch[0], path, columns=8)

    def loss(self, batch: tuple[Tensor, dict[str, Tensor]], images_seen: int) -> Loss:
        images, targets = batch
        losses = reading_loss(self.reader(images), targets)
        weights = {"letters": self.settings.letters}
        total = torch.stack([weights.get(name, 1.0) * loss for name, loss in losses.items()]).mean(0)
        return Loss(total, {"letters": losses["letters"].mean().detach()})

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        images, truth = self.held_out
        logits = [self.reader(part.to(self.context.device)) for part in images.split(100)]
        read = self.reader.words({name: torch.cat([part[name] for part in logits]) for name in logits[0]})
        names, pairs = [*ATTRIBUTES, *TRAITS], list(zip(read, truth, strict=True))
        right = {name: sum(a[name] == b[name] for a, b in pairs) / len(truth) for name in names}
        lettered = [(a["letters"], b["letters"]) for a, b in pairs if b["letters"]]
        right["letters"] = sum(a == b for a, b in lettered) / max(1, len(lettered))
        return {"mean": sum(right.values()) / len(right), **right}

    def export(self, folder: Path) -> None:
        self.reader.save(folder / "reader", torch.float16)
