"""The portrait world as training material: the data settings all tasks share, and batches of rows by image number."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from imagine.errors import ConfigError
from imagine.settings import unknown_name, validated
from imagine.shards.reading import has_records
from imagine.world.seeds import HELD_OUT
from train.cache.pictures import AnyPictures, Gallery, Pictures, open_pictures
from train.data.order import shuffled
from train.data.recorded import open_recorded
from train.data.sources import SOURCES, Source, pairs_of, weighted_sources
from train.task import TaskContext

SIDE = 128  # pixels of every picture
_HELD_OUT_FIRST = len(HELD_OUT) - 5_000  # far from the people whom evaluation asks for


class GallerySettings(BaseModel):
    """People of the training split, by their numbers, so that galleries share them or not as you like.

    Or, with `records`, the pictures of a data set: the address of webdataset shards or of a folder (docs/data.md).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    records: str | None = None
    first: int = Field(0, ge=0)
    identities: int = Field(1, ge=1)
    pictures: int = Field(2, ge=1)
    drift: float = Field(0.06, ge=0)
    camera: bool = True  # whether real pictures carry the noise of a cheap one


class DataSettings(BaseModel):
    """The run's `data` section: how many people are rendered, how often, and where the pictures are kept.

    `first`, `identities`, `pictures` and `drift` describe the gallery called "train"; `galleries` adds others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    folder: Path = Path("runs/data")
    first: int = Field(0, ge=0)  # a run that trains on can meet people whom the one before did not
    identities: int = Field(20_000, ge=1)
    pictures: int = Field(2, ge=1)
    drift: float = Field(0.06, ge=0)
    galleries: dict[str, GallerySettings] = Field(default_factory=dict)
    sources: dict[str, Source] = Field(default_factory=lambda: dict(SOURCES))
    judge_identities: int = Field(12_000, ge=1)
    judge_pictures: int = Field(3, ge=1)
    most: int | None = Field(None, ge=2)  # people, or records, that a trial takes of each gallery; none: all

    def limited(self, count: int) -> int:
        """So many, or as many as a trial takes."""
        return count if self.most is None else min(count, self.most)

    def gallery(self, name: str) -> Gallery:
        """The gallery of that name; ConfigError with the valid names if there is none."""
        if name == "train":
            return Gallery("train", self.limited(self.identities), self.pictures, drift=self.drift, first=self.first)
        if name not in self.galleries:
            raise ConfigError(f"data: {unknown_name('gallery', name, ['train', *self.galleries])}.")
        it = self.galleries[name]
        count = self.limited(it.identities)
        return Gallery("train", count, it.pictures, drift=it.drift, first=it.first, camera=it.camera)


def data_settings(data: Mapping[str, Any]) -> DataSettings:
    """The run's `data` section, checked; ConfigError for what is wrong in it."""
    return validated(DataSettings, data, "data")


def check_sources(data: Mapping[str, Any], weights: Mapping[str, float]) -> None:
    """ConfigError for sources that are unknown, weigh nothing, or have nothing to draw from; no picture is read."""
    settings = data_settings(data)
    for name in weighted_sources(weights, settings.sources):
        source = settings.sources[name]
        named = settings.galleries.get(source.gallery)
        if named is None or named.records is None:
            known = {gallery: settings.gallery(gallery) for gallery in ("train", *settings.galleries)}
            pairs_of(name, source, known)
        elif not has_records(named.records):
            raise ConfigError(f"source {name}: there is nothing at {named.records}, where its records should be.")


def check_two_pictures(data: Mapping[str, Any]) -> None:
    """ConfigError unless people of the gallery "train" have two pictures each."""
    if data_settings(data).pictures < 2:
        raise ConfigError("data: this stage compares two pictures of one person; set pictures to 2 or more.")


def pictures_of(data: Mapping[str, Any], name: str, side: int = SIDE) -> AnyPictures:
    """The pictures of one gallery, `side` pixels wide and high, rendered if they are not there yet."""
    settings = data_settings(data)
    named, folder = settings.galleries.get(name), gallery_folder(data, name, side)
    if named is not None and named.records is not None:
        return open_recorded(named.records, side, folder, most=settings.most)
    return open_pictures(replace(settings.gallery(name), size=side), folder)


def gallery_folder(data: Mapping[str, Any], name: str, side: int = SIDE) -> Path:
    """Where what is made of a gallery's pictures of that size is kept."""
    return data_settings(data).folder / (name if side == SIDE else f"{name}-{side}px")


def training_pictures(data: Mapping[str, Any]) -> Pictures:
    """Pictures of the people that the generator learns from."""
    settings = data_settings(data)
    return open_pictures(settings.gallery("train"), settings.folder / "train")


def judge_pictures(data: Mapping[str, Any]) -> Pictures:
    """Pictures of the people that the judge learns from: exact identities, several pictures each."""
    settings = data_settings(data)
    gallery = Gallery("judge", settings.limited(settings.judge_identities), settings.judge_pictures, drift=0.0)
    return open_pictures(gallery, settings.folder / "judge")


def held_out_pictures(data: Mapping[str, Any], people: int) -> Pictures:
    """Two pictures each of people whom nobody is trained on, nor evaluation asks for: to validate with."""
    gallery = Gallery("held out", people, 2, drift=0.0, first=_HELD_OUT_FIRST, camera=False)
    return open_pictures(gallery, data_settings(data).folder / f"held-out-{people}")


def draw_rows(context: TaskContext, purpose: str, images_seen: int, size: int, count: int) -> Tensor:
    """Which of `count` rows make up this batch, (size,): every row once a round, in a new order each round."""
    return shuffled(context.seed, purpose, images_seen, size, count)
