"""Where the images of a stage come from: named sources of pairs, mixed by weight, each image by its number alone.

A gallery holds pictures (see `train.cache`); a source is one way to make pairs of them. With "self" the target is
the reference itself, as in pre-training on single photos; with "other" it is another picture of the same person, as in
SynPairs (paper, section 3.3). What a stage sees, and in what order, is data: weights of sources, and how many images in
a row come from the same one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from imagine.errors import ConfigError
from imagine.settings import unknown_name
from train.cache.pictures import AnyGallery
from train.data.order import choices, shuffled

CaptionStyle = Literal["terse", "dense", "rewritten"]
_GOLDEN = 0.6180339887498949  # turns by this share of a circle spread most evenly, however many there are
_COUNT_INTERVAL = 8192  # images after which it is noted how many of each source there were


class Source(BaseModel):
    """Pairs from one gallery, and the manners in which their captions are written, by weight."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    gallery: str = "train"
    target: Literal["self", "other"] = "other"
    captions: Annotated[dict[CaptionStyle, float], Field(min_length=1)] = {"rewritten": 1.0}

    @field_validator("captions")
    @classmethod
    def _weighed(cls, captions: dict[CaptionStyle, float]) -> dict[CaptionStyle, float]:
        if min(captions.values()) < 0 or sum(captions.values()) <= 0:
            raise ValueError("the weights of captions must not be negative, and one must be positive")
        return captions


SOURCES = {  # what there is if a run names none: the paper's first two stages
    "real": Source(target="self", captions={"terse": 1.0}),
    "synthetic": Source(target="other", captions={"dense": 0.2, "rewritten": 0.8}),
}


@dataclass(frozen=True)
class DrawnPairs:
    """Which pictures make up a batch, one entry an image: rows of the gallery that `galleries` names."""

    galleries: list[str]
    references: Tensor  # (B,)
    targets: Tensor  # (B,)
    caption_styles: list[str]  # of the target's caption

    def by_gallery(self) -> dict[str, Tensor]:
        """Gallery -> which images of the batch come from it."""
        return {
            name: torch.tensor([i for i, other in enumerate(self.galleries) if other == name])
            for name in dict.fromkeys(self.galleries)
        }


class Mixture:
    """Draws batches from sources by weight; `block` images in a row come from the same source.

    A block of one mixes sources within a batch; one of the batch's size alternates whole batches. Either way the order
    is regular, not random: weights of 1 and 1 take turns. Each source counts its own images, so that every pair of it
    comes once a round; without `own_counts`, as in stages that an earlier version began, it counts all of them.

    Raises ConfigError for a weight of a source that is unknown, for weights that are not positive, and for a gallery
    that is missing or too small to make pairs.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        sources: Mapping[str, Source],
        galleries: Mapping[str, AnyGallery],
        block: int = 1,
        own_counts: bool = True,
    ) -> None:
        self.names = weighted_sources(weights, sources)
        self.sources, self.block = [sources[name] for name in self.names], block
        edges = torch.tensor([weights[name] for name in self.names], dtype=torch.float64).cumsum(0)
        self.edges = (edges / edges[-1])[:-1].contiguous()
        self.own_counts, self._counts = own_counts, [torch.zeros(len(self.names), dtype=torch.long)]
        self.pairs = [pairs_of(name, source, galleries) for name, source in zip(self.names, self.sources, strict=True)]

    def which(self, first: int, size: int) -> Tensor:
        """The source of each image, (size,): the number of its name."""
        blocks = torch.arange(first, first + size) // self.block
        return torch.bucketize((blocks.double() * _GOLDEN) % 1, self.edges, right=True)

    def draw(self, seed: int, first: int, size: int) -> DrawnPairs:
        """Images number `first` to `first + size`; every pair of a source comes once a round, in a new order each."""
        which, before = self.which(first, size), self._counts_before(first).tolist() if self.own_counts else []
        rows, caption_styles = torch.zeros(size, 2, dtype=torch.long), [""] * size
        for number, (name, source, pairs) in enumerate(zip(self.names, self.sources, self.pairs, strict=True)):
            here = (which == number).nonzero().squeeze(1)
            if len(here):
                purpose = f"pairs of {name}"
                if self.own_counts:
                    pair_numbers = shuffled(seed, purpose, before[number], len(here), len(pairs))
                else:
                    pair_numbers = shuffled(seed, purpose, first, size, len(pairs))[here]
                rows[here] = pairs[pair_numbers]
                for i, caption_style in zip(
                    here.tolist(), _caption_styles(source, seed, first, size)[here].tolist(), strict=True
                ):
                    caption_styles[i] = list(source.captions)[caption_style]
        galleries = [self.sources[number].gallery for number in which.tolist()]
        return DrawnPairs(galleries, rows[:, 0], rows[:, 1], caption_styles)

    def _counts_before(self, first: int) -> Tensor:
        """How many images of each source come before image number `first`, (sources,)."""
        strides, rest = divmod(first, _COUNT_INTERVAL)
        for stride in range(len(self._counts) - 1, strides):
            self._counts.append(self._counts[-1] + self._count_images(stride * _COUNT_INTERVAL, _COUNT_INTERVAL))
        return self._counts[strides] + self._count_images(strides * _COUNT_INTERVAL, rest)

    def _count_images(self, first: int, size: int) -> Tensor:
        return torch.bincount(self.which(first, size), minlength=len(self.names))


def weighted_sources(weights: Mapping[str, float], sources: Mapping[str, Source]) -> list[str]:
    """The sources with a positive weight; ConfigError if one is unknown, weighs less than nothing, or none is left."""
    for name, weight in weights.items():
        if name not in sources:
            raise ConfigError(f"sources: {unknown_name('source', name, list(sources))}.")
        if weight < 0:
            raise ConfigError(f"sources: {name} has weight {weight}; give it a positive one, or leave it out.")
    names = [name for name, weight in weights.items() if weight > 0]
    if not names:
        raise ConfigError(f"sources: give one of {', '.join(sources)} a positive weight.")
    return names


def pairs_of(name: str, source: Source, galleries: Mapping[str, AnyGallery]) -> Tensor:
    """The pairs of a source, (P, 2); ConfigError if its gallery is missing or holds none."""
    if source.gallery not in galleries:
        raise ConfigError(f"source {name}: {unknown_name('gallery', source.gallery, list(galleries))}.")
    pairs = galleries[source.gallery].pairs(source.target)
    if not len(pairs):
        raise ConfigError(
            f"source {name}: the gallery {source.gallery} holds no two pictures of one person; give it more "
            "pictures, or set the source's target to self."
        )
    return pairs


def _caption_styles(source: Source, seed: int, first: int, size: int) -> Tensor:
    return choices(seed, "manner", first, size, list(source.captions.values()))


def in_order(positions: Sequence[Tensor], pieces: Sequence[Tensor]) -> Tensor:
    """Rows of `pieces`, each (n, ...), put where `positions`, (n,) each, say."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(list(pieces))[torch.cat(list(positions)).argsort()]
