"""Paint the features of a face in head coordinates: eyes, brows, mouth, nose and glasses."""

from dataclasses import dataclass

import torch
from torch import Tensor

from imagine.world import vocabulary as words
from imagine.world.camera import Light, View
from imagine.world.contexts import Contexts
from imagine.world.paint import blend, colour, coverage, lit_skin, per_pixel, ramp, segment, shade
from imagine.world.people import People

EYE_Y = -0.08
# expression -> eye opening, brow raise, brow angle (positive: inner end down), mouth bend, mouth opening, mouth width
_EXPRESSION_VALUES = {
    "neutral": (1.0, 0.0, 0.0, 0.0, 0.0, 0.95),
    "smiling": (0.84, 0.03, 0.0, 0.19, 0.028, 1.25),
    "laughing": (0.42, 0.07, 0.0, 0.16, 0.155, 1.25),
    "sad": (0.72, 0.06, -0.095, -0.16, 0.0, 0.90),
    "surprised": (1.32, 0.16, 0.0, 0.0, 0.19, 0.55),
    "angry": (0.68, -0.12, 0.105, -0.10, 0.035, 1.0),
}


@dataclass(frozen=True)
class Face:
    """What the painters of features share: head coordinates and the skin around the feature.

    `x`, `y` and `seen` (1 on the front of the head) are (B, H, W), `bright` (B, 1, H, W), `skin` and `hair` colours
    (B, 3, 1, 1), and `soft` the width of edges (B, 1, 1).
    """

    x: Tensor
    y: Tensor
    seen: Tensor
    bright: Tensor
    skin: Tensor
    hair: Tensor
    soft: Tensor

    def rgb(self, red: float, green: float, blue: float) -> Tensor:
        """Return a colour as (1, 3, 1, 1)."""
        return self.x.new_tensor((red, green, blue)).view(1, 3, 1, 1)


def eye_x(people: People) -> Tensor:
    """Return how far the eyes are from the middle of the face, (B,), in head radii."""
    return 0.36 + 0.10 * people.eye_spacing


def mouth_half_width(people: People) -> Tensor:
    """Return half the width of the mouth at rest, (B,), in head radii."""
    return 0.22 + 0.12 * people.mouth_width


def nose_y(people: People) -> Tensor:
    """Return the y of the tip of the nose, (B,), in head radii."""
    return 0.16 + 0.17 * people.nose_length


def _expressions(contexts: Contexts) -> Tensor:
    return contexts.yaw.new_tensor([_EXPRESSION_VALUES[name] for name in words.EXPRESSIONS])[contexts.expression]


def paint_mouth(canvas: Tensor, people: People, contexts: Contexts, face: Face) -> None:
    """Paint lips, the open mouth and teeth, in place."""
    values = _expressions(contexts)
    bend, opening, stretch = (per_pixel(values[:, i]) for i in (3, 4, 5))
    along = face.x / (per_pixel(mouth_half_width(people)) * stretch)
    arch = (1 - along * along).clamp(min=0)
    line = per_pixel(0.46 + 0.10 * people.mouth_height) + bend * (arch - 0.5)
    gap = opening * arch.sqrt()
    lips = (per_pixel(0.035 + 0.05 * people.lip_fullness)) * arch.sqrt()
    away, within = (face.y - line).abs(), face.seen * (arch > 0)
    red = face.skin * 0.48 + face.rgb(0.78, 0.24, 0.28) * 0.50
    shadow = within * coverage((face.y - line - gap - lips - 0.06).abs() - 0.03, 3 * face.soft) * arch
    shade(canvas, 1 - 0.16 * shadow)
    blend(canvas, red * face.bright, within * coverage(away - gap - lips - 0.012, face.soft))
    blend(canvas, face.rgb(0.30, 0.08, 0.10) * face.bright, within * coverage(away - gap - 0.012, face.soft))
    happy = per_pixel((values[:, 3] > 0).float())
    teeth = within * coverage(away - gap + 0.006, face.soft) * coverage(face.y - line - 0.35 * gap, face.soft) * happy
    blend(canvas, face.rgb(0.98, 0.97, 0.94) * face.bright.clamp(min=0.75), teeth)


def paint_eyes(canvas: Tensor, people: People, contexts: Contexts, face: Face) -> None:
    """Paint almond eyes with large irises, so that gaze is seen, lids, lashes and brows, in place."""
    values = _expressions(contexts)
    opening, lift, angle = (per_pixel(values[:, i]) for i in (0, 1, 2))
    across = face.x.abs() - per_pixel(eye_x(people))
    width, height = per_pixel(0.205 + 0.055 * people.eye_size), per_pixel(0.145 + 0.05 * people.eye_size)
    tilt = per_pixel(0.45 * (people.eye_tilt - 0.4))
    y = face.y - EYE_Y + tilt * across
    arch = 1 - (across / width) ** 2
    upper, lower = 0.92 * height * opening * arch, 0.80 * height * opening.clamp(max=1.15) * arch
    white = coverage(torch.maximum(-y - upper, y - lower), face.soft) * face.seen
    blend(canvas, face.rgb(0.99, 0.985, 0.97) * face.bright.clamp(min=0.72), white)
    shade(canvas, 1 - 0.25 * white * coverage(-y - upper + 0.06, 0.06))
    _paint_irises(canvas, people, contexts, face, (across, y, width, height, white))
    rim = coverage((y + upper).abs() - 0.022 - 0.10 * (across / width).clamp(0, 1) * 0.2, face.soft)
    lid = rim * coverage(across.abs() - width - 0.02, face.soft) * face.seen
    shade(canvas, 1 - 0.80 * lid)
    fold = coverage((y + upper + 0.075).abs() - 0.010, 1.2 * face.soft) * coverage(
        across.abs() - 0.85 * width, face.soft
    )
    shade(canvas, 1 - 0.22 * fold * face.seen)
    _paint_brows(canvas, people, face, across, lift, angle)


def _paint_irises(
    canvas: Tensor,
    people: People,
    contexts: Contexts,
    face: Face,
    eye: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    across, y, width, height, white = eye
    radius = 0.82 * height
    aim = across * face.x.sign() - per_pixel(contexts.gaze) * (width - 0.62 * radius) * 0.72
    reach = torch.hypot(aim, y + 0.01) / radius
    iris = colour(canvas.new_tensor(words.EYE_RGB)[people.eye_colour])
    tone = (1.25 - 0.55 * reach.clamp(0, 1) ** 2 + 0.25 * (y / radius).clamp(-1, 1)).unsqueeze(1)
    blend(canvas, iris * tone, white * coverage((reach - 1) * radius, face.soft))
    ring = coverage(((reach - 0.95).abs() - 0.07) * radius, face.soft)
    shade(canvas, 1 - 0.45 * white * ring)
    shade(canvas, 1 - 0.92 * white * coverage((reach - 0.48) * radius, face.soft))
    glint = torch.hypot(aim + 0.035, y + 0.06) - 0.034
    blend(canvas, torch.ones_like(canvas[:, :, :1, :1]), white * coverage(glint, face.soft) * 0.95)


def _paint_brows(canvas: Tensor, people: People, face: Face, across: Tensor, lift: Tensor, angle: Tensor) -> None:
    thick = per_pixel(0.024 + 0.042 * people.brow_thickness)
    rise = per_pixel(0.31 + 0.09 * people.brow_height) + lift
    # `across` is negative on the inner half of the brow: a positive angle pulls that end down.
    taper = thick * (1.15 - 0.5 * ((across + 0.2) / 0.45).clamp(0, 1))
    bow = (face.y - EYE_Y + rise + angle * (across / 0.2) + 0.9 * across**2).abs() - taper
    brow = coverage(bow, face.soft) * coverage(across.abs() - 0.23, 2 * face.soft) * face.seen
    blend(canvas, face.hair * 0.70, brow * 0.95)


def paint_nose(canvas: Tensor, people: People, view: View, light: Light, skin: Tensor) -> None:
    """Paint the nose: a cone that stands out from the face, in place."""
    length = per_pixel(nose_y(people))
    ax, ay = view.place(0.0, -0.06, 1.0)
    bx, by = view.place(0.0, length, 1.20)
    away, along = segment(view.head_x, view.head_y, ax, ay, bx, by)
    radius = 0.045 + per_pixel(0.055 + 0.085 * people.nose_width) * along
    nx = (view.head_x - ax - along * (bx - ax)) / radius
    ny = (view.head_y - ay - along * (by - ay)) / radius
    bright = light.brightness(nx * 0.9, ny * 0.9, torch.sqrt((1 - 0.8 * (nx * nx + ny * ny)).clamp(min=0.02)))
    mask = coverage(away - radius, 2.5 * view.pixel) * ramp(along, 0.15, 0.75)
    blend(canvas, lit_skin(skin, 1.03 * bright), mask)
    below = coverage((away - radius).abs() - 0.012, 2.5 * view.pixel) * ramp(along, 0.55, 0.95)
    shade(canvas, 1 - 0.30 * below * (view.head_y > by - 0.02))
    holes = torch.hypot((view.head_x - bx).abs() - 0.45 * radius, view.head_y - by - 0.55 * radius) - 0.028
    shade(canvas, 1 - 0.45 * mask * coverage(holes, 2 * view.pixel))


def paint_glasses(canvas: Tensor, people: People, face: Face) -> None:
    """Paint the frame of round or square glasses and a faint shine on the lenses, in place."""
    kind = per_pixel(people.glasses)
    spacing = per_pixel(eye_x(people))
    across, y = face.x.abs() - spacing, face.y - EYE_Y - 0.01
    round_edge = torch.hypot(across, y) - 0.30
    square_edge = torch.maximum(across.abs(), y.abs() * 1.3) - 0.30
    edge = torch.where(kind == 2, square_edge, round_edge)
    bridge = torch.maximum((y + 0.04).abs() - 0.020, face.x.abs() - (spacing - 0.28))
    has = face.seen * (kind > 0)
    shine = coverage(edge, face.soft) * coverage((across - y * 0.8 - 0.10).abs() - 0.035, 2 * face.soft) * has
    blend(canvas, torch.ones_like(canvas[:, :, :1, :1]), 0.18 * shine)
    frame = coverage(torch.minimum(edge.abs() - 0.024, bridge), face.soft) * has
    blend(canvas, face.rgb(0.12, 0.10, 0.13), frame * 0.95)
