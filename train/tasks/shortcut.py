"""Shortcut-rerouted training (arXiv 2510.20887): pose and expression reach the denoiser by a side path in training.

An adapter that must reproduce the target also learns to read pose and expression from the reference, because that helps
in every image whose reference resembles its target. Here a side path tells the denoiser the target's true pose and
expression, which the portrait world knows exactly. The adapter then has no need to encode them. The side path is
dropped at inference and is not exported, so that the sentence decides.

The paper's side path is a frozen ControlNet or LoRA. Ours is a branch of its own that reads a few tokens, as the vision
branch does. It is trained in a stage of its own (`train: {shortcut: ...}`, `drop_vision: 1`) and then frozen, or
together with the adapter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagine.adapter.adapter import Adapter, BranchSpec
from imagine.records import Conditioning, Tokens
from imagine.world.vocabulary import EXPRESSIONS
from train.cache.pictures import Gallery
from train.data.denoiser_inputs import GalleryCache
from train.data.order import chance
from train.data.sources import DrawnPairs, in_order

SHORTCUT = "shortcut"  # the part, the module and the branch
_ANGLES = ("yaw", "pitch", "roll", "gaze")
_FEATURES = len(_ANGLES) + len(EXPRESSIONS)
_TOKENS, _WIDTH = 4, 64


@dataclass(frozen=True)
class ShortcutBatch:
    """What the side path is told about the targets of a batch."""

    features: Tensor  # (B, F) angles of head and gaze, and which expression
    strength: Tensor  # (B,) 0 where the side path is off


class Shortcut(nn.Module):
    """The side path: its tokens, and its branch on the denoiser, whose output starts at zero. Building it attaches it.

    denoiser: a U-Net that takes an `Adapter`.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.tokens = nn.Sequential(
            nn.Linear(_FEATURES, 4 * _WIDTH), nn.SiLU(), nn.Linear(4 * _WIDTH, _TOKENS * _WIDTH)
        )
        self.adapter = Adapter(denoiser, [BranchSpec(SHORTCUT, _WIDTH)])
        self.adapter.attach(denoiser)

    def added(self, conditioning: Conditioning, batch: ShortcutBatch | None) -> Conditioning:
        """Return the conditioning with the side path's tokens; unchanged without a batch, as at inference."""
        if batch is None:
            return conditioning
        tokens = Tokens(self.tokens(batch.features).unflatten(1, (_TOKENS, _WIDTH)))
        return replace(
            conditioning,
            branches={**conditioning.branches, SHORTCUT: tokens},
            scales={**conditioning.scales, SHORTCUT: batch.strength},
        )


def shortcut_batch(
    caches: Mapping[str, GalleryCache[Any]], drawn: DrawnPairs, share: float, seed: int, images_seen: int
) -> ShortcutBatch:
    """Return what the side path is told about the drawn targets, for a `share` of the images.

    It is off for records, whose pose is not known.
    """
    by_gallery = drawn.by_gallery()
    found = [_features(caches[name], drawn.targets[here]) for name, here in by_gallery.items()]
    positions = list(by_gallery.values())
    features, known = (in_order(positions, list(each)) for each in zip(*found, strict=True))
    told = chance(seed, "shortcut", images_seen, len(features), share)
    return ShortcutBatch(features, known * told)


def _features(cache: GalleryCache[Any], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features (B, F) of these rows of a gallery, and whether they are known, 1 or 0 (B,)."""
    gallery = cache.pictures.gallery
    if not isinstance(gallery, Gallery):
        return torch.zeros(len(rows), _FEATURES), torch.zeros(len(rows))
    contexts = gallery.contexts(rows)
    angles = torch.stack([getattr(contexts, name).float() for name in _ANGLES], 1)
    expression = F.one_hot(contexts.expression.long(), len(EXPRESSIONS)).float()
    return torch.cat((angles, expression), 1), torch.ones(len(rows))


def shortcut_without_training(share: float | None, trains: tuple[str, ...], starts_from_earlier: bool) -> list[str]:
    """Return a warning if the side path neither trains nor can have been trained."""
    if not share or not trains or SHORTCUT in trains or starts_from_earlier:
        return []
    return ["shortcut: the side path is not trained, so it tells nothing: add shortcut to `train`, or start from a "
            "stage that trains it."]  # fmt: skip
