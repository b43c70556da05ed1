"""Paint hats and crowns on the head."""

import torch
from torch import Tensor

from imagine.world.camera import Light, View
from imagine.world.contexts import Contexts
from imagine.world.head import surface
from imagine.world.paint import blend, colour, coverage, ellipse, per_pixel, shade
from imagine.world.people import People
from imagine.world.vocabulary import COLOUR_RGB, HAIR_STYLES


def paint_headwear(canvas: Tensor, people: People, contexts: Contexts, view: View, light: Light) -> Tensor:
    """Paint hats; return their coverage (B, H, W)."""
    full = torch.zeros_like(view.x)
    for kind, painter in ((1, _cap), (2, _beanie), (3, _sun_hat), (4, _crown)):
        rows = (contexts.headwear == kind).nonzero().squeeze(1)
        if len(rows):
            part = canvas[rows]
            rgb = canvas.new_tensor(COLOUR_RGB)[contexts.headwear_colour[rows]]
            full[rows] = painter(part, people[rows], _rows(view, rows), _light_rows(light, rows), colour(rgb))
            canvas[rows] = part
    return full


def _rows(view: View, rows: Tensor) -> View:
    return View(*(getattr(view, name)[rows] for name in View.__dataclass_fields__))


def _light_rows(light: Light, rows: Tensor) -> Light:
    return Light(*(getattr(light, name)[rows] for name in Light.__dataclass_fields__))


def _throw_shade(canvas: Tensor, people: People, view: View, below: float) -> None:
    """Darken the brow under a brim, from `below` (head coordinates) a little way down."""
    head = surface(people, view, 0.99)
    depth = coverage((head.y - below).abs() - 0.06, 0.24) * (head.y > below - 0.1) * head.inside * (head.z > 0)
    shade(canvas, 1 - 0.20 * depth)


def _cap(canvas: Tensor, people: People, view: View, light: Light, rgb: Tensor) -> Tensor:
    _throw_shade(canvas, people, view, -0.36)
    dome = surface(people, view, 1.17)
    mask = dome.inside * coverage(dome.y + 0.46 - 0.1 * dome.x**2, 2 * view.pixel)
    seam = coverage(dome.x.abs() - 0.018, 1.6 * view.pixel) + coverage(
        (dome.x.abs() - 0.55 - 0.2 * dome.y).abs() - 0.012, 1.6 * view.pixel
    )
    bright = light.brightness(*dome.normal) * (1 - 0.16 * seam.clamp(max=1))
    blend(canvas, rgb * bright.unsqueeze(1), mask)
    cx, cy = view.place(0.0, -0.46, 1.32)
    x, y = view.head_x - cx, view.head_y - cy - 0.10 * (view.head_x - cx) ** 2
    brim = coverage(ellipse(x, y, 0.74 * view.width / 0.78, 0.15), 2 * view.pixel)
    blend(canvas, rgb * (0.80 - 0.9 * y.clamp(-0.15, 0.15)).unsqueeze(1), brim)
    return torch.maximum(mask, brim)


def _beanie(canvas: Tensor, people: People, view: View, light: Light, rgb: Tensor) -> Tensor:
    dome = surface(people, view, 1.18)
    mask = dome.inside * coverage(dome.y + 0.38, 2 * view.pixel)
    ribs = 0.08 * torch.sin(34 * dome.x)
    cuff = coverage((dome.y + 0.49).abs() - 0.12, 2 * view.pixel)
    bright = light.brightness(*dome.normal) * (1 + ribs) * (1 - 0.20 * cuff)
    blend(canvas, rgb * bright.unsqueeze(1), mask)
    cx, cy = view.place(0.0, -1.20, 0.0)
    x, y = view.head_x - cx, view.head_y - cy
    ball = coverage(torch.hypot(x, y) - 0.2 - 0.015 * torch.sin(9 * torch.atan2(y, x)), 2 * view.pixel)
    blend(canvas, rgb * 0.45 + (0.55 - 0.9 * (y + x).clamp(-0.2, 0.2)).unsqueeze(1), ball)
    return torch.maximum(mask, ball)


def _sun_hat(canvas: Tensor, people: People, view: View, light: Light, rgb: Tensor) -> Tensor:
    _throw_shade(canvas, people, view, -0.40)
    straw = canvas.new_tensor((0.94, 0.82, 0.56)).view(1, 3, 1, 1)
    cx, cy = view.place(0.0, -0.60, 0.15)
    x, y = view.head_x - cx, view.head_y - cy - 0.05 * (view.head_x - cx) ** 2
    brim = coverage(ellipse(x, y, 1.36, 0.21), 2 * view.pixel)
    dome = surface(people, view, 1.19)
    crown = dome.inside * coverage(dome.y + 0.60 - 0.06 * dome.x**2, 2 * view.pixel)
    weave = 1 + 0.05 * torch.sin(40 * dome.y) * torch.sin(30 * dome.x)
    blend(canvas, straw * (0.86 - 0.9 * y.clamp(-0.2, 0.2)).unsqueeze(1), brim)
    blend(canvas, straw * (light.brightness(*dome.normal) * weave).unsqueeze(1), crown)
    band = crown * coverage((dome.y + 0.69 - 0.06 * dome.x**2).abs() - 0.085, 2 * view.pixel)
    blend(canvas, rgb * light.brightness(*dome.normal).unsqueeze(1), band)
    return torch.maximum(brim, crown)


def _crown(canvas: Tensor, people: People, view: View, light: Light, rgb: Tensor) -> Tensor:
    gold = canvas.new_tensor((0.99, 0.80, 0.26)).view(1, 3, 1, 1)
    large = per_pixel(
        (people.hair_style == HAIR_STYLES.index("afro")) | (people.hair_style == HAIR_STYLES.index("curly"))
    )
    half = torch.where(large, 0.80, 0.70) * view.width / 0.78
    cx, cy = view.place(0.0, torch.where(large, -0.84, -0.72), 0.35)
    x, y = (view.head_x - cx) / half, view.head_y - cy
    # The band curves down in front, as a ring around the head does when it is seen from a little above.
    curve = 0.10 * (1 - x * x)
    spikes = ((x * 2.0) - (x * 2.0).round()).abs() * 0.95
    mask = coverage(
        torch.maximum(torch.maximum((x.abs() - 1.0) * half, y - 0.16 - curve), -0.46 + spikes - y), 2 * view.pixel
    )
    bright = light.brightness(x, 0 * x, torch.sqrt((1 - x * x).clamp(min=0.1)))
    blend(canvas, gold * bright.unsqueeze(1), mask)
    edge = mask * coverage((y - 0.13 - curve).abs() - 0.035, 1.6 * view.pixel)
    shade(canvas, 1 - 0.25 * edge)
    stone = torch.minimum(torch.hypot(x * half, y - 0.02), torch.hypot(x.abs() * half - 0.36, y + 0.02)) - 0.075
    blend(canvas, rgb * 0.9 + 0.08, mask * coverage(stone, 2 * view.pixel))
    return mask
