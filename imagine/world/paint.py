"""Draw soft shapes on batches of pixels: all values are (B, H, W) or broadcast to it, and colours are (B, 3, ...)."""

import torch
from torch import Tensor


def per_pixel(values: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, 1), to broadcast over pixels."""
    return values.view(-1, 1, 1)


def colour(values: Tensor) -> Tensor:
    """Reshape (B, 3) to (B, 3, 1, 1)."""
    return values.view(-1, 3, 1, 1)


def coverage(distance: Tensor, soft: "Tensor | float") -> Tensor:
    """Return 1 where a signed distance is inside (negative), 0 outside, and a ramp of width `soft` between them."""
    return (0.5 - distance / soft).clamp_(0, 1)


def ramp(values: Tensor, low: "Tensor | float", high: "Tensor | float") -> Tensor:
    """Return a smooth step from 0 at `low` to 1 at `high`."""
    share = ((values - low) / (high - low)).clamp(0, 1)
    return share * share * (3 - 2 * share)


def ellipse(x: Tensor, y: Tensor, width: "Tensor | float", height: "Tensor | float") -> Tensor:
    """Return the approximate signed distance to an axis-aligned ellipse at the origin, in the units of x and y."""
    small = torch.minimum(torch.as_tensor(width), torch.as_tensor(height))
    return (torch.sqrt((x / width) ** 2 + (y / height) ** 2 + 1e-9) - 1) * small


def segment(x: Tensor, y: Tensor, ax: Tensor, ay: Tensor, bx: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance to the segment from a to b, and the position of the nearest point on it (0 at a, 1 at b)."""
    dx, dy = bx - ax, by - ay
    along = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + 1e-6)).clamp(0, 1)
    return torch.sqrt((x - ax - along * dx) ** 2 + (y - ay - along * dy) ** 2 + 1e-9), along


def blend(canvas: Tensor, paint: Tensor, alpha: Tensor) -> None:
    """Blend `paint` (B, 3, 1, 1) or (B, 3, H, W) over `canvas` (B, 3, H, W), in place, with `alpha` (B, H, W)."""
    canvas.lerp_(paint.expand_as(canvas), alpha.unsqueeze(-3).expand_as(canvas))


def shade(canvas: Tensor, factor: Tensor) -> None:
    """Multiply `canvas` by `factor` (B, H, W), in place."""
    canvas.mul_(factor.unsqueeze(-3))


def lit_skin(rgb: Tensor, bright: Tensor) -> Tensor:
    """Return skin of the colour `rgb` (B, 3, 1, 1) under `bright` (B, H, W), as (B, 3, H, W).

    Shade on skin is warm: red falls less than green and blue. Grey shade would make skin look dead.
    """
    warmth = rgb.new_tensor((0.86, 1.04, 1.12)).view(1, 3, 1, 1)
    return rgb * (1 + warmth * (bright - 1).unsqueeze(1)).clamp(min=0.05)
