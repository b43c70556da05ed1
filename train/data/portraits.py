"""The data settings that all tasks share, the pictures of their galleries, and the rows of each batch."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from imagine.errors import ConfigError
from imagine.settings import unknown_name, validated
from imagine.shards.reading import has_records, open_records
from imagine.world.seeds import HELD_OUT, JUDGE, SECOND_JUDGE
from train.cache.groups import GroupGallery
from train.cache.pictures import AnyPictures, Gallery, Pictures, open_pictures
from train.data.order import shuffled
from train.data.recorded import describe_problems, open_recorded
from train.data.sources import SOURCES, CaptionStyle, Source, check_caption_weights, pairs_of, weighted_sources
from train.task import TaskContext

SIDE = 128  # pixels of every picture
_MOST_JUDGED = SECOND_JUDGE.start - JUDGE.start  # the people before those of the second recogniser
_HELD_OUT_FIRST = len(HELD_OUT) - 5_000  # far from the people of the evaluation


class GallerySettings(BaseModel):
    """A gallery: people of the portrait world's training split, or the pictures of a data set.

    People are given by their numbers, so that two galleries can share people or not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    records: str | None = None  # the address of webdataset shards or of a folder (docs/data.md), instead of people
    first: int = Field(0, ge=0)  # number of the first person in the training split
    identities: int = Field(1, ge=1)  # number of people
    pictures: int = Field(2, ge=1)  # pictures per person; the first is the real one, the others are synthetic
    drift: float = Field(0.06, ge=0)  # how far a person's identity differs in the synthetic pictures
    camera: bool = True  # whether real pictures have the noise of a cheap camera
    words: bool = False  # whether all but each person's first picture show a word on the clothes


class GroupSettings(BaseModel):
    """A gallery of pictures with several people: the people of the gallery "train", or those of a data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    people: int = Field(2, ge=2, le=4)  # people in each picture
    count: int = Field(1, ge=1)  # number of pictures, without `records`
    # the address of records that show several people (docs/data.md); for tasks on a public base
    records: str | None = None
    captions: Annotated[dict[CaptionStyle, float], Field(min_length=1)] = {"rewritten": 1.0}  # style -> weight

    @model_validator(mode="after")
    def _has_an_effect(self) -> "GroupSettings":
        other = "captions" if self.records is None else "count"
        if other in self.model_fields_set:
            reason = "without records" if self.records is None else "beside records, which are all used"
            raise ValueError(f"{other} has no effect {reason}: remove {other}")
        check_caption_weights(self.captions)
        return self


class DataSettings(BaseModel):
    """The run's `data` section: the galleries, the sources that draw pairs from them, and the folder of the cache.

    `first`, `identities`, `pictures` and `drift` describe the gallery named "train"; `galleries` adds others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    folder: Path = Path("runs/data")  # the cache: pictures, latents, face crops, tokens
    first: int = Field(0, ge=0)  # number of the first person; a later run can continue with new people
    identities: int = Field(20_000, ge=1)  # number of people
    pictures: int = Field(2, ge=1)  # pictures per person; the first is the real one, the others are synthetic
    drift: float = Field(0.06, ge=0)  # how far a person's identity differs in the synthetic pictures
    galleries: dict[str, GallerySettings] = Field(default_factory=dict)  # more galleries, by name
    groups: dict[str, GroupSettings] = Field(default_factory=dict)  # galleries of several people, by name
    sources: dict[str, Source] = Field(default_factory=lambda: dict(SOURCES))  # sources of pairs, by name
    judge_identities: int = Field(12_000, ge=1, le=_MOST_JUDGED)  # number of people that the judge trains on
    judge_pictures: int = Field(3, ge=1)  # pictures per person that the judge trains on
    second_judge_identities: int = Field(20_000, ge=1, le=len(SECOND_JUDGE))  # other people, of the second recogniser
    second_judge_pictures: int = Field(2, ge=1)  # pictures per person that the second recogniser trains on
    most: int | None = Field(None, ge=2)  # limit on the people, or records, of each gallery, for a trial; none: all

    def limited(self, count: int) -> int:
        """Return `count`, or `most` if that is smaller."""
        return count if self.most is None else min(count, self.most)

    def gallery(self, name: str) -> Gallery:
        """Return the gallery of that name; ConfigError with the valid names if there is none."""
        if name == "train":
            return Gallery("train", self.limited(self.identities), self.pictures, drift=self.drift, first=self.first)
        if name not in self.galleries:
            raise ConfigError(f"data: {unknown_name('gallery', name, ['train', *self.galleries])}.")
        it = self.galleries[name]
        count = self.limited(it.identities)
        return Gallery("train", count, it.pictures, drift=it.drift, first=it.first, camera=it.camera, words=it.words)

    def group(self, name: str) -> GroupSettings:
        """Return the settings of the group of that name; ConfigError with the valid names if there is none."""
        if name not in self.groups:
            raise ConfigError(f"data: {unknown_name('group', name, list(self.groups))}.")
        return self.groups[name]

    def group_records(self, name: str) -> str:
        """Return the address of a group's records; ConfigError if there is no such group, or no records there."""
        address = self.group(name).records
        if address is None:
            raise ConfigError(
                f"data: group {name} shows people of the portrait world; a public base trains on records: give it "
                "records, the address of pictures of several people (docs/data.md)."
            )
        if not has_records(address):
            raise ConfigError(f"data: group {name}: there are no records at {address}; correct its records.")
        return address

    def group_gallery(self, name: str) -> GroupGallery:
        """Return the gallery of several people of that name; ConfigError with the valid names if there is none."""
        it, portraits = self.group(name), self.gallery("train")
        if it.records is not None:
            raise ConfigError(
                f"data: group {name} has records, which only the task diffusers_adapter trains on; give it a count."
            )
        if portraits.identities < it.people:
            raise ConfigError(
                f"data: group {name} shows {it.people} people, but the gallery train has fewer; add some."
            )
        return GroupGallery(portraits, it.people, self.limited(it.count))


def data_settings(data: Mapping[str, Any]) -> DataSettings:
    """Return the run's `data` section, checked; ConfigError for a mistake in it."""
    return validated(DataSettings, data, "data")


def check_sources(data: Mapping[str, Any], weights: Mapping[str, float]) -> None:
    """Raise ConfigError if a source is unknown or empty, or if no weight is positive; no picture is read."""
    settings = data_settings(data)
    for name in weighted_sources(weights, settings.sources):
        source = settings.sources[name]
        named = settings.galleries.get(source.gallery)
        if named is None or named.records is None:
            known = {gallery: settings.gallery(gallery) for gallery in ("train", *settings.galleries)}
            pairs_of(name, source, known)
        elif not has_records(named.records):
            raise ConfigError(f"source {name}: there are no records at {named.records}; correct the gallery's records.")


def describe_records(data: Mapping[str, Any]) -> list[str]:
    """Return for every gallery and group of records how many it has, and what is not read and why, in sentences."""
    lines, settings = [], data_settings(data)
    named = {f"gallery {name}": (each.records, 0) for name, each in settings.galleries.items()}
    named |= {f"group {name}": (each.records, each.people) for name, each in settings.groups.items()}
    for name, (address, people) in named.items():
        if address is None:
            continue
        try:
            records = open_records(address)
        except ConfigError as error:  # of a gallery that no stage draws from; `check_sources` raises for the others
            lines.append(f"{name}: {error}")
            continue
        count = sum(len(each) == people for each in records.groups().values()) if people else len(records)
        lines.append(f"{name}: {count:,} records of {f'{people} people of ' if people else ''}{address}")
        lines += [f"  {sentence}" for sentence in describe_problems(records.problems)]
    return lines


def check_two_pictures(data: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the people of the gallery "train" have at least two pictures each."""
    if data_settings(data).pictures < 2:
        raise ConfigError("data: this stage needs two pictures of each person; set pictures to 2 or more.")


def pictures_of(data: Mapping[str, Any], name: str, side: int = SIDE) -> AnyPictures:
    """Return the pictures of one gallery, `side` pixels wide and high; missing ones are rendered."""
    settings = data_settings(data)
    named, folder = settings.galleries.get(name), gallery_folder(data, name, side)
    if named is not None and named.records is not None:
        return open_recorded(named.records, side, folder, most=settings.most)
    return open_pictures(replace(settings.gallery(name), size=side), folder)


def gallery_folder(data: Mapping[str, Any], name: str, side: int = SIDE) -> Path:
    """Return the cache folder of a gallery for pictures of that size."""
    return data_settings(data).folder / (name if side == SIDE else f"{name}-{side}px")


def training_pictures(data: Mapping[str, Any]) -> Pictures:
    """Return the pictures that the generator trains on."""
    settings = data_settings(data)
    return open_pictures(settings.gallery("train"), settings.folder / "train")


def judge_pictures(data: Mapping[str, Any]) -> Pictures:
    """Return the pictures that the judge trains on: several per person, without drift of the identity."""
    settings = data_settings(data)
    gallery = Gallery("judge", settings.limited(settings.judge_identities), settings.judge_pictures, drift=0.0)
    return open_pictures(gallery, settings.folder / "judge")


def second_judge_pictures(data: Mapping[str, Any]) -> Pictures:
    """Return the pictures of the second recogniser, which show none of the people of `judge_pictures`."""
    settings = data_settings(data)
    count = settings.limited(settings.second_judge_identities)
    gallery = Gallery("second judge", count, settings.second_judge_pictures, drift=0.0)
    return open_pictures(gallery, settings.folder / "second_judge")


def held_out_pictures(data: Mapping[str, Any], people: int) -> Pictures:
    """Return two pictures each of people for validation, who occur neither in training nor in the evaluation."""
    gallery = Gallery("held out", people, 2, drift=0.0, first=_HELD_OUT_FIRST, camera=False)
    return open_pictures(gallery, data_settings(data).folder / f"held-out-{people}")


def draw_rows(context: TaskContext, purpose: str, images_seen: int, size: int, count: int) -> Tensor:
    """Return the rows (size,) of this batch, out of `count`: every row once per epoch, in a new order each epoch."""
    return shuffled(context.seed, purpose, images_seen, size, count)
