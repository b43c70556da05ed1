"""Paint an arm round a neighbour's shoulders: the sleeve behind the neighbour, and the hand on the far shoulder."""

import torch
from torch import Tensor

from imagine.world.camera import Light
from imagine.world.contexts import Contexts
from imagine.world.groups import Groups
from imagine.world.head import skin_colour
from imagine.world.paint import blend, colour, coverage, ellipse, lit_skin, per_pixel, segment
from imagine.world.people import People
from imagine.world.vocabulary import COLOUR_RGB


def paint_sleeves(
    canvas: Tensor, people: People, contexts: Contexts, groups: Groups, who: Tensor, light: Light
) -> Tensor:
    """Paint the sleeve of person `who` (B,) of each picture, in place; return its coverage (B, H, W)."""
    rows = torch.arange(len(who))
    near = _shoulder(groups, who, 0.95, 1.72)
    far = _shoulder(groups, _next(groups, who), 0.95, 1.50)
    x, y = _axes(canvas)
    thickness = per_pixel(0.30 * groups.scale[rows, who])
    away, along = segment(x, y, *(per_pixel(value) for value in (*near.unbind(1), *far.unbind(1))))
    has = per_pixel(groups.arm[rows, who].float())
    mask = coverage(away - thickness, 2 / canvas.shape[-2]) * has
    cloth = colour(canvas.new_tensor(COLOUR_RGB)[contexts.clothes_colour])
    round_light = light.brightness(0 * away, (y - per_pixel(near[:, 1])) * 4, torch.full_like(away, 0.7))
    blend(canvas, cloth * (0.92 * round_light + 0 * along).unsqueeze(1), mask)
    return mask


def paint_hands(canvas: Tensor, people: People, groups: Groups) -> list[Tensor]:
    """Paint each person's hand on the far shoulder of the neighbour, in place; return coverage (B, H, W) per person."""
    count = groups.scale.shape[1]
    masks = []
    x, y = _axes(canvas)
    for slot in range(count):
        who = torch.full((len(groups),), slot)
        point = _shoulder(groups, _next(groups, who), 0.98, 1.52)
        size = per_pixel(groups.scale[:, slot])
        dx, dy = (x - per_pixel(point[:, 0])) / size, (y - per_pixel(point[:, 1])) / size
        hand = coverage(ellipse(dx, dy, 0.20, 0.27), 2 / (canvas.shape[-2] * size)) * per_pixel(
            groups.arm[:, slot].float()
        )
        lines = 0.12 * coverage((dx * 7).sin().abs() - 0.2, 0.3) * (dy > -0.02)
        blend(canvas, lit_skin(colour(skin_colour(people[slot::count])), 1.0 - 0.35 * dy - lines), hand)
        masks.append(hand)
    return masks


def _next(groups: Groups, who: Tensor) -> Tensor:
    return (who + 1).clamp(max=groups.scale.shape[1] - 1)


def _shoulder(groups: Groups, who: Tensor, x: float, y: float) -> Tensor:
    """Return the point (x, y) of the body of person `who`, in shares of the picture's height, (B, 2)."""
    rows = torch.arange(len(who))
    centre, scale, lean = groups.centre[rows, who], groups.scale[rows, who], groups.lean[rows, who]
    cos, sin = lean.cos(), lean.sin()
    return centre + scale.unsqueeze(1) * torch.stack((cos * x - sin * y, sin * x + cos * y), 1)


def _axes(canvas: Tensor) -> tuple[Tensor, Tensor]:
    height, width = canvas.shape[-2:]
    y = (torch.arange(height, device=canvas.device) + 0.5) / height
    x = (torch.arange(width, device=canvas.device) + 0.5) / height
    return x.view(1, 1, -1), y.view(1, -1, 1)
