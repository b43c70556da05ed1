"""The sources of a stage's pairs: named sources, mixed by weight; the source of an image depends only on its number.

A gallery holds pictures (see `train.cache`); a source defines how pairs are made from them. With target "self" the
target is the reference itself, as in pre-training on single photos; with "other" it is another picture of the same
person, as in SynPairs (paper, section 3.3). Settings choose what a stage trains on, and in what order: the weights of
the sources, and how many consecutive images come from the same source.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from imagine.errors import ConfigError
from imagine.settings import unknown_name
from train.cache.pictures import AnyGallery
from train.data.order import GOLDEN_RATIO, choices, shuffled
from train.data.words import Words

CaptionStyle = Literal["terse", "dense", "rewritten"]
_COUNT_INTERVAL = 8192  # images between cached counts of each source's images


def check_caption_weights(captions: dict[CaptionStyle, float]) -> dict[CaptionStyle, float]:
    """Return the weights of caption styles; ValueError if one is negative, or if none is positive."""
    if min(captions.values()) < 0 or sum(captions.values()) <= 0:
        raise ValueError("the weights of captions must not be negative, and one must be positive")
    return captions


class Source(BaseModel):
    """A source of pairs: one gallery, the kind of target, and the weights of the caption styles."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    gallery: str = "train"  # name of the gallery
    target: Literal["self", "other"] = "other"  # self: the reference itself; other: another picture of the person
    captions: Annotated[dict[CaptionStyle, float], Field(min_length=1)] = {"rewritten": 1.0}  # caption style -> weight

    @field_validator("captions")
    @classmethod
    def _weighed(cls, captions: dict[CaptionStyle, float]) -> dict[CaptionStyle, float]:
        return check_caption_weights(captions)


SOURCES = {  # the default sources, for the paper's first two stages
    "real": Source(target="self", captions={"terse": 1.0}),
    "synthetic": Source(target="other", captions={"dense": 0.2, "rewritten": 0.8}),
}


@dataclass(frozen=True)
class DrawnPairs:
    """The pairs of a batch, one entry per image."""

    galleries: list[str]  # each image's gallery
    references: Tensor  # (B,) rows of that gallery
    targets: Tensor  # (B,) rows of that gallery
    caption_styles: list[str]  # the style of the target's caption

    def by_gallery(self) -> dict[str, Tensor]:
        """Return gallery -> indices of the batch's images that come from it."""
        return {
            name: torch.tensor([i for i, other in enumerate(self.galleries) if other == name])
            for name in dict.fromkeys(self.galleries)
        }


@dataclass(frozen=True)
class _Pool:
    """Pairs of one source that are drawn in one order."""

    source: int  # index of the source
    purpose: str
    pairs: Tensor  # (P, 2)


class Mixture:
    """Draws batches from sources by weight; `block` consecutive images come from the same source.

    A block of one mixes the sources within a batch; a block of the batch size alternates whole batches. In both cases
    the order is regular, not random: two sources of equal weight alternate. Each source counts its own images, so that
    each of its pairs comes once per epoch; without `own_counts`, as in stages started by an earlier version, a source
    counts the images of all sources.

    With `words`, each source has two pools, the pairs whose target carries a word and the others, and both come once
    per epoch of their own. `lettered` says which rows carry one, for each gallery for which this is known. A source of
    another gallery keeps one pool, and so does one that lacks pairs with a word, or without one.

    Raises ConfigError for an unknown source, for weights that are not positive, and for a gallery that is missing or
    too small to make pairs.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        sources: Mapping[str, Source],
        galleries: Mapping[str, AnyGallery],
        block: int = 1,
        own_counts: bool = True,
        words: Words | None = None,
        lettered: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.names = weighted_sources(weights, sources)
        self.sources, self.block = [sources[name] for name in self.names], block
        edges = torch.tensor([weights[name] for name in self.names], dtype=torch.float64).cumsum(0)
        self.edges = (edges / edges[-1])[:-1].contiguous()
        self.own_counts, self.words = own_counts, words
        self.pairs = [pairs_of(name, source, galleries) for name, source in zip(self.names, self.sources, strict=True)]
        self.with_word = self._counts_of_words(lettered)
        counted = zip(self.with_word, self.pairs, strict=True)
        self.split = torch.tensor([bool(found) and found != len(pairs) for found, pairs in counted])
        self.pools = self._pools(lettered)
        self._counts = [torch.zeros(len(self.pools), dtype=torch.long)]

    def _pools(self, lettered: Mapping[str, Tensor]) -> list[_Pool]:
        """Return one pool per source or, with words, two, of which the second holds the pairs with a word.

        A source that is not split keeps one pool, which stands for both: all its images have the first number.
        """
        pools = []
        for number, (name, source, pairs) in enumerate(zip(self.names, self.sources, self.pairs, strict=True)):
            whole = _Pool(number, f"pairs of {name}", pairs)
            if not self.split[number]:
                pools += [whole] if self.words is None else [whole, whole]
                continue
            with_word = lettered[source.gallery][pairs[:, 1]]
            pools += [
                _Pool(number, f"pairs of {name} without a word", pairs[~with_word]),
                _Pool(number, f"pairs of {name} with a word", pairs[with_word]),
            ]
        return pools

    def _counts_of_words(self, lettered: Mapping[str, Tensor]) -> list[int | None]:
        """Return for each source how many of its pairs carry a word; None where that is unknown or does not matter."""
        return [
            int(lettered[source.gallery][pairs[:, 1]].sum())
            if self.words is not None and source.gallery in lettered
            else None
            for source, pairs in zip(self.sources, self.pairs, strict=True)
        ]

    def which(self, first: int, size: int) -> Tensor:
        """Return the index of each image's source in `names`, (size,)."""
        blocks = torch.arange(first, first + size) // self.block
        return torch.bucketize((blocks.double() * GOLDEN_RATIO) % 1, self.edges, right=True)

    def draw(self, seed: int, first: int, size: int) -> DrawnPairs:
        """Draw images `first` to `first + size`; each pair of a pool comes once per epoch, in a new order each."""
        chosen, before = self._pool_of(first, size), self._counts_before(first).tolist() if self.own_counts else []
        rows, caption_styles = torch.zeros(size, 2, dtype=torch.long), [""] * size
        for number, pool in enumerate(self.pools):
            here = (chosen == number).nonzero().squeeze(1)
            if len(here):
                if self.own_counts:
                    pair_numbers = shuffled(seed, pool.purpose, before[number], len(here), len(pool.pairs))
                else:
                    pair_numbers = shuffled(seed, pool.purpose, first, size, len(pool.pairs))[here]
                rows[here] = pool.pairs[pair_numbers]
                source = self.sources[pool.source]
                for i, caption_style in zip(
                    here.tolist(), _caption_styles(source, seed, first, size)[here].tolist(), strict=True
                ):
                    caption_styles[i] = list(source.captions)[caption_style]
        galleries = [self.sources[self.pools[number].source].gallery for number in chosen.tolist()]
        return DrawnPairs(galleries, rows[:, 0], rows[:, 1], caption_styles)

    def _pool_of(self, first: int, size: int) -> Tensor:
        """Return the index of each image's pool, (size,)."""
        which = self.which(first, size)
        if self.words is None:
            return which
        # Of a source that keeps one pool, both numbers would count apart; all its images have the first.
        split = torch.tensor(
            [without is not carrying for without, carrying in zip(self.pools[::2], self.pools[1::2], strict=True)]
        )
        return 2 * which + (self.words.carry(first, size) & split[which]).long()

    def _counts_before(self, first: int) -> Tensor:
        """Return how many images of each pool come before image number `first`, (pools,)."""
        strides, rest = divmod(first, _COUNT_INTERVAL)
        for stride in range(len(self._counts) - 1, strides):
            self._counts.append(self._counts[-1] + self._count_images(stride * _COUNT_INTERVAL, _COUNT_INTERVAL))
        return self._counts[strides] + self._count_images(strides * _COUNT_INTERVAL, rest)

    def _count_images(self, first: int, size: int) -> Tensor:
        return torch.bincount(self._pool_of(first, size), minlength=len(self.pools))

    def word_facts(self) -> list[str]:
        """Return for each source of which it is known how many of its pairs carry a word, in a sentence."""
        facts = []
        for name, found, pairs, is_split in zip(self.names, self.with_word, self.pairs, self.split, strict=True):
            if found is not None:
                effect = "" if is_split else ", so words has no effect on it"
                facts.append(f"{name}: {found:,} of {len(pairs):,} pairs carry a word{effect}")
        return facts


def weighted_sources(weights: Mapping[str, float], sources: Mapping[str, Source]) -> list[str]:
    """Return the sources with a positive weight; ConfigError if one is unknown or negative, or if none is positive."""
    for name, weight in weights.items():
        if name not in sources:
            raise ConfigError(f"sources: {unknown_name('source', name, list(sources))}.")
        if weight < 0:
            raise ConfigError(f"sources: {name} has the weight {weight}; give it a positive weight, or leave it out.")
    names = [name for name, weight in weights.items() if weight > 0]
    if not names:
        raise ConfigError(f"sources: give one of {', '.join(sources)} a positive weight.")
    return names


def pairs_of(name: str, source: Source, galleries: Mapping[str, AnyGallery]) -> Tensor:
    """Return the pairs of a source, (P, 2); ConfigError if its gallery is missing or has no pairs."""
    if source.gallery not in galleries:
        raise ConfigError(f"source {name}: {unknown_name('gallery', source.gallery, list(galleries))}.")
    pairs = galleries[source.gallery].pairs(source.target)
    if not len(pairs):
        raise ConfigError(
            f"source {name}: the gallery {source.gallery} has no two pictures of one person; give it more "
            "pictures, or set the source's target to self."
        )
    return pairs


def _caption_styles(source: Source, seed: int, first: int, size: int) -> Tensor:
    return choices(seed, "manner", first, size, list(source.captions.values()))


def in_order(positions: Sequence[Tensor], pieces: Sequence[Tensor]) -> Tensor:
    """Concatenate `pieces`, (n, ...) each, with their rows at the indices `positions`, (n,) each."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(list(pieces))[torch.cat(list(positions)).argsort()]
