"""Compute the place, the orientation and the light of the head: the geometry that all painters share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from imagine.world.contexts import Contexts
from imagine.world.paint import per_pixel
from imagine.world.people import People
from imagine.world.vocabulary import LIGHTS

_HEAD_SIZE = (0.34, 0.26, 0.195)  # half the head's height as a share of the picture's side, by framing
_HEAD_PLACE = (0.52, 0.43, 0.36)  # y of the head's centre from the top, as a share of the side, by framing
_LIGHT = {  # direction (right, down, towards the viewer), ambient, diffuse, tint
    "soft": ((0.0, -0.5, 0.85), 0.66, 0.42, (1.0, 1.0, 1.0)),
    "left": ((-0.88, -0.25, 0.40), 0.46, 0.72, (1.0, 1.0, 1.0)),
    "right": ((0.88, -0.25, 0.40), 0.46, 0.72, (1.0, 1.0, 1.0)),
    "sunset": ((0.3, -0.2, 0.9), 0.62, 0.42, (1.16, 0.84, 0.62)),
    "moonlight": ((-0.3, -0.6, 0.7), 0.52, 0.40, (0.58, 0.72, 1.08)),
}


@dataclass(frozen=True)
class Light:
    """Direction (B, 3, 1, 1), ambient and diffuse strength (B, 1, 1), tint (B, 3)."""

    direction: Tensor
    ambient: Tensor
    diffuse: Tensor
    tint: Tensor

    def brightness(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Return the brightness of a surface with the normal (x, y, z), (B, H, W)."""
        d = self.direction
        return self.ambient + self.diffuse * (x * d[:, 0] + y * d[:, 1] + z * d[:, 2]).clamp(min=0)


@dataclass(frozen=True)
class View:
    """Pixel coordinates relative to the person of each picture, in units of half the head's height; y points down."""

    x: Tensor  # (B, H, W) from the head's centre, upright
    y: Tensor
    head_x: Tensor  # the same, rotated with the head's roll
    head_y: Tensor
    pixel: Tensor  # (B, 1, 1) one pixel in heads
    right: Tensor  # (B, 3, 1, 1) the head's own axes in view space
    down: Tensor
    front: Tensor
    width: Tensor  # (B, 1, 1) half the head's width
    centre: Tensor  # (B, 2) the head's centre, as a share of the picture's side
    scale: Tensor  # (B,) half the head's height, as a share of the picture's side
    roll: Tensor  # (B,)

    def place(self, x: "Tensor | float", y: "Tensor | float", z: "Tensor | float") -> tuple[Tensor, Tensor]:
        """Project a point of the head (in head radii along the head's axes) to (head_x, head_y), each (B, 1, 1)."""
        seen = [x * self.right[:, i] + y * self.down[:, i] + z * self.front[:, i] for i in (0, 1)]
        return seen[0] * self.width, seen[1]

    def to_picture(self, head_x: Tensor, head_y: Tensor) -> Tensor:
        """Convert points (B, ...) in the head's rotated frame to shares of the picture's side, (B, ..., 2)."""
        shape = [-1] + [1] * (head_x.dim() - 1)
        cos, sin = self.roll.cos().view(shape), self.roll.sin().view(shape)
        scale = self.scale.view(shape)
        x = self.centre[:, 0].view(shape) + scale * (cos * head_x - sin * head_y)
        y = self.centre[:, 1].view(shape) + scale * (sin * head_x + cos * head_y)
        return torch.stack((x, y), -1)


def view_of(people: People, contexts: Contexts, size: int, centre: "Tensor | None", shrink: float) -> View:
    """Return the view of each person; in groups `centre` (B, 2) replaces the framing's place and `shrink` scales it."""
    device = contexts.yaw.device
    usual, scale = head_place(contexts)
    centre, scale = usual if centre is None else centre, scale * shrink
    axis = (torch.arange(size, device=device) + 0.5) / size
    x = ((axis.view(1, 1, -1) - per_pixel(centre[:, 0])) / per_pixel(scale)).expand(-1, size, -1)
    y = ((axis.view(1, -1, 1) - per_pixel(centre[:, 1])) / per_pixel(scale)).expand(-1, -1, size)
    cos, sin = per_pixel(contexts.roll.cos()), per_pixel(contexts.roll.sin())
    right, down, front = _axes(contexts.yaw, contexts.pitch)
    return View(
        x, y, cos * x + sin * y, cos * y - sin * x, per_pixel(1.0 / (size * scale)), right, down, front,
        per_pixel(0.70 + 0.16 * people.head_width), centre, scale, contexts.roll,
    )  # fmt: skip


def head_place(contexts: Contexts) -> tuple[Tensor, Tensor]:
    """Return the centre (B, 2) and half the height (B,) of a portrait's head, as shares of the picture's side."""
    device = contexts.yaw.device
    scale = torch.tensor(_HEAD_SIZE, device=device)[contexts.framing] * contexts.zoom
    middle = torch.tensor(_HEAD_PLACE, device=device)[contexts.framing] + contexts.shift_y
    return torch.stack((0.5 + contexts.shift_x, middle), 1), scale


def light_of(contexts: Contexts) -> Light:
    """Return the light of each context, as the numbers that painters shade with."""
    rows = [_LIGHT[name] for name in LIGHTS]

    def table(index: int) -> Tensor:
        return torch.tensor([row[index] for row in rows], device=contexts.light.device)[contexts.light]

    direction = torch.nn.functional.normalize(table(0), dim=1).view(-1, 3, 1, 1)
    return Light(direction, per_pixel(table(1)), per_pixel(table(2)), table(3))


def _axes(yaw: Tensor, pitch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the head's right, down and front directions in view space, each (B, 3, 1, 1)."""
    sy, cy, sp, cp = yaw.sin(), yaw.cos(), pitch.sin(), pitch.cos()
    axes = (
        torch.stack((cy, torch.zeros_like(cy), -sy), 1),
        torch.stack((-sy * sp, cp, -cy * sp), 1),
        torch.stack((sy * cp, sp, cy * cp), 1),
    )
    return tuple(axis.view(-1, 3, 1, 1) for axis in axes)  # type: ignore[return-value]
