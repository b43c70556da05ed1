"""Train the small face finder on renders of one to three people at any place and size, and on empty scenes."""

from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from imagine.people import finder
from imagine.world import render_groups, sample_contexts, sample_people
from imagine.world.scenes import paint_scenes
from imagine.world.seeds import HELD_OUT, JUDGE
from train.data.order import chance, uniforms
from train.data.portraits import data_settings, draw_rows, judge_pictures
from train.run.grids import save_grid
from train.task import Loss, Share, TaskContext


class FinderSettings(BaseModel):
    """The shares of pictures with no person and with several people; the rest show one person."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    empty_share: Share = 0.15  # share of pictures without a person
    group_share: Share = 0.25  # share of pictures with two or three people


class FinderTask:
    """Train the finder on up to three people per picture, at any place and size."""

    Settings: ClassVar[type[BaseModel]] = FinderSettings
    PARTS: ClassVar[tuple[str, ...]] = ("finder",)
    GROUPS: ClassVar[int] = 600  # pictures each of two people, of three people and of empty scenes, rendered once
    HELD_OUT_PICTURES: ClassVar[int] = 100  # pictures each of one, two and three people

    def __init__(self, settings: FinderSettings, context: TaskContext) -> None:
        self.settings, self.context = settings, context
        self.finder = finder.Finder()
        self.modules: dict[str, nn.Module] = {"finder": self.finder}

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"finder": list(self.finder.parameters())}

    def check(self) -> list[str]:
        data_settings(self.context.data)
        return []

    def prepare(self) -> None:
        self.pictures = judge_pictures(self.context.data)
        limited = data_settings(self.context.data).limited
        groups, held_out = limited(self.GROUPS), limited(self.HELD_OUT_PICTURES)
        self.groups = [_groups(JUDGE.start + 5_000_000, count, groups) for count in (2, 3)]
        self.scenes = paint_scenes(sample_contexts(range(JUDGE.start, JUDGE.start + groups)), 128)
        self.held_out = [_groups(HELD_OUT.stop - 1_000, count, held_out) for count in (1, 2, 3)]

    def batch(self, images_seen: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return pictures (B, 3, S, S), boxes (B, 3, 4) and which of the boxes hold a face (B, 3)."""
        seed = self.context.seed
        rows = draw_rows(self.context, "rows", images_seen, size, len(self.pictures.gallery))
        images, single = self.pictures.take(rows)
        boxes = torch.zeros(size, 3, 4)
        boxes[:, 0] = single
        valid = torch.zeros(size, 3, dtype=torch.bool)
        valid[:, 0] = True
        kind, pick = uniforms(seed, "kinds", images_seen, size, (2,)).unbind(1)
        pick = (pick * len(self.scenes)).long()
        for i in range(size):
            if kind[i] < self.settings.empty_share:
                images[i] = self.scenes[pick[i]]
                valid[i] = False
            elif kind[i] < self.settings.empty_share + self.settings.group_share:
                count = 2 + int(pick[i] % 2)
                pictures, face_boxes = self.groups[count - 2]
                images[i], boxes[i, :count] = pictures[pick[i]], face_boxes[pick[i]]
                valid[i, :count] = True
        images, boxes = _zoom(images, boxes, uniforms(seed, "zoom", images_seen, size, (6,)))
        grey = chance(seed, "grey", images_seen, size, 0.25)
        images[grey] = images[grey].mean(1, keepdim=True).expand(-1, 3, -1, -1)
        return images, boxes, valid

    def show(self, batch: tuple[Tensor, Tensor, Tensor], path: Path) -> None:
        save_grid(batch[0], path, columns=8)

    def loss(self, batch: tuple[Tensor, Tensor, Tensor], images_seen: int) -> Loss:
        images, boxes, valid = batch
        target = finder.targets(boxes, valid, images.shape[-1])
        return Loss(finder.loss(self.finder(images), target))

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        found = right = wrong = 0
        for images, boxes in self.held_out:
            face_boxes, scores = finder.decode(self.finder(images.to(self.context.device)), images.shape[-1])
            for i in range(len(images)):
                detected = face_boxes[i][scores[i] > 0.5].cpu()
                near = (_centres(detected)[:, None] - _centres(boxes[i])[None]).norm(dim=-1) < 0.4 * boxes[i, :, 2]
                right += int(near.any(0).sum()) if len(detected) else 0
                wrong += int((~near.any(1)).sum()) if len(detected) else 0
                found += len(boxes[i])
        return {"recall": right / found, "false_per_face": wrong / found}

    def export(self, folder: Path) -> None:
        finder.save_finder(self.finder, folder / "finder", torch.float16)


def _groups(first: int, count: int, pictures: int) -> tuple[Tensor, Tensor]:
    seeds = range(first, first + pictures * count)
    out = render_groups(sample_people(seeds), sample_contexts(seeds), count, width=128)
    return out.images, out.boxes


def _centres(boxes: Tensor) -> Tensor:
    return boxes[:, :2] + boxes[:, 2:] / 2


def _zoom(images: Tensor, boxes: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each picture by 0.35 to 1.15 and move it on a plain background, and its boxes with it.

    `random` (B, 6), 0 to 1, holds for each picture: scale, horizontal and vertical place, and background colour.
    """
    count, side = len(images), images.shape[-1]
    scale = 0.35 + 0.8 * random[:, 0]
    shift = (random[:, 1:3] * 2 - 1) * (1 - scale.clamp(max=1)).unsqueeze(1)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = -shift / scale.unsqueeze(1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    ground = random[:, 3:].reshape(count, 3, 1, 1)
    moved = F.grid_sample(images - ground, grid, align_corners=False) + ground
    middle = (boxes[..., :2] * 2 / side - 1) * scale.view(-1, 1, 1) + shift.unsqueeze(1)
    return moved, torch.cat(((middle + 1) * side / 2, boxes[..., 2:] * scale.view(-1, 1, 1)), -1)
