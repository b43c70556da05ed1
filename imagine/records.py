"""The frozen records that cross module borders; nothing here computes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from PIL import Image


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


@dataclass(frozen=True)
class Conditioning:
    """What one denoiser call attends to, one entry per branch beside the denoiser's own text branch.

    `branches` maps a branch name ("t5", "byt5", "vision") to its tokens. `scales` maps a branch name to a factor on
    that branch's output: a number, or one number per batch item (batch,). A branch that is attached but absent here
    contributes nothing; so does one whose scale is 0. `keys_values`, made once per picture by `adapter.project`, maps
    (attention name, branch) to that branch's ready keys and values, so that denoising steps do not compute them again.
    """

    branches: Mapping[str, Tokens] = field(default_factory=dict)
    scales: Mapping[str, "float | torch.Tensor"] = field(default_factory=dict)
    keys_values: Mapping[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] | None = None
