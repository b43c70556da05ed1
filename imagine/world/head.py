"""Paint a shaded head: an egg in parallel projection, with features painted on its surface in head coordinates.

Painting on the surface produces foreshortening: a turned head shows less of its far eye.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from imagine.world import vocabulary as words
from imagine.world.camera import Light, View
from imagine.world.contexts import Contexts
from imagine.world.paint import blend, colour, coverage, ellipse, per_pixel, ramp, segment, shade
from imagine.world.people import People

# expression -> eye opening, brow raise, brow angle (positive: inner end down), mouth bend, mouth opening, mouth width
_EXPRESSION_VALUES = {
    "neutral": (1.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    "smiling": (0.85, 0.02, 0.0, 0.15, 0.0, 1.15),
    "laughing": (0.5, 0.05, 0.0, 0.14, 0.14, 1.2),
    "sad": (0.75, 0.02, -0.10, -0.13, 0.0, 0.9),
    "surprised": (1.35, 0.13, 0.0, 0.0, 0.17, 0.6),
    "angry": (0.72, -0.07, 0.12, -0.08, 0.03, 0.95),
}
_EYE_Y = -0.08
_SKIN = ((0.99, 0.85, 0.76), (0.84, 0.62, 0.45), (0.36, 0.22, 0.15))
_FRECKLES = ((0.42, 0.20), (0.52, 0.10), (0.56, 0.26), (0.34, 0.30), (0.46, 0.36), (0.16, 0.02), (0.62, 0.18))


@dataclass(frozen=True)
class Surface:
    """An egg around the head: coverage (B, H, W), normal (x, y, z) in view space, and the point in head coordinates."""

    inside: Tensor
    normal: tuple[Tensor, Tensor, Tensor]
    x: Tensor
    y: Tensor
    z: Tensor


def surface(people: People, view: View, swell: "Tensor | float" = 1.0) -> Surface:
    """Return the surface of the head, or one that is `swell` times as large (hair, hats)."""
    taper = 1 - per_pixel(0.36 - 0.26 * people.jaw) * ramp(view.head_y, 0.05, 1.15)
    u = view.head_x / (view.width * taper * swell)
    v = view.head_y / swell
    reach = u * u + v * v
    inside = coverage((torch.sqrt(reach + 1e-9) - 1) * 0.85, 1.5 * view.pixel)
    w = torch.sqrt((1 - reach).clamp(min=1e-4))
    local = [u * axis[:, 0] + v * axis[:, 1] + w * axis[:, 2] for axis in (view.right, view.down, view.front)]
    return Surface(inside, (u, v, w), *local)


def skin_colour(people: People) -> Tensor:
    """Return the skin colour of each person, (B, 3) in 0..1."""
    fair, mid, dark = (people.skin.new_tensor(rgb) for rgb in _SKIN)
    tone = people.skin.unsqueeze(1)
    base = torch.where(tone < 0.5, fair + (mid - fair) * 2 * tone, mid + (dark - mid) * (2 * tone - 1))
    warm = (people.undertone - 0.5).unsqueeze(1) * people.skin.new_tensor((-0.05, 0.05, -0.06))
    return (base + warm).clamp(0, 1)


def hair_colour(people: People) -> Tensor:
    """Return the hair colour of each person, (B, 3) in 0..1."""
    return people.skin.new_tensor(words.HAIR_RGB)[people.hair_colour]


def paint_head(canvas: Tensor, people: People, contexts: Contexts, view: View, light: Light) -> Tensor:
    """Paint ears, head and face onto `canvas` (B, 3, H, W), in place; return their coverage (B, H, W)."""
    skin = colour(skin_colour(people))
    egg = surface(people, view)
    ears = _paint_ears(canvas, people, view, light, skin)
    blend(canvas, skin * light.brightness(*egg.normal).unsqueeze(1), egg.inside)
    face = egg.inside * (egg.z > 0)
    _paint_marks(canvas, people, egg, face)
    _paint_beard(canvas, people, view, egg, face, light)
    expression_values = people.skin.new_tensor([_EXPRESSION_VALUES[name] for name in words.EXPRESSIONS])[
        contexts.expression
    ]
    bright = light.brightness(*egg.normal).unsqueeze(1)
    _paint_mouth(canvas, people, view, egg, face, expression_values, skin, bright)
    _paint_eyes(canvas, people, contexts, view, egg, face, expression_values, bright)
    _paint_nose(canvas, people, view, light, skin)
    _paint_glasses(canvas, people, view, egg, face)
    return torch.maximum(egg.inside, ears)


def _paint_ears(canvas: Tensor, people: People, view: View, light: Light, skin: Tensor) -> Tensor:
    size = per_pixel(0.17 + 0.12 * people.ear_size)
    mask = torch.zeros_like(view.x)
    for side in (-1.0, 1.0):
        cx, cy = view.place(side * 0.98, 0.02, -0.05)
        dx, dy = view.head_x - cx, view.head_y - cy
        ear = coverage(ellipse(dx, dy, 0.75 * size, 1.15 * size), 1.5 * view.pixel)
        bright = light.brightness(torch.full_like(dx, side * 0.6), 0 * dx, torch.full_like(dx, 0.7))
        blend(canvas, skin * bright.unsqueeze(1), ear)
        inner = coverage(ellipse(dx, dy, 0.35 * size, 0.65 * size), 2 * view.pixel)
        shade(canvas, 1 - 0.22 * inner)
        mask = torch.maximum(mask, ear)
    return mask


def _paint_marks(canvas: Tensor, people: People, egg: Surface, face: Tensor) -> None:
    """Paint freckles and wrinkles."""
    has = per_pixel(people.freckles.float()) * face
    spots = torch.zeros_like(face)
    for x, y in _FRECKLES:
        spots = torch.maximum(spots, coverage(torch.hypot(egg.x.abs() - x, egg.y - y) - 0.03, 0.04))
    shade(canvas, 1 - 0.38 * has * spots)
    old = per_pixel(ramp(people.age, 0.45, 0.95)) * face
    fold, _ = segment(egg.x.abs(), egg.y, *(egg.x.new_tensor(v) for v in (0.20, 0.22, 0.42, 0.52)))
    brow = torch.minimum((egg.y + 0.60).abs(), (egg.y + 0.72).abs()) + 0.3 * (egg.x.abs() - 0.35).clamp(min=0)
    bag = (torch.hypot(egg.x.abs() - 0.38, (egg.y - 0.04) * 1.2) - 0.16).abs() + (0.06 - egg.y).clamp(min=0)
    lines = torch.maximum(
        coverage(fold - 0.02, 0.06), torch.maximum(coverage(brow - 0.012, 0.05), coverage(bag - 0.01, 0.05))
    )
    shade(canvas, 1 - 0.34 * old * lines)


def _paint_beard(canvas: Tensor, people: People, view: View, egg: Surface, face: Tensor, light: Light) -> None:
    kind = per_pixel(people.beard)
    mouth = per_pixel(0.42 + 0.10 * people.mouth_height)
    side = egg.x.abs()
    soft = 3 * view.pixel
    jaw = coverage(0.36 - 0.60 * ramp(side, 0.40, 0.85) - egg.y, soft)
    lip = coverage((egg.y - (mouth - 0.13 + 0.7 * egg.x**2)).abs() - 0.055, soft) * coverage(side - 0.30, soft)
    chin = torch.maximum(coverage(ellipse(egg.x, egg.y - 0.80, 0.26, 0.24), soft), 0.0 * lip)
    amount = (kind == 1) * 0.42 * jaw + (kind == 2) * lip + (kind == 3) * torch.maximum(chin, lip) + (kind == 4) * jaw
    bright = (light.brightness(*egg.normal) * 0.9).unsqueeze(1)
    blend(canvas, colour(hair_colour(people) * 0.9) * bright, amount * egg.inside * (egg.z > -0.25) * 0.94)


def _paint_mouth(
    canvas: Tensor,
    people: People,
    view: View,
    egg: Surface,
    face: Tensor,
    expression_values: Tensor,
    skin: Tensor,
    bright: Tensor,
) -> None:
    bend, opening, stretch = (per_pixel(expression_values[:, i]) for i in (3, 4, 5))
    half = per_pixel(0.23 + 0.13 * people.mouth_width) * stretch
    along = egg.x / half
    arch = (1 - along * along).clamp(min=0)
    line = per_pixel(0.44 + 0.10 * people.mouth_height) + bend * (arch - 0.5)
    gap = opening * arch.sqrt()
    lips = (per_pixel(0.035 + 0.05 * people.lip_fullness)) * arch.sqrt()
    away = (egg.y - line).abs()
    soft = 1.6 * view.pixel
    red = skin * 0.45 + skin.new_tensor((0.78, 0.22, 0.26)).view(1, 3, 1, 1) * 0.55
    within = face * (arch > 0)
    blend(canvas, red * bright, within * coverage(away - gap - lips - 0.012, soft))
    blend(
        canvas,
        skin.new_tensor((0.28, 0.07, 0.09)).view(1, 3, 1, 1) * bright,
        within * coverage(away - gap - 0.014, soft),
    )
    teeth = (
        within
        * coverage(away - gap + 0.01, soft)
        * coverage(egg.y - line + 0.01, soft)
        * per_pixel((expression_values[:, 3] > 0).float())
    )
    blend(canvas, skin.new_tensor((0.97, 0.96, 0.93)).view(1, 3, 1, 1) * bright, teeth * (opening > 0.1))


def _paint_eyes(
    canvas: Tensor,
    people: People,
    contexts: Contexts,
    view: View,
    egg: Surface,
    face: Tensor,
    expression_values: Tensor,
    bright: Tensor,
) -> None:
    opening, lift, angle = (per_pixel(expression_values[:, i]) for i in (0, 1, 2))
    soft = 1.6 * view.pixel
    across = egg.x.abs() - per_pixel(0.33 + 0.12 * people.eye_spacing)
    width = per_pixel(0.165 + 0.055 * people.eye_size)
    height = per_pixel(0.105 + 0.055 * people.eye_size)
    y = egg.y - _EYE_Y
    white = coverage(ellipse(across, y, width, height * opening), soft) * face
    lid = coverage(ellipse(across, y, width + 0.02, height * opening + 0.035), soft) * coverage(y, 2 * soft) * face
    shade(canvas, 1 - 0.72 * lid)
    blend(canvas, canvas.new_tensor((0.98, 0.98, 0.97)).view(1, 3, 1, 1) * bright.clamp(min=0.7), white)
    aim = across * egg.x.sign() - per_pixel(contexts.gaze) * 0.55 * width
    ring = torch.hypot(aim, y) - height * 0.80
    iris = canvas.new_tensor(words.EYE_RGB)[people.eye_colour]
    blend(canvas, colour(iris), white * coverage(ring, soft))
    shade(canvas, 1 - 0.9 * white * coverage(ring + height * 0.42, soft))
    glint = torch.hypot(aim - 0.02, y + 0.035) - 0.022
    blend(canvas, torch.ones_like(canvas[:, :, :1, :1]), white * coverage(glint, soft) * 0.9)
    thick = per_pixel(0.022 + 0.042 * people.brow_thickness)
    rise = per_pixel(0.24 + 0.09 * people.brow_height) + lift
    # `across` is negative on the inner half of the brow: a positive angle pulls that end down.
    bow = (y + rise + angle * (across / 0.2) + 0.9 * across**2).abs() - thick
    brow = coverage(bow, soft) * coverage(across.abs() - 0.22, 2 * soft) * face
    blend(canvas, colour(hair_colour(people) * 0.72), brow * 0.95)


def _paint_nose(canvas: Tensor, people: People, view: View, light: Light, skin: Tensor) -> None:
    length = per_pixel(0.17 + 0.17 * people.nose_length)
    ax, ay = view.place(0.0, -0.06, 1.0)
    bx, by = view.place(0.0, length, 1.22)
    away, along = segment(view.head_x, view.head_y, ax, ay, bx, by)
    radius = 0.045 + per_pixel(0.06 + 0.09 * people.nose_width) * along
    nx = (view.head_x - ax - along * (bx - ax)) / radius
    ny = (view.head_y - ay - along * (by - ay)) / radius
    bright = light.brightness(nx * 0.9, ny * 0.9, torch.sqrt((1 - 0.8 * (nx * nx + ny * ny)).clamp(min=0.02)))
    mask = coverage(away - radius, 2 * view.pixel)
    blend(canvas, skin * (1.04 * bright).unsqueeze(1), mask * ramp(along, 0.1, 0.6))
    rim = (
        coverage((away - radius).abs() - 0.012, 2.5 * view.pixel) * ramp(along, 0.55, 0.95) * (view.head_y > by - 0.02)
    )
    shade(canvas, 1 - 0.42 * rim)
    holes = torch.hypot(view.head_x - bx, 0 * view.head_y)
    shade(
        canvas,
        1
        - 0.5
        * mask
        * coverage(torch.hypot(holes - 0.45 * radius, view.head_y - by - 0.55 * radius) - 0.03, 2 * view.pixel),
    )


def _paint_glasses(canvas: Tensor, people: People, view: View, egg: Surface, face: Tensor) -> None:
    kind = per_pixel(people.glasses)
    across = egg.x.abs() - per_pixel(0.33 + 0.12 * people.eye_spacing)
    y = egg.y - _EYE_Y - 0.01
    round_rim = (torch.hypot(across, y) - 0.27).abs()
    square_rim = (torch.maximum(across.abs(), y.abs() * 1.25) - 0.27).abs()
    rim = torch.where(kind == 2, square_rim, round_rim) - 0.022
    bridge = torch.maximum((y + 0.03).abs() - 0.022, egg.x.abs() - per_pixel(0.08 + 0.12 * people.eye_spacing))
    frame = coverage(torch.minimum(rim, bridge), 1.6 * view.pixel) * face * (kind > 0)
    blend(canvas, canvas.new_tensor((0.10, 0.09, 0.12)).view(1, 3, 1, 1), frame * 0.95)
