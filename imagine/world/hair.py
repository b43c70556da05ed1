"""Paint hair and headwear: enlarged egg surfaces around the head, cut off at a hairline or a brim."""

import torch
from torch import Tensor

from imagine.world.camera import Light, View
from imagine.world.contexts import Contexts
from imagine.world.head import hair_colour, surface
from imagine.world.paint import blend, colour, coverage, ellipse, per_pixel, shade
from imagine.world.people import People
from imagine.world.vocabulary import COLOUR_RGB, HAIR_STYLES

# hair style -> scale of the cap, height of the hairline, its slant to one side, opacity
_CAPS = {
    "bald": (1.0, -2.0, 0.0, 0.0),
    "buzz cut": (1.02, -0.46, 0.0, 0.72),
    "short": (1.09, -0.48, 0.0, 1.0),
    "fringe": (1.12, -0.33, 0.0, 1.0),
    "side part": (1.13, -0.50, 0.24, 1.0),
    "curly": (1.20, -0.42, 0.0, 1.0),
    "afro": (1.26, -0.46, 0.0, 1.0),
    "long": (1.09, -0.50, 0.0, 1.0),
    "bun": (1.06, -0.52, 0.0, 1.0),
    "mohawk": (1.02, -0.50, 0.0, 0.35),
}


def paint_back_hair(canvas: Tensor, people: People, view: View, light: Light) -> Tensor:
    """Paint the hair behind the head, before body and face; return its coverage (B, H, W)."""
    x, y = view.head_x, view.head_y
    style = per_pixel(people.hair_style)
    soft = 2 * view.pixel
    fall = (
        torch.hypot((x.abs() - 0.62).clamp(min=0), ((y - 0.35).abs() - 1.0).clamp(min=0))
        - 0.42
        - 0.03 * torch.sin(5 * y)
    )
    ball_x, ball_y = view.place(0.0, -1.0, -0.35)
    shapes = {
        "long": fall,
        "afro": torch.hypot(x, y + 0.25) - 1.28,
        "bun": torch.hypot(x - ball_x, y - ball_y + 0.16) - 0.36,
        "curly": torch.hypot(x, (y + 0.12) * 0.95) - 1.10 - 0.05 * torch.sin(11 * torch.atan2(y + 0.12, x)),
    }
    mask = torch.zeros_like(x)
    for name, distance in shapes.items():
        mask = torch.where(style == HAIR_STYLES.index(name), coverage(distance, soft), mask)
    bright = light.brightness(x * 0.5, y * 0.5, torch.full_like(x, 0.6)) * 0.86
    blend(canvas, colour(hair_colour(people)) * bright.unsqueeze(1), mask)
    return mask


def paint_hair(canvas: Tensor, people: People, view: View, light: Light) -> Tensor:
    """Paint the hair on top of the head; return its coverage (B, H, W)."""
    swell, line, slant, opacity = (
        per_pixel(people.skin.new_tensor([_CAPS[name][i] for name in HAIR_STYLES])[people.hair_style]) for i in range(4)
    )
    style = per_pixel(people.hair_style)
    soft = 3 * view.pixel
    cap = surface(people, view, swell)
    edge = line + slant * cap.x + 0.10 * cap.x**2
    edge = edge + (style == HAIR_STYLES.index("curly")) * 0.05 * torch.sin(16 * cap.x)
    # Behind the ears hair reaches lower than at the brow; a turned head shows this part at its side.
    mask = torch.maximum(coverage(cap.y - edge, soft), coverage(cap.z + 0.08, soft) * coverage(cap.y - 0.35, soft))
    mask = mask * cap.inside * opacity
    crest = surface(people, view, 1.34)
    strip = crest.inside * coverage(crest.x.abs() - 0.17, soft) * coverage(crest.y + 0.40, soft)
    mask = torch.where(style == HAIR_STYLES.index("mohawk"), torch.maximum(mask, strip), mask)
    bright = light.brightness(*cap.normal)
    gloss = (1 - (cap.y + 0.72).abs() * 5).clamp(0, 1) * 0.16
    blend(canvas, colour(hair_colour(people)) * (bright + gloss).unsqueeze(1), mask)
    return mask


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


def _cap(canvas: Tensor, people: People, view: View, light: Light, rgb: Tensor) -> Tensor:
    dome = surface(people, view, 1.17)
    mask = dome.inside * coverage(dome.y + 0.42 - 0.1 * dome.x**2, 2 * view.pixel)
    blend(canvas, rgb * light.brightness(*dome.normal).unsqueeze(1), mask)
    cx, cy = view.place(0.0, -0.42, 1.35)
    brim = coverage(ellipse(view.head_x - cx, view.head_y - cy, 0.74 * view.width / 0.78, 0.17), 2 * view.pixel)
    blend(canvas, rgb * 0.72, brim)
    return torch.maximum(mask, brim)


def _beanie(canvas: Tensor, people: People, view: View, light: Light, rgb: Tensor) -> Tensor:
    dome = surface(people, view, 1.20)
    mask = dome.inside * coverage(dome.y + 0.36, 2 * view.pixel)
    blend(canvas, rgb * light.brightness(*dome.normal).unsqueeze(1), mask)
    shade(canvas, 1 - 0.28 * mask * coverage((dome.y + 0.46).abs() - 0.10, 2 * view.pixel))
    cx, cy = view.place(0.0, -1.22, 0.0)
    ball = coverage(torch.hypot(view.head_x - cx, view.head_y - cy) - 0.2, 2 * view.pixel)
    blend(canvas, rgb * 0.5 + 0.5, ball)
    return torch.maximum(mask, ball)


def _sun_hat(canvas: Tensor, people: People, view: View, light: Light, rgb: Tensor) -> Tensor:
    straw = canvas.new_tensor((0.93, 0.80, 0.52)).view(1, 3, 1, 1)
    cx, cy = view.place(0.0, -0.48, 0.25)
    brim = coverage(ellipse(view.head_x - cx, view.head_y - cy, 1.55, 0.27), 2 * view.pixel)
    dome = surface(people, view, 1.22)
    crown = dome.inside * coverage(dome.y + 0.50, 2 * view.pixel)
    blend(canvas, straw * 0.82 * light.brightness(0 * view.x, 0 * view.x - 0.5, 0 * view.x + 0.8).unsqueeze(1), brim)
    blend(canvas, straw * light.brightness(*dome.normal).unsqueeze(1), crown)
    blend(canvas, rgb, crown * coverage((dome.y + 0.58).abs() - 0.10, 2 * view.pixel))
    return torch.maximum(brim, crown)


def _crown(canvas: Tensor, people: People, view: View, light: Light, rgb: Tensor) -> Tensor:
    gold = canvas.new_tensor((0.98, 0.80, 0.24)).view(1, 3, 1, 1)
    cx, cy = view.place(0.0, -0.78, 0.1)
    x, y = view.head_x - cx, view.head_y - cy
    spikes = ((x * 2.2) - (x * 2.2).round()).abs() * 0.9
    mask = coverage(
        torch.maximum(torch.maximum(x.abs() - 0.70, y - 0.24 - 0.1 * (1 - x * x)), -0.42 + spikes - y), 2 * view.pixel
    )
    blend(canvas, gold * light.brightness(x, 0 * x, torch.sqrt((1 - x * x).clamp(min=0.1))).unsqueeze(1), mask)
    blend(canvas, rgb * 0.9, mask * coverage(torch.hypot(x, y - 0.08) - 0.09, 2 * view.pixel))
    return mask
