"""Paint the body: neck, shoulders, clothes, letters on the chest, and a hand with an object."""

import torch
import torch.nn.functional as F
from torch import Tensor

from imagine.world.camera import Light, View, portrait_place
from imagine.world.contexts import Contexts
from imagine.world.glyphs import atlas
from imagine.world.head import skin_colour
from imagine.world.paint import blend, colour, coverage, ellipse, lit_skin, per_pixel, ramp, segment, shade
from imagine.world.people import People
from imagine.world.vocabulary import CLOTHES, COLOUR_RGB, FRAMINGS, HELD, MAX_LETTERS

_SHOULDER = 1.48  # half the shoulders' width, in heads


def paint_body(canvas: Tensor, people: People, contexts: Contexts, view: View, light: Light) -> Tensor:
    """Paint neck and clothes onto `canvas` (B, 3, H, W), in place; return their coverage (B, H, W)."""
    x, y = view.x, view.y
    skin = colour(skin_colour(people))
    soft = 2 * view.pixel
    half_neck = 0.37 * view.width / 0.78 + 0.10 * ramp(y, 1.0, 1.5)
    neck = coverage(torch.maximum(x.abs() - half_neck, (y - 1.0).abs() - 0.7), soft)
    neck_bright = light.brightness(x, 0 * x, torch.sqrt((1 - x * x).clamp(min=0.1)))
    chin_shadow = 0.62 + 0.28 * ramp(y, 0.95, 1.40)
    blend(canvas, lit_skin(skin, neck_bright * chin_shadow), neck)
    torso = _torso(x, y, soft)
    cloth = canvas.new_tensor(COLOUR_RGB)[contexts.clothes_colour]
    bright = _cloth_light(x, y, light).unsqueeze(1)
    blend(canvas, colour(cloth) * bright, torso)
    arms = coverage((x.abs() - 1.06 - 0.05 * (y - 2)).abs() - 0.02, 3 * view.pixel) * (y > 1.75) * torso
    shade(canvas, 1 - 0.22 * arms)
    _paint_clothes_details(canvas, contexts, view, torso, skin, bright, colour(cloth))
    return torch.maximum(neck, torso)


def _cloth_light(x: Tensor, y: Tensor, light: Light) -> Tensor:
    """Return the brightness (B, H, W) of cloth on a rounded chest with a few soft folds."""
    across = (x / (1.1 * _SHOULDER)).clamp(-1, 1)
    folds = 0.05 * torch.sin(2.6 * x + 3.5 * y) * ramp(y, 1.6, 2.4)
    rounded = light.brightness(across, 0 * x - 0.25, torch.sqrt((1 - across**2).clamp(min=0.05)))
    return rounded * (1 + folds) * (1.02 - 0.10 * ramp(y, 1.5, 3.2))


def _torso(x: Tensor, y: Tensor, soft: Tensor) -> Tensor:
    side = x.abs() / _SHOULDER
    line = 1.24 + 0.30 * side**2 + 1.9 * (side - 0.74).clamp(min=0) ** 2
    return coverage(torch.maximum(line - y, x.abs() - _SHOULDER - 0.07 * (y - 1.9)), soft)


def _paint_clothes_details(
    canvas: Tensor, contexts: Contexts, view: View, torso: Tensor, skin: Tensor, bright: Tensor, cloth: Tensor
) -> None:
    """Paint the details of each garment, in place: collar, hood, lapels, tie, stripes."""
    x, y, soft = view.x, view.y, 2 * view.pixel
    kind = per_pixel(contexts.clothes)
    white = canvas.new_tensor((0.96, 0.96, 0.95)).view(1, 3, 1, 1)
    is_shirt = (kind == CLOTHES.index("t-shirt")) | (kind == CLOTHES.index("striped shirt"))
    collar = coverage(ellipse(x, y - 1.22, 0.56, 0.36), soft) * torso
    blend(canvas, lit_skin(skin, 0.90 * bright.squeeze(1)), collar * is_shirt)
    seam = coverage(ellipse(x, y - 1.22, 0.60, 0.40).abs() - 0.03, soft) * torso * (y > 1.2) * is_shirt
    shade(canvas, 1 - 0.14 * seam)
    hood = coverage((ellipse(x, y - 1.24, 0.92, 0.42)).abs() - 0.13, soft) * (y > 1.16)
    hoodie = kind == CLOTHES.index("hoodie")
    blend(canvas, cloth * 0.70 * bright, hood * hoodie * torso)
    strings = coverage(torch.maximum((x.abs() - 0.24).abs() - 0.035, (y - 1.92).abs() - 0.24), soft)
    plain = per_pixel(contexts.letters[:, 0] == 0)
    blend(canvas, white * bright, strings * hoodie * plain * torso)
    suit = kind == CLOTHES.index("suit")
    vee = coverage(x.abs() - 0.62 + 0.42 * (y - 1.2), soft) * torso * (y < 2.7)
    blend(canvas, white * bright, vee * suit)
    lapel = coverage((x.abs() - 0.70 + 0.42 * (y - 1.2)).abs() - 0.07, soft) * torso * (y < 2.8)
    shade(canvas, 1 - 0.4 * lapel * suit)
    tie = coverage(x.abs() - 0.09 - 0.06 * (y - 1.3), soft) * vee
    blend(canvas, canvas.new_tensor((0.62, 0.10, 0.14)).view(1, 3, 1, 1) * bright, tie * suit)
    stripes = coverage(((y * 1.9) - (y * 1.9).round()).abs() - 0.22, 3.8 * view.pixel) * torso * (1 - collar)
    contrast = torch.where(cloth.mean(1, keepdim=True) > 0.7, 0.25, 0.95)
    blend(canvas, contrast * bright.expand(-1, 3, -1, -1), stripes * (kind == CLOTHES.index("striped shirt")))


def paint_letters(canvas: Tensor, contexts: Contexts, view: View) -> None:
    """Paint the word on the chest, in place: light on dark cloth and dark on light cloth."""
    rows = (contexts.letters[:, 0] > 0).nonzero().squeeze(1)
    if not len(rows):
        return
    letters = contexts.letters[rows]
    count, width, height, middle = (per_pixel(value) for value in _word(contexts[rows]))
    place = view.x[rows] / width + count / 2  # in letters, from the left edge of the word
    v = (view.y[rows] - middle) / height  # -0.5 to 0.5 within a letter
    sheet = atlas().to(canvas.device)
    ink = torch.zeros_like(v)
    for slot in range(MAX_LETTERS):
        grid = torch.stack(((place - slot - 0.5) * 2, (v * 2).expand_as(place)), -1)
        glyph = sheet[letters[:, slot]].unsqueeze(1)
        ink = ink + F.grid_sample(glyph, grid, align_corners=False, padding_mode="zeros").squeeze(1)
    dark = (canvas.new_tensor(COLOUR_RGB)[contexts.clothes_colour[rows]].mean(1) > 0.42).float()
    tone = (1 - dark).view(-1, 1, 1, 1).expand(-1, 3, 1, 1) * 0.92 + 0.05
    part = canvas[rows]
    blend(part, tone, ink.clamp(max=1) * _torso(view.x[rows], view.y[rows], 2 * view.pixel[rows]))
    canvas[rows] = part


def letter_boxes(contexts: Contexts, size: int) -> Tensor:
    """Return left, top, width and height in pixels of the word on each portrait's chest, (B, 4); width 0 for no word.

    The box is that of the whole word, which may extend beyond the edge of the picture.
    """
    place = portrait_place(contexts)
    count, width, height, middle = _word(contexts)
    across, down = count * width * place.scale, height * place.scale
    left, top = place.centre[:, 0] - across / 2, place.centre[:, 1] + middle * place.scale - down / 2
    return torch.stack((left, top, across, down), 1) * size


def _word(contexts: Contexts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the number of letters, the width and height of one, and the y of their centre, all (B,), in heads."""
    far = contexts.framing == FRAMINGS.index("half body")
    height = torch.where(far, 0.72, 0.54)
    return (contexts.letters > 0).sum(1).float(), 0.85 * height, height, torch.where(far, 2.12, 1.84)


def paint_held(canvas: Tensor, people: People, contexts: Contexts, view: View, light: Light) -> Tensor:
    """Paint a hand at the right with a balloon, a flower or a cup, in place; return the coverage (B, H, W)."""
    full = torch.zeros_like(view.x)
    for number in range(1, len(HELD)):
        rows = (contexts.held == number).nonzero().squeeze(1)
        if not len(rows):
            continue
        part = canvas[rows]
        x, y, soft = view.x[rows] - 1.22, view.y[rows] - 1.72, 2 * view.pixel[rows]
        mask = _HELD_PAINTERS[HELD[number]](part, x, y, soft)
        hand = coverage(ellipse(x, y - 0.1, 0.24, 0.22), soft)
        blend(part, lit_skin(colour(skin_colour(people[rows])), 0.98 - 0.5 * (y - 0.1)), hand)
        knuckles = coverage(((x * 9).sin() * 0.02).abs() - 0.004, 0.02) * hand * coverage((y - 0.02).abs() - 0.06, soft)
        shade(part, 1 - 0.12 * knuckles)
        canvas[rows] = part
        full[rows] = torch.maximum(mask, hand)
    return full


def _flat(canvas: Tensor, rgb: tuple[float, float, float]) -> Tensor:
    return canvas.new_tensor(rgb).view(1, 3, 1, 1)


def _balloon(canvas: Tensor, x: Tensor, y: Tensor, soft: Tensor) -> Tensor:
    string = coverage(torch.maximum((x - 0.12 * y * y * 0.1).abs() - 0.02, (y + 0.8).abs() - 0.9), soft)
    blend(canvas, _flat(canvas, (0.95, 0.95, 0.95)), string)
    ball = coverage(ellipse(x - 0.12, y + 2.0, 0.40, 0.50), soft)
    blend(canvas, _flat(canvas, (0.92, 0.20, 0.24)), ball)
    blend(canvas, _flat(canvas, (1.0, 0.75, 0.75)), coverage(ellipse(x + 0.03, y + 2.2, 0.11, 0.14), 2 * soft) * 0.9)
    return torch.maximum(string, ball)


def _flower(canvas: Tensor, x: Tensor, y: Tensor, soft: Tensor) -> Tensor:
    stem = coverage(torch.maximum(x.abs() - 0.04, (y + 0.35).abs() - 0.5), soft)
    blend(canvas, _flat(canvas, (0.16, 0.50, 0.20)), stem)
    radius = torch.hypot(x, y + 0.95)
    petals = coverage(radius - 0.36 - 0.08 * torch.cos(5 * torch.atan2(y + 0.95, x)), soft)
    blend(canvas, _flat(canvas, (0.98, 0.52, 0.72)), petals)
    blend(canvas, _flat(canvas, (0.98, 0.84, 0.24)), coverage(radius - 0.15, soft))
    return torch.maximum(stem, petals)


def _cup(canvas: Tensor, x: Tensor, y: Tensor, soft: Tensor) -> Tensor:
    handle = coverage((torch.hypot(x - 0.34, y + 0.30) - 0.17).abs() - 0.05, soft)
    blend(canvas, _flat(canvas, (0.85, 0.85, 0.88)), handle)
    mug = coverage(torch.maximum(x.abs() - 0.32, (y + 0.30).abs() - 0.38), soft)
    blend(canvas, _flat(canvas, (0.96, 0.96, 0.97)), mug)
    blend(canvas, _flat(canvas, (0.20, 0.55, 0.75)), mug * coverage((y + 0.30).abs() - 0.10, soft))
    away, _ = segment(x, y, *(x.new_tensor(v) for v in (0.0, -0.95, 0.08, -1.25)))
    blend(canvas, _flat(canvas, (1.0, 1.0, 1.0)), coverage(away - 0.05, 3 * soft) * 0.6)
    return torch.maximum(mug, handle)


_HELD_PAINTERS = {"balloon": _balloon, "flower": _flower, "cup": _cup}
