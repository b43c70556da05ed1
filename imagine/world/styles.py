"""Apply a rendering style to finished pictures: photo, pencil, watercolour, pixel art or comic."""

import torch
import torch.nn.functional as F
from torch import Tensor

from imagine.world.vocabulary import STYLES

_LUMA = (0.299, 0.587, 0.114)


def apply_styles(images: Tensor, styles: Tensor) -> Tensor:
    """Return pictures (N, 3, S, S), each in its style (N,)."""
    out = images.clone()
    for number, name in enumerate(STYLES):
        rows = (styles == number).nonzero().squeeze(1)
        if len(rows) and name != "photo":
            out[rows] = _STYLES[name](images[rows])
    return out.clamp_(0, 1)


def camera_noise(images: Tensor, seed: int) -> Tensor:
    """Add the errors of a cheap camera to (N, 3, S, S): colour cast, exposure, blur in half of the pictures, grain."""
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


def _luma(images: Tensor) -> Tensor:
    return (images * images.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _edges(images: Tensor) -> Tensor:
    """Return the gradient magnitude at each pixel, (N, 1, S, S), from 0 to about 1."""
    padded = F.pad(_blur(images, 1), [1] * 4, mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return torch.sqrt(across**2 + down**2 + 1e-8).amax(1, keepdim=True)


def _pencil(images: Tensor) -> Tensor:
    grey = _luma(images)
    tone = 0.50 + 0.48 * grey - (2.2 * _edges(images)).clamp(max=0.55)
    return tone.expand(-1, 3, -1, -1) * images.new_tensor((1.0, 0.985, 0.95)).view(1, 3, 1, 1)


def _watercolour(images: Tensor) -> Tensor:
    wash = _blur(images, 1)
    pale = 0.34 + 0.66 * wash + 0.30 * (wash - _luma(wash))
    size = images.shape[-1]
    axis = (torch.arange(size, device=images.device) + 0.5) / size * 2 - 1
    rim = (torch.maximum(axis.abs().view(1, -1), axis.abs().view(-1, 1)) - 0.84).clamp(min=0) * 7
    return pale + (0.99 - pale) * rim.clamp(max=1)


def _pixel_art(images: Tensor) -> Tensor:
    side = images.shape[-1]
    small = F.interpolate(images, size=(side // 4, side // 4), mode="area")
    return F.interpolate((small * 7).round() / 7, size=(side, side), mode="nearest")


def _comic(images: Tensor) -> Tensor:
    vivid = _luma(images) + 1.5 * (images - _luma(images))
    steps = 4.0
    level = vivid * steps
    # Steep ramps instead of steps, so that a small network can draw the edges.
    bands = (level.floor() + ((level - level.floor() - 0.5) * 4 + 0.5).clamp(0, 1)) / steps
    ink = (1 - (_edges(images) - 0.16).clamp(min=0) * 5).clamp(0.08, 1)
    return bands * ink


_STYLES = {"pencil": _pencil, "watercolour": _watercolour, "pixel art": _pixel_art, "comic": _comic}
