"""Apply a rendering style to finished pictures: photo, pencil, watercolour, pixel art or comic.

Every style keeps the face readable and the colours of skin and hair apart (pencil: their brightness). Lines come from
a difference of blurs, which gives one line per edge; the width of lines grows with the picture.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from imagine.world.vocabulary import STYLES

_LUMA = (0.299, 0.587, 0.114)
_BLOCKS = 64  # blocks of pixel art in the height of a portrait
_DRAWN_FOR = 128  # pixels of height at which the radii below are given


def apply_styles(images: Tensor, styles: Tensor, side: "int | None" = None) -> Tensor:
    """Return pictures (N, 3, H, W), each in its style (N,).

    `side` is the height in pixels of a portrait at this scale (default H): it sets the width of lines and blocks.
    """
    out = images.clone()
    for number, name in enumerate(STYLES):
        rows = (styles == number).nonzero().squeeze(1)
        if len(rows) and name != "photo":
            out[rows] = _STYLES[name](images[rows], side or images.shape[-2])
    return out.clamp_(0, 1)


def camera_noise(images: Tensor, seed: int) -> Tensor:
    """Add the errors of a cheap camera to (N, 3, H, W): colour cast, exposure, blur in half of the pictures, grain."""
    random = torch.Generator().manual_seed(seed)
    count = len(images)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(images.device)

    cast = (1 + 0.05 * normal(count, 3, 1, 1)) * (1 + 0.08 * normal(count, 1, 1, 1))
    soft = _blur(images, 1)
    share = (normal(count, 1, 1, 1) > 0).float() * 0.8
    grain = 0.03 * normal(count, 1, *images.shape[-2:])
    return ((images * (1 - share) + soft * share) * cast + grain).clamp_(0, 1)


def _blur(images: Tensor, radius: int) -> Tensor:
    kernel = 2 * radius + 1
    return F.avg_pool2d(F.pad(images, [radius] * 4, mode="replicate"), kernel, 1)


def _smooth(images: Tensor, radius: int) -> Tensor:
    return _blur(_blur(images, radius), radius)


def _radius(side: int, pixels: float) -> int:
    """Return a radius in pixels of these pictures, given in pixels of portraits of 128."""
    return max(1, round(pixels * side / _DRAWN_FOR))


def _luma(images: Tensor) -> Tensor:
    return (images * images.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _lines(grey: Tensor, radius: int, strength: float) -> Tensor:
    """Return ink (N, 1, H, W) from 0 to 1 where a picture is darker than its surroundings."""
    near = grey if radius < 2 else _blur(grey, radius // 2)
    return ((_smooth(grey, radius) - near - 0.012) * strength).clamp(0, 1)


def _axes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return x and y (H, W), in units of the picture's height."""
    height, width = images.shape[-2:]
    down = (torch.arange(height, device=images.device) + 0.5) / height
    across = (torch.arange(width, device=images.device) + 0.5) / height
    y, x = torch.meshgrid(down, across, indexing="ij")
    return x, y


def _pencil(images: Tensor, side: int) -> Tensor:
    grey = _luma(images)
    tone = _blur(grey, _radius(side, 1))
    x, y = _axes(images)
    hatch = torch.sin((x + y) * 190) * (0.42 - tone).clamp(0, 0.3) * 0.16
    drawn = (0.58 + 0.42 * tone + hatch).clamp(max=1) * (1 - 0.9 * _lines(grey, _radius(side, 1), 9.0))
    return drawn.expand(-1, 3, -1, -1) * images.new_tensor((1.0, 0.985, 0.95)).view(1, 3, 1, 1)


def _watercolour(images: Tensor, side: int) -> Tensor:
    wash = 0.65 * images + 0.35 * _smooth(images, _radius(side, 1))
    wash = _luma(wash) + 1.2 * (wash - _luma(wash))
    x, y = _axes(images)
    pigment = 0.90 + 0.06 * torch.sin(9 * x + 4 * torch.sin(5 * y)) * torch.sin(8 * y + 3 * torch.sin(6 * x))
    edge = _lines(_luma(images), _radius(side, 1), 3.0)
    painted = 1 - (1 - wash) * (pigment + 0.35 * edge)
    height, width = images.shape[-2:]
    border = torch.minimum(torch.minimum(x, width / height - x), torch.minimum(y, 1 - y))
    ragged = 0.020 + 0.005 * torch.sin(23 * x + 17 * y) + 0.004 * torch.sin(41 * (x - y))
    paper = ((ragged - border) / 0.03 + 0.5).clamp(0, 1)
    return painted + (0.985 - painted) * paper


def _pixel_art(images: Tensor, side: int) -> Tensor:
    height, width = images.shape[-2:]
    small = F.interpolate(images, size=(round(_BLOCKS * height / side), round(_BLOCKS * width / side)), mode="area")
    grey = _luma(small)
    vivid = small + 0.15 * (small - grey)
    levels = (grey * 9).round() / 9
    return F.interpolate(vivid + levels - grey, size=(height, width), mode="nearest")


def _comic(images: Tensor, side: int) -> Tensor:
    grey = _luma(images)
    level = grey * 5 + 0.25
    # Steep ramps instead of steps, so that a small network can draw the edges. The hue stays: only luma has steps.
    bands = (level.floor() + ((level - level.floor() - 0.5) * 4 + 0.5).clamp(0, 1)) / 5
    flat = (images * (bands.clamp(max=0.94) / grey.clamp(min=0.04)).clamp(0.7, 1.5)).clamp(0, 1)
    vivid = _luma(flat) + 1.25 * (flat - _luma(flat))
    return vivid * (1 - 0.92 * _lines(grey, _radius(side, 1), 9.0))


_STYLES = {"pencil": _pencil, "watercolour": _watercolour, "pixel art": _pixel_art, "comic": _comic}
