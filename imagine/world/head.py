"""Paint a shaded head: an egg in parallel projection, with features painted on its surface in head coordinates.

Painting on the surface produces foreshortening: a turned head shows less of its far eye.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from imagine.world import vocabulary as words
from imagine.world.camera import Light, View
from imagine.world.contexts import Contexts
from imagine.world.face import Face, paint_eyes, paint_glasses, paint_mouth, paint_nose
from imagine.world.paint import blend, colour, coverage, ellipse, lit_skin, per_pixel, ramp, segment, shade
from imagine.world.people import People

_SKIN = ((1.0, 0.87, 0.78), (0.87, 0.65, 0.48), (0.42, 0.27, 0.19))
_FRECKLES = ((0.42, 0.20), (0.52, 0.12), (0.56, 0.27), (0.34, 0.28), (0.46, 0.35), (0.14, 0.04), (0.62, 0.20))


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
    full = 1 - ((view.head_y - 0.34) / 0.42) ** 2
    taper = taper + per_pixel(0.16 * (people.cheeks - 0.4)) * full.clamp(min=0)
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
    bright = light.brightness(*egg.normal)
    blend(canvas, lit_skin(skin, bright), egg.inside)
    seen = egg.inside * (egg.z > 0)
    hair = colour(hair_colour(people))
    face = Face(egg.x, egg.y, seen, bright.unsqueeze(1), skin, hair, 1.6 * view.pixel)
    _paint_blush(canvas, face)
    _paint_marks(canvas, people, face)
    _paint_beard(canvas, people, view, egg, light, hair)
    paint_mouth(canvas, people, contexts, face)
    paint_eyes(canvas, people, contexts, face)
    paint_nose(canvas, people, view, light, skin)
    paint_glasses(canvas, people, face)
    return torch.maximum(egg.inside, ears)


def _paint_ears(canvas: Tensor, people: People, view: View, light: Light, skin: Tensor) -> Tensor:
    size = per_pixel(0.17 + 0.12 * people.ear_size)
    mask = torch.zeros_like(view.x)
    for side in (-1.0, 1.0):
        cx, cy = view.place(side * 0.98, 0.02, -0.05)
        dx, dy = view.head_x - cx, view.head_y - cy
        ear = coverage(ellipse(dx, dy, 0.75 * size, 1.15 * size), 1.5 * view.pixel)
        bright = light.brightness(torch.full_like(dx, side * 0.6), 0 * dx, torch.full_like(dx, 0.7))
        blend(canvas, lit_skin(skin, bright), ear)
        inner = coverage(ellipse(dx, dy, 0.35 * size, 0.65 * size), 2 * view.pixel)
        shade(canvas, 1 - 0.20 * inner)
        mask = torch.maximum(mask, ear)
    return mask


def _paint_blush(canvas: Tensor, face: Face) -> None:
    """Paint warm cheeks and lightly shaded eye sockets."""
    cheek = (1 - torch.hypot((face.x.abs() - 0.50) / 0.30, (face.y - 0.27) / 0.20)).clamp(min=0) * face.seen
    warm = canvas.new_tensor((0.05, -0.09, -0.07)).view(1, 3, 1, 1)
    canvas.add_(warm * cheek.unsqueeze(1))
    socket = (1 - torch.hypot((face.x.abs() - 0.40) / 0.34, (face.y + 0.14) / 0.24)).clamp(min=0) * face.seen
    shade(canvas, 1 - 0.10 * socket)


def _paint_marks(canvas: Tensor, people: People, face: Face) -> None:
    """Paint freckles and wrinkles."""
    has = per_pixel(people.freckles.float()) * face.seen
    spots = torch.zeros_like(face.x)
    for x, y in _FRECKLES:
        spots = torch.maximum(spots, coverage(torch.hypot(face.x.abs() - x, face.y - y) - 0.028, 0.04))
    shade(canvas, 1 - 0.34 * has * spots)
    old = per_pixel(ramp(people.age, 0.45, 0.95)) * face.seen
    fold, _ = segment(face.x.abs(), face.y, *(face.x.new_tensor(v) for v in (0.20, 0.22, 0.42, 0.52)))
    brow = torch.minimum((face.y + 0.60).abs(), (face.y + 0.72).abs()) + 0.3 * (face.x.abs() - 0.35).clamp(min=0)
    bag = (torch.hypot(face.x.abs() - 0.39, (face.y - 0.06) * 1.2) - 0.19).abs() + (0.10 - face.y).clamp(min=0)
    lines = torch.maximum(
        coverage(fold - 0.02, 0.06), torch.maximum(coverage(brow - 0.012, 0.05), coverage(bag - 0.01, 0.05))
    )
    shade(canvas, 1 - 0.30 * old * lines)


def _paint_beard(canvas: Tensor, people: People, view: View, egg: Surface, light: Light, hair: Tensor) -> None:
    kind = per_pixel(people.beard)
    mouth = per_pixel(0.42 + 0.10 * people.mouth_height)
    side = egg.x.abs()
    soft = 3 * view.pixel
    tuft = 0.02 * torch.sin(26 * egg.x)
    jaw = coverage(0.42 - 0.62 * ramp(side, 0.52, 0.92) - egg.y + tuft, soft)
    lip = coverage((egg.y - (mouth - 0.13 + 0.7 * egg.x**2)).abs() - 0.055, soft) * coverage(side - 0.30, soft)
    chin = coverage(ellipse(egg.x, egg.y - 0.80, 0.26, 0.24), soft)
    amount = (kind == 1) * 0.40 * jaw + (kind == 2) * lip + (kind == 3) * torch.maximum(chin, lip) + (kind == 4) * jaw
    strands = 0.94 + 0.06 * (kind > 1) * torch.sin(34 * egg.x + 5 * torch.sin(9 * egg.y))
    bright = (light.brightness(*egg.normal) * strands).unsqueeze(1)
    blend(canvas, hair * 0.92 * bright, amount * egg.inside * (egg.z > -0.25) * 0.94)
