"""Train the small face finder on renders of one to four people at any place and size, and on pictures of nobody."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from imagine.people import finder
from imagine.world.groups import MAX_PEOPLE
from imagine.world.seeds import HELD_OUT, JUDGE
from train.data.order import chance, uniforms
from train.data.portraits import SIDE, data_settings, draw_rows, judge_pictures
from train.run.grids import save_grid
from train.task import Loss, Share, TaskContext
from train.tasks.finder_pictures import FinderPictures, groups, no_faces, scenes, sheets


class FinderSettings(BaseModel):
    """The shares of pictures with no face and with several people; the rest show one person."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    empty_share: Share = 0.15  # share of scenes of the world without a person
    negative_share: Share = 0.15  # share of photographs of things, shuffled portraits and noise
    group_share: Share = 0.25  # share of pictures of two to four people
    sheet_share: Share = 0.1  # share of sheets of four portraits

    @model_validator(mode="after")
    def _shares_leave_room(self) -> "FinderSettings":
        if self.empty_share + self.negative_share + self.group_share + self.sheet_share > 1:
            raise ValueError(
                "the shares of empty_share, negative_share, group_share and sheet_share sum to more than 1"
            )
        return self


class FinderTask:
    """Train the finder on up to four people per picture, at any place and size."""

    Settings: ClassVar[type[BaseModel]] = FinderSettings
    PARTS: ClassVar[tuple[str, ...]] = ("finder",)
    RENDERED: ClassVar[int] = 600  # pictures each of two, three and four people and of nobody, rendered once
    HELD_OUT_PICTURES: ClassVar[int] = 100  # pictures each of one to four people and of nobody

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
        rendered, held_out = limited(self.RENDERED), limited(self.HELD_OUT_PICTURES)
        start, end = JUDGE.start + 5_000_000, HELD_OUT.stop - 1_000
        self.groups = _joined([groups(start, count, rendered, SIDE) for count in (2, 3, 4)])
        self.scenes = scenes(range(JUDGE.start, JUDGE.start + rendered), SIDE)
        self.negatives = no_faces(range(start, start + rendered), SIDE)
        self.held_out = _joined([groups(end, count, held_out, SIDE) for count in range(1, MAX_PEOPLE + 1)])
        self.held_out_negatives = no_faces(range(end, end + held_out), SIDE)

    def batch(self, images_seen: int, size: int) -> FinderPictures:
        """Return a batch of pictures, each scaled and moved on a plain background; a quarter of them is grey."""
        seed, settings = self.context.seed, self.settings
        rows = draw_rows(self.context, "rows", images_seen, size, len(self.pictures.gallery))
        images, single = self.pictures.take(rows)
        boxes = F.pad(single.unsqueeze(1), (0, 0, 0, MAX_PEOPLE - 1))
        valid = (torch.arange(MAX_PEOPLE) == 0).repeat(size, 1)
        kind, pick = uniforms(seed, "kinds", images_seen, size, (2,)).unbind(1)
        limits = torch.tensor([settings.empty_share, settings.negative_share, settings.group_share]).cumsum(0)
        sheet = kind >= 1 - settings.sheet_share
        nothing, negative = kind < limits[0], (kind >= limits[0]) & (kind < limits[1])
        group = (kind >= limits[1]) & (kind < limits[2]) & ~sheet
        if sheet.any():
            images[sheet], boxes[sheet], valid[sheet] = self._sheets(rows[sheet])
        images[nothing], valid[nothing] = self.scenes[_index(pick[nothing], len(self.scenes))], False
        images[negative], valid[negative] = self.negatives[_index(pick[negative], len(self.negatives))], False
        chosen = _index(pick[group], len(self.groups.images))
        images[group], boxes[group], valid[group] = (part[chosen] for part in self.groups)
        images, boxes = _zoom(images, boxes, uniforms(seed, "zoom", images_seen, size, (6,)))
        grey = chance(seed, "grey", images_seen, size, 0.25)
        images[grey] = images[grey].mean(1, keepdim=True).expand(-1, 3, -1, -1)
        return FinderPictures(images, boxes, valid)

    def _sheets(self, rows: Tensor) -> FinderPictures:
        """Return a sheet for each row: its own portrait and the three that follow it in the gallery."""
        four = (rows.unsqueeze(1) + torch.arange(4)).flatten() % len(self.pictures.gallery)
        return sheets(*self.pictures.take(four))

    def show(self, batch: FinderPictures, path: Path) -> None:
        save_grid(batch.images, path, columns=8)

    def loss(self, batch: FinderPictures, images_seen: int) -> Loss:
        target = finder.targets(batch.boxes, batch.valid, batch.images.shape[-1])
        return Loss(finder.loss(self.finder(batch.images), target))

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        """Return the share of faces found, the false faces per face, and the share of other pictures with a face."""
        right = wrong = 0
        images, boxes, valid = self.held_out
        for i, detected in enumerate(self._find(images)):
            faces = boxes[i][valid[i]]
            near = (_centres(detected)[:, None] - _centres(faces)[None]).norm(dim=-1) < 0.4 * faces[:, 2]
            right += int(near.any(0).sum())
            wrong += int((~near.any(1)).sum())
        fooled = [len(detected) > 0 for detected in self._find(self.held_out_negatives)]
        found = int(valid.sum())
        return {"recall": right / found, "false_per_face": wrong / found, "fooled": sum(fooled) / len(fooled)}

    def _find(self, images: Tensor) -> Iterator[Tensor]:
        """Yield for each picture the boxes (K, 4) with a score above one half."""
        for part in images.split(100):
            face_boxes, scores = finder.decode(self.finder(part.to(self.context.device)), part.shape[-1])
            for each, score in zip(face_boxes, scores, strict=True):
                yield each[score > 0.5].cpu()

    def export(self, folder: Path) -> None:
        finder.save_finder(self.finder, folder / "finder", torch.float16)


def _joined(parts: Sequence[FinderPictures]) -> FinderPictures:
    return FinderPictures(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _index(share: Tensor, count: int) -> Tensor:
    """Map numbers from 0 to 1 to indices below `count`."""
    return (share * count).long()


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
