"""Batches with several people for the adapter's training: which images show how many, and what they consist of.

Pictures of several people have wider latents, so whole blocks of consecutive images show equally many people.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from imagine.errors import ConfigError
from train.cache.groups import GroupPictures
from train.cache.latents import box_mask
from train.cache.sentences import SentenceStore
from train.data.order import choices, shuffled, spread

People = Literal["router", "concatenate"]
_STYLES = {"dense": 0.3, "rewritten": 0.7}
_DENSE_UP_TO = 3  # people whose dense caption still fits into T5's tokens


def check_group_settings(groups: Mapping[str, float], people: People) -> None:
    """Raise ValueError for settings of several people that cannot work, or that have no effect."""
    if sum(groups.values()) > 1:
        raise ValueError("the shares in groups sum to more than 1: lower them")
    if people == "concatenate" and not groups:
        raise ValueError('people: "concatenate" has no effect without groups: name some, or leave it out')


@dataclass(frozen=True)
class GroupCache:
    """The cached data of one gallery of several people, indexed by row number."""

    pictures: GroupPictures
    sentences: SentenceStore

    def faces(self, boxes: Tensor, cells: tuple[int, int]) -> Tensor:
        """Return the face masks of face boxes (B, P, 4) on the latent grid, (B, 1, *cells), 1 or 0."""
        return box_mask(boxes, self.pictures.gallery.shape, cells)


class GroupBlocks:
    """Decides which images show several people: a share of the blocks of `block` consecutive images per gallery."""

    def __init__(self, shares: Mapping[str, float], block: int) -> None:
        self.names, self.shares, self.block = list(shares), list(shares.values()), block

    def gallery_of(self, first: int, size: int) -> str | None:
        """Return the gallery of images `first` to `first + size`; None for pictures of one person.

        Raises ConfigError if the images are of different blocks.
        """
        if not self.names:
            return None
        blocks = torch.tensor([first, first + size - 1]) // self.block
        if blocks[0] != blocks[1]:
            raise ConfigError(
                f"group_block is {self.block}, but a batch of {size} images starts at image {first:,} and crosses a "
                "block: set group_block to the stage's batch size."
            )
        number = int(spread(blocks[:1], self.shares))
        return None if number == len(self.names) else self.names[number]


def draw_group_rows(seed: int, name: str, first: int, size: int, cache: GroupCache) -> tuple[Tensor, list[str]]:
    """Return the rows (size,) of a batch from a gallery of several people, and the style of each caption."""
    gallery = cache.pictures.gallery
    rows = shuffled(seed, f"group {name}", first, size, len(gallery))
    weights = list(_STYLES.values()) if gallery.people <= _DENSE_UP_TO else [0.0, 1.0]
    drawn = choices(seed, "group manner", first, size, weights)
    return rows, [list(_STYLES)[number] for number in drawn.tolist()]


def group_references(
    cache: GroupCache, rows: Tensor, crops: Callable[[Tensor, Tensor], Tensor], shifts: Tensor
) -> Tensor:
    """Return the face crops (B, P, 3, S, S) of these rows' references.

    crops: `GalleryCache.crops` of the portraits. shifts: (B, P, 2), how far each crop is shifted, 0 to 1.
    """
    wanted = cache.pictures.gallery.references(rows)
    return crops(wanted.flatten(), shifts.flatten(0, 1)).unflatten(0, wanted.shape)
