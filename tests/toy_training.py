"""A task small enough to train in a test: a real linear network that learns a fixed linear map from noise."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from train.data import normals
from train.task import Loss, Start


class ToySettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = 4
    dropout: float = 0.0
    bad: tuple[int, ...] = ()  # a batch that holds one of these image numbers gives NaN
    pause: float = 0.0  # seconds per batch


@dataclass(frozen=True)
class ToyBatch:
    x: Tensor
    y: Tensor


class ToyTask:
    Settings: ClassVar[type[BaseModel]] = ToySettings
    PARTS: ClassVar[tuple[str, ...]] = ("first", "second", "both")

    def __init__(self, settings: ToySettings, start: Start) -> None:
        self.settings, self.start = settings, start
        width = settings.width
        self.modules: dict[str, nn.Module] = {
            "body": nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Dropout(settings.dropout)),
            "head": nn.Linear(width, 2),
        }

    def parts(self) -> dict[str, list[nn.Parameter]]:
        first, second = list(self.modules["body"].parameters()), list(self.modules["head"].parameters())
        return {"first": first, "second": second, "both": first + second}

    def prepare(self) -> None:
        assert not self.modules["head"].training

    def batch(self, images_seen: int, size: int) -> ToyBatch:
        time.sleep(self.settings.pause)
        x = normals(self.start.seed, "x", images_seen, size, (3,))
        y = x[:, :2] * 2 - x[:, 2:]
        if any(images_seen <= bad < images_seen + size for bad in self.settings.bad):
            y = y * float("nan")
        return ToyBatch(x, y)

    def show(self, batch: ToyBatch, path: Path) -> None:
        path.write_text(json.dumps(batch.x.tolist()))

    def loss(self, batch: ToyBatch, images_seen: int) -> Loss:
        noise = normals(self.start.seed, "noise", images_seen, len(batch.x), (2,)) * 0.1
        error = self.modules["head"](self.modules["body"](batch.x)) - batch.y - noise
        return Loss(error.square().mean(1), {"largest": error.detach().abs().max()})

    def validate(self, folder: Path, images_seen: int) -> dict[str, float]:
        batch = self.batch(10**9, 64)
        error = self.modules["head"](self.modules["body"](batch.x)) - batch.y
        (folder / f"{images_seen:09d}.png").write_bytes(b"")
        return {"error": float(error.square().mean())}

    def export(self, folder: Path) -> None:
        weight = self.modules["head"].get_parameter("weight")
        (folder / "head.json").write_text(json.dumps(weight.tolist()))


if __name__ == "__main__":  # the trainer with the toy task, as a process that can be killed
    from train.__main__ import main

    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:], {"toy": ToyTask}))
