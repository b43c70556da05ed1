"""Paint hair: enlarged egg surfaces around the head that end at a hairline, and the hair behind the head.

Hats press hair down: no style reaches above or through a cap, a beanie or a sun hat.
"""

import torch
from torch import Tensor

from imagine.world.camera import Light, View
from imagine.world.contexts import Contexts
from imagine.world.head import Surface, hair_colour, surface
from imagine.world.paint import blend, colour, coverage, per_pixel, shade
from imagine.world.people import People
from imagine.world.vocabulary import HAIR_STYLES, HEADWEAR

# hair style -> scale of the cap, height of the hairline, its slant to one side, opacity
_CAPS = {
    "bald": (1.0, -2.0, 0.0, 0.0),
    "buzz cut": (1.02, -0.48, 0.0, 0.72),
    "short": (1.10, -0.54, 0.0, 1.0),
    "fringe": (1.13, -0.40, 0.0, 1.0),
    "side part": (1.14, -0.56, 0.26, 1.0),
    "curly": (1.19, -0.48, 0.0, 1.0),
    "afro": (1.20, -0.52, 0.0, 1.0),
    "long": (1.11, -0.56, 0.0, 1.0),
    "bun": (1.07, -0.58, 0.0, 1.0),
    "mohawk": (1.02, -0.54, 0.0, 0.32),
}
_UNDER_A_HAT = 1.08  # scale of the hair under a hat
_HAT_LINE = -0.52  # hair above this height is under the hat


def wears_hat(contexts: Contexts) -> Tensor:
    """Return (B, 1, 1), true where headwear covers the hair; a crown does not."""
    return per_pixel((contexts.headwear > 0) & (contexts.headwear != HEADWEAR.index("crown")))


def _is(people: People, *styles: str) -> Tensor:
    found = torch.zeros_like(people.hair_style, dtype=torch.bool)
    for style in styles:
        found = found | (people.hair_style == HAIR_STYLES.index(style))
    return per_pixel(found)


def paint_back_hair(canvas: Tensor, people: People, contexts: Contexts, view: View, light: Light) -> Tensor:
    """Paint the hair behind the head, before body and face; return its coverage (B, H, W)."""
    x, y = view.head_x, view.head_y
    hat, soft = wears_hat(contexts), 2 * view.pixel
    wave = 0.05 * torch.sin(5.5 * y + 1.0)
    fall = torch.hypot((x.abs() - 0.56 - wave).clamp(min=0), ((y - 0.32).abs() - 0.98).clamp(min=0)) - 0.42
    ball_x, ball_y = view.place(0.0, -1.0, -0.35)
    turn = torch.atan2(y + 0.15, x)
    afro = (
        torch.hypot(x, y + torch.where(hat, 0.05, 0.22)) - torch.where(hat, 1.12, 1.26) - 0.025 * torch.sin(17 * turn)
    )
    curls = torch.hypot(x, (y + 0.10) * 0.95) - torch.where(hat, 1.02, 1.10) - 0.055 * torch.sin(11 * turn)
    bun = torch.hypot(x - ball_x, y - ball_y + 0.16) - torch.where(hat, -1.0, 0.36)
    mask = torch.zeros_like(x)
    for name, distance in (("long", fall), ("afro", afro), ("bun", bun), ("curly", curls)):
        mask = torch.where(_is(people, name), coverage(distance, soft), mask)
    mask = mask * torch.where(hat, coverage(_HAT_LINE + 0.1 - y, soft), 1.0)
    nx, ny = x / 1.3, (y + 0.2) / 1.3
    bright = 0.88 * light.brightness(nx, ny, torch.sqrt((1 - nx * nx - ny * ny).clamp(min=0.06)))
    grain = torch.where(
        _is(people, "afro", "curly"), _curl_grain(x, y), 0.05 * torch.sin(30 * x + 3 * torch.sin(4 * y))
    )
    blend(canvas, colour(hair_colour(people)) * (bright * (1 + grain)).unsqueeze(1), mask)
    return mask


def _curl_grain(x: Tensor, y: Tensor) -> Tensor:
    return 0.13 * torch.sin(13 * x + 2 * torch.sin(7 * y)) * torch.sin(13 * y + 2 * torch.sin(7 * x))


def paint_hair(canvas: Tensor, people: People, contexts: Contexts, view: View, light: Light) -> Tensor:
    """Paint the hair on top of the head, with the shade that it throws on the brow; return its coverage (B, H, W)."""
    swell, line, slant, opacity = (
        per_pixel(people.skin.new_tensor([_CAPS[name][i] for name in HAIR_STYLES])[people.hair_style]) for i in range(4)
    )
    swell = torch.where(wears_hat(contexts), swell.clamp(max=_UNDER_A_HAT), swell)
    cap = surface(people, view, swell)
    edge = _hairline(people, cap, line, slant)
    soft = 3 * view.pixel
    on_head = (cap.normal[0] ** 2 + cap.normal[1] ** 2) * swell**2 < 0.96
    shadow = coverage(cap.y - edge - 0.10, 0.22) * opacity * (on_head & (cap.z > 0))
    shade(canvas, 1 - 0.22 * shadow)
    # Behind the ears hair reaches lower than at the brow; a turned head shows this part at its side.
    nape = coverage(cap.z + 0.08, soft) * coverage(cap.y - 0.35, soft)
    mask = torch.maximum(coverage(cap.y - edge, soft), nape) * cap.inside * opacity
    mask = _with_locks(people, view, cap, mask)
    crest = surface(people, view, torch.where(wears_hat(contexts), 1.05, 1.34))
    strip = crest.inside * coverage(crest.x.abs() - 0.18, soft) * coverage(crest.y + 0.42, soft)
    mask = torch.where(_is(people, "mohawk"), torch.maximum(mask, strip), mask)
    blend(canvas, colour(hair_colour(people)) * _hair_light(people, cap, light).unsqueeze(1), mask)
    return mask


def _hairline(people: People, cap: Surface, line: Tensor, slant: Tensor) -> Tensor:
    """Return the height (B, H, W) at which hair ends on the brow; each style has its own edge."""
    edge = line - per_pixel(0.16 * (people.hairline - 0.5)) + slant * cap.x + 0.12 * cap.x**2
    edge = edge + _is(people, "curly", "afro") * 0.035 * torch.sin(15 * cap.x)
    edge = edge + _is(people, "fringe") * 0.05 * torch.sin(13 * cap.x + 0.6).abs()
    return edge + _is(people, "short", "side part") * 0.018 * torch.sin(19 * cap.x)


def _with_locks(people: People, view: View, cap: Surface, mask: Tensor) -> Tensor:
    """Add the locks of long hair that frame the face, in front of the ears."""
    side = view.head_x.abs()
    inner = 0.70 * view.width / 0.78 + 0.05 * torch.sin(5 * view.head_y)
    lock = coverage(inner - side, 3 * view.pixel) * coverage(side - inner - 0.36, 3 * view.pixel)
    reach = coverage(view.head_y - 0.95, 0.3) * coverage(-0.45 - view.head_y, 0.2)
    return torch.where(_is(people, "long"), torch.maximum(mask, lock * reach), mask)


def _hair_light(people: People, cap: Surface, light: Light) -> Tensor:
    strands = 0.06 * torch.sin(26 * cap.x + 4 * torch.sin(3 * cap.y))
    grain = torch.where(_is(people, "afro", "curly"), _curl_grain(cap.x, cap.y), strands)
    gloss = (1 - (cap.y + 0.74 - 0.25 * cap.x.abs()).abs() * 5).clamp(0, 1) * 0.22 * (1 + 6 * strands)
    return light.brightness(*cap.normal) * (1 + grain) + gloss * ~_is(people, "afro", "curly")
