"""The portrait world as training material: the data settings all tasks share, and batches of rows by image number."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from train.data import shuffled
from train.pictures import Gallery, Pictures, open_pictures
from train.task import Start


class DataSettings(BaseModel):
    """The run's `data` section: how many people are rendered, how often, and where the pictures are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    folder: Path = Path("runs/data")
    identities: int = 20_000
    pictures: int = 2
    judge_identities: int = 4_000
    judge_pictures: int = 4
    drift: float = 0.06


def training_pictures(data: Mapping[str, Any]) -> Pictures:
    """Pictures of the people that the generator learns from."""
    settings = DataSettings(**data)
    gallery = Gallery("train", settings.identities, settings.pictures, drift=settings.drift)
    return open_pictures(gallery, settings.folder / "train")


def judge_pictures(data: Mapping[str, Any]) -> Pictures:
    """Pictures of the people that the judge learns from: exact identities, several pictures each."""
    settings = DataSettings(**data)
    gallery = Gallery("judge", settings.judge_identities, settings.judge_pictures, drift=0.0)
    return open_pictures(gallery, settings.folder / "judge")


def draw_rows(start: Start, purpose: str, images_seen: int, size: int, count: int) -> Tensor:
    """Which of `count` rows make up this batch, (size,): every row once a round, in a new order each round."""
    return shuffled(start.seed, purpose, images_seen, size, count)
