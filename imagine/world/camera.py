"""Compute the place, the orientation and the light of the head: the geometry that all painters share.

Lengths in a picture are shares of its height, in both directions, so that wide pictures need no special case.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from imagine.world.contexts import Contexts
from imagine.world.paint import per_pixel
from imagine.world.people import People
from imagine.world.vocabulary import LIGHTS

_HEAD_SIZE = (0.34, 0.26, 0.195)  # half the head's height as a share of the picture's height, by framing
_HEAD_PLACE = (0.54, 0.45, 0.38)  # y of the head's centre from the top, as a share of the height, by framing
_WRAP = 0.35  # how far light reaches around an edge; it keeps the dark side of a face readable
_LIGHT = {  # direction (right, down, towards the viewer), ambient, diffuse, rim, tint of the scene, tint of people
    "soft": ((-0.25, -0.5, 0.83), 0.64, 0.42, 0.0, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    "left": ((-0.90, -0.25, 0.35), 0.50, 0.58, 0.0, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    "right": ((0.90, -0.25, 0.35), 0.50, 0.58, 0.0, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    "sunset": ((0.45, -0.15, 0.88), 0.62, 0.38, 0.45, (1.08, 0.82, 0.64), (1.08, 0.94, 0.81)),
    "moonlight": ((-0.4, -0.6, 0.7), 0.60, 0.30, 0.40, (0.38, 0.48, 0.78), (0.80, 0.88, 1.03)),
}


@dataclass(frozen=True)
class Light:
    """Direction (B, 3, 1, 1); ambient, diffuse and rim strength (B, 1, 1); tints of scene and people (B, 3)."""

    direction: Tensor
    ambient: Tensor
    diffuse: Tensor
    rim: Tensor
    scene_tint: Tensor
    people_tint: Tensor

    def brightness(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Return the brightness of a surface with the normal (x, y, z), (B, H, W)."""
        d = self.direction
        facing = ((x * d[:, 0] + y * d[:, 1] + z * d[:, 2] + _WRAP) / (1 + _WRAP)).clamp(min=0)
        edge = (1 - z).clamp(min=0) ** 3 * (4 * x * d[:, 0]).clamp(0, 1)
        return self.ambient + self.diffuse * facing + self.rim * edge


@dataclass(frozen=True)
class View:
    """Pixel coordinates relative to the person of each picture, in units of half the head's height; y points down."""

    x: Tensor  # (B, H, W) from the head's centre, along the body
    y: Tensor
    head_x: Tensor  # the same, rotated with the head's roll
    head_y: Tensor
    pixel: Tensor  # (B, 1, 1) one pixel in heads
    right: Tensor  # (B, 3, 1, 1) the head's own axes in view space
    down: Tensor
    front: Tensor
    width: Tensor  # (B, 1, 1) half the head's width
    centre: Tensor  # (B, 2) the head's centre, as a share of the picture's height
    scale: Tensor  # (B,) half the head's height, as a share of the picture's height
    roll: Tensor  # (B,) rotation of the head in the picture: its own and the body's
    lean: Tensor  # (B,) rotation of the body

    def place(self, x: "Tensor | float", y: "Tensor | float", z: "Tensor | float") -> tuple[Tensor, Tensor]:
        """Project a point of the head (in head radii along the head's axes) to (head_x, head_y), each (B, 1, 1)."""
        seen = [x * self.right[:, i] + y * self.down[:, i] + z * self.front[:, i] for i in (0, 1)]
        return seen[0] * self.width, seen[1]

    def to_picture(self, head_x: Tensor, head_y: Tensor) -> Tensor:
        """Convert points (B, ...) in the head's rotated frame to shares of the picture's height, (B, ..., 2)."""
        return _rotated(head_x, head_y, self.roll, self.centre, self.scale)

    def body_to_picture(self, x: Tensor, y: Tensor) -> Tensor:
        """Convert points (B, ...) in the body's frame to shares of the picture's height, (B, ..., 2)."""
        return _rotated(x, y, self.lean, self.centre, self.scale)


def _rotated(x: Tensor, y: Tensor, angle: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    shape = [-1] + [1] * (x.dim() - 1)
    cos, sin, unit = angle.cos().view(shape), angle.sin().view(shape), scale.view(shape)
    across = centre[:, 0].view(shape) + unit * (cos * x - sin * y)
    return torch.stack((across, centre[:, 1].view(shape) + unit * (sin * x + cos * y)), -1)


@dataclass(frozen=True)
class Place:
    """Where a person stands: the head's centre (B, 2), half its height (B,) and the lean of the body (B,).

    Lengths are shares of the picture's height; angles are in radians, clockwise.
    """

    centre: Tensor
    scale: Tensor
    lean: Tensor


def portrait_place(contexts: Contexts) -> Place:
    """Return the place of the person in each portrait, in a square picture."""
    device = contexts.yaw.device
    scale = torch.tensor(_HEAD_SIZE, device=device)[contexts.framing] * contexts.zoom
    middle = torch.tensor(_HEAD_PLACE, device=device)[contexts.framing] + contexts.shift_y
    return Place(torch.stack((0.5 + contexts.shift_x, middle), 1), scale, torch.zeros_like(scale))


def view_of(
    people: People, contexts: Contexts, place: Place, height: int, width: int, unit: "int | None" = None
) -> View:
    """Return the view of each person on `height` x `width` pixels.

    `unit` is the height in pixels of the whole picture, where these pixels are a part of it.
    """
    device, unit = contexts.yaw.device, unit or height
    down_axis = (torch.arange(height, device=device) + 0.5) / unit
    across_axis = (torch.arange(width, device=device) + 0.5) / unit
    across = (across_axis.view(1, 1, -1) - per_pixel(place.centre[:, 0])) / per_pixel(place.scale)
    along = (down_axis.view(1, -1, 1) - per_pixel(place.centre[:, 1])) / per_pixel(place.scale)
    x, y = _turned(across, along, place.lean)
    roll = contexts.roll + place.lean
    right, down, front = _axes(contexts.yaw, contexts.pitch)
    return View(
        x, y, *_turned(across, along, roll), per_pixel(1.0 / (unit * place.scale)), right, down, front,
        per_pixel(0.70 + 0.16 * people.head_width), place.centre, place.scale, roll, place.lean,
    )  # fmt: skip


def _turned(across: Tensor, along: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = per_pixel(angle.cos()), per_pixel(angle.sin())
    return cos * across + sin * along, cos * along - sin * across


def light_of(contexts: Contexts) -> Light:
    """Return the light of each context, as the numbers that painters shade with."""
    rows = [_LIGHT[name] for name in LIGHTS]

    def table(index: int) -> Tensor:
        return torch.tensor([row[index] for row in rows], device=contexts.light.device)[contexts.light]

    direction = torch.nn.functional.normalize(table(0), dim=1).view(-1, 3, 1, 1)
    return Light(direction, per_pixel(table(1)), per_pixel(table(2)), per_pixel(table(3)), table(4), table(5))


def _axes(yaw: Tensor, pitch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the head's right, down and front directions in view space, each (B, 3, 1, 1)."""
    sy, cy, sp, cp = yaw.sin(), yaw.cos(), pitch.sin(), pitch.cos()
    axes = (
        torch.stack((cy, torch.zeros_like(cy), -sy), 1),
        torch.stack((-sy * sp, cp, -cy * sp), 1),
        torch.stack((sy * cp, sp, cy * cp), 1),
    )
    return tuple(axis.view(-1, 3, 1, 1) for axis in axes)  # type: ignore[return-value]
