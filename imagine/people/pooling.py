"""Combine the features of several photos of one person, and weigh each photo by its quality.

Concatenating the tokens (*Imagine yourself*, arXiv 2409.13346, section 3.6) lets attention use all of them, and costs
as many tokens as there are photos. The mean has the tokens of one photo whatever their number, and a poor photo counts
for little in it.
"""

from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from imagine.errors import ConfigError
from imagine.people.faces import BLURRED, CROP_SIDE
from imagine.records import FaceCrop

Pooling = Literal["concatenate", "mean"]

LOWEST_WEIGHT = 0.05  # of the poorest photo, so that it still counts
NO_FACE = 0.25  # in place of a face's score, if no face was found


def photo_weight(crop: FaceCrop, size: int) -> float:
    """Return how much a photo counts, from 0.05 to 1, for a vision encoder with crops of `size` pixels.

    It is the product of the finder's score, the size of the face up to the encoder's own size, and its sharpness up to
    the limit below which a face counts as blurred.
    """
    score, face_size = NO_FACE, 1.0
    if crop.box is not None:
        score = crop.box.score
        face_size = min(1.0, CROP_SIDE * max(crop.box.width, crop.box.height) / size)
    weight = min(1.0, score) * face_size * min(1.0, crop.sharpness / BLURRED)
    return round(max(LOWEST_WEIGHT, weight), 4)


def checked_pooling(name: str) -> Pooling:
    """Return `name` as a way of pooling. Raises ConfigError if it is none."""
    if name not in get_args(Pooling):
        raise ConfigError(f"pooling={name!r} is unknown: choose {' or '.join(get_args(Pooling))}.")
    return cast(Pooling, name)


def pool(features: Sequence[Tensor], weights: Sequence[Sequence[float]], tokens: int, pooling: Pooling) -> Tensor:
    """Return the features of one person from those of several personas, each (a multiple of `tokens`, width).

    weights: of each persona's photos; empty if unknown, which counts as 1 for each. A persona whose photos were already
    averaged counts with the sum of their weights.
    """
    if pooling == "concatenate" or (len(features) == 1 and len(features[0]) <= tokens):
        return features[0] if len(features) == 1 else torch.cat(list(features))
    parts: list[Tensor] = []
    shares: list[float] = []
    for each, known in zip(features, weights, strict=True):
        chunks = each.split(tokens)
        parts += chunks
        if len(chunks) == len(known):
            shares += known
        else:
            shares += [(sum(known) or 1.0) / len(chunks)] * len(chunks)
    share = torch.tensor(shares, dtype=parts[0].dtype)
    return torch.einsum("p,ptw->tw", share / share.sum(), torch.stack(parts))
