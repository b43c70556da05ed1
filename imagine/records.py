"""Frozen records that modules exchange, and functions that select, join and repeat rows of token batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

VISION = "vision"  # name of the identity branch in adapters and conditionings

# Called while something long advances: with a stage, how many of its steps are done, and how many it has (0: unknown).
Progress = Callable[[str, int, int], None]


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class FaceBox:
    """One face in a picture: a box in pixels (brow to chin, ear to ear) and the finder's confidence (0 to 1).

    `landmarks` are five points in pixels, if the finder gives them: left eye, right eye, nose tip, left and right
    corner of the mouth, where left and right are the picture's. `finder` names the finder, for reports.
    """

    left: float
    top: float
    width: float
    height: float
    score: float
    landmarks: tuple[tuple[float, float], ...] = ()
    finder: str = ""

    @property
    def centre(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.top + self.height / 2

    @property
    def area(self) -> float:
        """Width times height, in square pixels."""
        return self.width * self.height

    @property
    def roll(self) -> float:
        """Angle of the line through the eyes, in radians, positive clockwise; 0 without landmarks."""
        if not self.landmarks:
            return 0.0
        (left_x, left_y), (right_x, right_y) = self.landmarks[:2]
        return math.atan2(right_y - left_y, right_x - left_x)

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, ready for JSON; without landmarks and finder where there are none."""
        plain: dict[str, Any] = {
            name: round(getattr(self, name), 3) for name in ("left", "top", "width", "height", "score")
        }
        if self.landmarks:
            plain["landmarks"] = [[round(x, 1), round(y, 1)] for x, y in self.landmarks]
        return {**plain, "finder": self.finder} if self.finder else plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "FaceBox":
        """Return the face that `as_dict` wrote."""
        landmarks = tuple((float(x), float(y)) for x, y in plain.get("landmarks", ()))
        return cls(**{**plain, "landmarks": landmarks})


@dataclass(frozen=True)
class FaceCrop:
    """The square face crop with a masked background, and all faces that were found in the picture."""

    image: Image.Image  # RGB, square, at the vision encoder's input size
    box: FaceBox | None  # None: no face was found, and the whole picture was used
    found: tuple[FaceBox, ...]  # all faces, largest first
    index: int  # index into `found` of the face that was used; -1 for the whole picture
    sharpness: float  # variance of the Laplacian of the crop, 0 to about 1
    quality: str  # "good", or one sentence that names the photo's defect
    turned: int = 0  # degrees, counter-clockwise, by which the picture was turned first; boxes refer to the turned one


@dataclass(frozen=True)
class Tokens:
    """One branch's tokens (batch, length, width) and key-padding mask (batch, length), True where a token is attended.

    Without a mask every token is attended, and attention needs no masking.
    """

    values: torch.Tensor
    mask: torch.Tensor | None = None


Scale = float | torch.Tensor  # one factor, or one per batch item: (batch,)


@dataclass(frozen=True)
class Watched:
    """Query (batch, heads, positions, width) and key (batch, heads, tokens, width) of a layer's attention.

    `mask` is added to the scores, (batch, heads, 1, tokens); None adds nothing. `value` (batch, heads, tokens, width)
    is that of a parallel branch, gate included.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None = None
    value: torch.Tensor | None = None

    def attention(self) -> torch.Tensor:
        """Return the softmax over the tokens, the mean of all heads, (batch, positions, tokens)."""
        scores = self.query @ self.key.transpose(-1, -2) / math.sqrt(self.query.shape[-1])
        scores = scores if self.mask is None else scores + self.mask
        return scores.softmax(-1).mean(1)


def attention_to(branch: str) -> str:
    """Return the key in `Conditioning.watch` under which layers show their attention to a parallel branch."""
    return f"attention to {branch}"


@dataclass(frozen=True)
class Conditioning:
    """What one denoiser call attends to: one entry per branch, in addition to the denoiser's own text branch.

    `branches` maps a branch name ("t5", "byt5", "vision") to its tokens. `scales` maps a branch name to a factor on
    that branch's output: a number, one number per batch item (batch,), or a mapping from attention layers to either,
    where a layer that is not named gets 0. An attached branch that is missing here contributes nothing; neither does a
    branch whose scale is 0.

    `regions` maps a branch name to weights (1 or batch, references, height, width) between 0 and 1, which limit each
    reference to a part of the picture. The branch's tokens are then the concatenation of the references' tokens, the
    same number for each. Each reference is attended to separately, and its output is multiplied by its weights.

    `groups` maps a branch name to (batch, people), True where a batch item has this person. The branch's tokens are
    then one group of equal length per person, in order. An item with fewer people has masked tokens and False in their
    places. Where a picture has several people, each of them gets a softmax of its own, and the outputs are mixed per
    position by the branch's router, by `regions` (then the caller's layout), or by both. A branch with neither attends
    to all people under one softmax.

    `record`, if given, collects the routers' decisions, for a loss or a measurement: each call of a layer with a router
    appends its log-probabilities (batch, people + 1, positions), nobody's last, under "router <layer name>". They are
    -inf where an item has no such person, and for nobody where the item has one person. Calls for one person append
    nothing.

    `watch`, if given, says what layers show for a loss: under "text" each cross-attention layer stores its `Watched`
    under its name, under the name of a parallel branch the mean square of that branch's output (batch, positions), and
    under `attention_to(branch)` the `Watched` of its attention to that branch. Under "states" each cross-attention
    layer stores its input (batch, positions, width). What is shown is computed anyway.

    `cache`, created by `adapter.prepare`, holds values that do not change between the steps of one picture, mainly keys
    and values. It is filled by the first step that needs an entry. None disables caching, as in training.
    """

    branches: Mapping[str, Tokens] = field(default_factory=dict)
    scales: Mapping[str, "Scale | Mapping[str, Scale]"] = field(default_factory=dict)
    regions: Mapping[str, torch.Tensor] = field(default_factory=dict)
    groups: Mapping[str, torch.Tensor] = field(default_factory=dict)
    record: dict[str, list[torch.Tensor]] | None = None
    watch: Mapping[str, dict[str, Any]] | None = None
    cache: "dict[tuple[str, str], Any] | None" = None


def take(tokens: Tokens, rows: torch.Tensor | slice | Sequence[int]) -> Tokens:
    """Return the batch items at the given indices, in the given order."""
    rows = rows if isinstance(rows, (torch.Tensor, slice)) else list(rows)
    return Tokens(tokens.values[rows], None if tokens.mask is None else tokens.mask[rows])


def join(rows: Sequence[Tokens]) -> Tokens:
    """Concatenate batches of tokens, padding the shorter ones. The result has no mask if every token is attended."""
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
    """Repeat every batch item `copies` times; the copies of an item are adjacent."""
    if copies == 1:
        return tokens
    mask = None if tokens.mask is None else tokens.mask.repeat_interleave(copies, 0)
    return Tokens(tokens.values.repeat_interleave(copies, 0), mask)
