"""The frozen records that modules hand to each other, and how batches of tokens are taken, joined and repeated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

VISION = "vision"  # the name of the identity branch in adapters and conditionings


@dataclass(frozen=True)
class FaceBox:
    """One face in a picture: a box in pixels (brow to chin, ear to ear) and how sure the finder is (0 to 1)."""

    left: float
    top: float
    width: float
    height: float
    score: float

    @property
    def centre(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.top + self.height / 2


@dataclass(frozen=True)
class FaceCrop:
    """The square cut around one face, its background masked, and what the picture held."""

    image: Image.Image  # RGB, square, at the vision encoder's size
    box: FaceBox | None  # None: no face was found and the whole picture was used
    found: tuple[FaceBox, ...]  # every face, largest first
    index: int  # which of `found` was used; -1 for the whole picture
    sharpness: float  # variance of the Laplacian of the crop, 0 to about 1
    quality: str  # "good", or one sentence that says what is poor about the photo


@dataclass(frozen=True)
class Tokens:
    """One branch's tokens (batch, length, width) and its key-padding mask (batch, length), True where a token counts.

    No mask means that every token counts, and costs nothing.
    """

    values: torch.Tensor
    mask: torch.Tensor | None = None


Scale = float | torch.Tensor  # one factor, or one per batch item (batch,)


@dataclass(frozen=True)
class Conditioning:
    """What one denoiser call attends to, one entry per branch beside the denoiser's own text branch.

    `branches` maps a branch name ("t5", "byt5", "vision") to its tokens. `scales` maps a branch name to a factor on
    that branch's output: a number, one number per batch item (batch,), or a mapping from attention layers to either,
    where a layer that is not named gets 0. A branch that is attached but absent here contributes nothing; so does one
    whose scale is 0.

    `regions` maps a branch to where in the picture its references act: weights (1 or batch, references, height, width),
    0 to 1. The branch's tokens then are those of so many references, equally many of each, one after the other;
    each is attended to alone, and its output multiplied by its weights.

    `cache`, which `adapter.prepare` provides, keeps what does not change between the steps of one picture, keys and
    values above all, from the first step that needs it on. None: nothing is kept, as in training.
    """

    branches: Mapping[str, Tokens] = field(default_factory=dict)
    scales: Mapping[str, "Scale | Mapping[str, Scale]"] = field(default_factory=dict)
    regions: Mapping[str, torch.Tensor] = field(default_factory=dict)
    cache: "dict[tuple[str, str], Any] | None" = None


def take(tokens: Tokens, rows: torch.Tensor | Sequence[int]) -> Tokens:
    """Batch items by number."""
    rows = rows if isinstance(rows, torch.Tensor) else list(rows)
    return Tokens(tokens.values[rows], None if tokens.mask is None else tokens.mask[rows])


def join(rows: Sequence[Tokens]) -> Tokens:
    """Put batches of tokens one under the other, the shorter ones padded; no mask if every token counts."""
    longest = max(each.values.shape[1] for each in rows)
    if all(each.mask is None and each.values.shape[1] == longest for each in rows):
        return Tokens(torch.cat([each.values for each in rows]))
    padded = [each.values.new_zeros(each.values.shape[0], longest, each.values.shape[2]) for each in rows]
    masks = [torch.zeros(whole.shape[:2], dtype=torch.bool, device=whole.device) for whole in padded]
    for each, whole, mask in zip(rows, padded, masks, strict=True):
        length = each.values.shape[1]
        whole[:, :length] = each.values
        mask[:, :length] = True if each.mask is None else each.mask
    return Tokens(torch.cat(padded), torch.cat(masks))


def repeat(tokens: Tokens, copies: int) -> Tokens:
    """Repeat every batch item `copies` times, copies side by side."""
    if copies == 1:
        return tokens
    mask = None if tokens.mask is None else tokens.mask.repeat_interleave(copies, 0)
    return Tokens(tokens.values.repeat_interleave(copies, 0), mask)
