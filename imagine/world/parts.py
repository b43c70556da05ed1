"""Masks of the parts of a portrait: what is seen of the head, the hair and so on, and where eyes and words are.

They are the targets of an auxiliary loss of training (`train.tasks.part_loss`). The coverage of head, hair, headwear
and body is the painters' own, so a mask agrees with the picture. Eyes, nose and mouth are round marks at the landmarks.
A mask does not depend on the style and is smooth, so it can be painted smaller than its picture.
"""

import torch
from torch import Tensor

from imagine.world.body import letter_boxes, paint_body, paint_held
from imagine.world.camera import View, light_of, portrait_place, view_of
from imagine.world.contexts import Contexts
from imagine.world.hair import paint_back_hair, paint_hair
from imagine.world.head import paint_head
from imagine.world.headwear import paint_headwear
from imagine.world.paint import coverage, segment
from imagine.world.people import People
from imagine.world.render import face_geometry

PARTS = ("head", "hair", "body", "headwear", "eyes", "nose", "mouth", "word")
_PAINTED = len(("head", "hair", "body", "headwear"))  # the first parts; the others are marks on top of them
_EYE, _NOSE, _MOUTH = 0.15, 0.12, 0.10  # radius of a mark, in heads
_CHUNK = 32  # portraits painted at a time


@torch.no_grad()
def part_masks(people: People, contexts: Contexts, size: int = 128) -> Tensor:
    """Return (N, len(PARTS), size, size) in 0..1: what is seen of each part in the portraits of `render`.

    Where the mark of an eye, the nose or the mouth is, the head is there too; a word is on the body.
    """
    rows = torch.arange(len(people)).split(_CHUNK)
    parts = [_masks(people[some], contexts[some], size) for some in rows if len(some)]
    return torch.cat(parts) if parts else torch.zeros(0, len(PARTS), size, size)


def _masks(people: People, contexts: Contexts, size: int) -> Tensor:
    view = view_of(people, contexts, portrait_place(contexts), size, size)
    seen = _painted(people, contexts, view, size)
    _, landmarks = face_geometry(people, view, size)
    heads = (view.scale * size).view(-1, 1, 1)
    marks = _marks(landmarks, heads, size) * seen[:, :1]
    word = _box(letter_boxes(contexts, size), size) * seen[:, 2]
    return torch.cat((seen, marks, word[:, None]), 1)


def _painted(people: People, contexts: Contexts, view: View, size: int) -> Tensor:
    """Return what is seen of head, hair, body and headwear, (B, 4, size, size), painted from back to front."""
    canvas, light = torch.zeros(len(people), 3, size, size), light_of(contexts)
    seen = torch.zeros(len(people), _PAINTED, size, size)
    layers = (
        (paint_back_hair, "hair"), (paint_body, "body"), (paint_head, "head"), (paint_hair, "hair"),
        (paint_headwear, "headwear"), (paint_held, ""),
    )  # fmt: skip
    for paint, part in layers:
        painted = paint(canvas, people, contexts, view, light)
        seen.mul_(1 - painted.unsqueeze(1))
        if part:
            here = PARTS.index(part)
            seen[:, here] = torch.maximum(seen[:, here], painted)
    return seen


def _marks(landmarks: Tensor, heads: Tensor, size: int) -> Tensor:
    """Return the marks of eyes, nose and mouth, (B, 3, size, size); landmarks (B, 5, 2) in pixels."""
    axis = torch.arange(size) + 0.5
    x, y = axis.view(1, 1, -1), axis.view(1, -1, 1)
    points = [(landmarks[:, i, 0].view(-1, 1, 1), landmarks[:, i, 1].view(-1, 1, 1)) for i in range(5)]

    def mark(one: int, other: int, radius: float) -> Tensor:
        return coverage(segment(x, y, *points[one], *points[other])[0] - radius * heads, 1.0)

    eyes = torch.maximum(mark(0, 0, _EYE), mark(1, 1, _EYE))
    return torch.stack((eyes, mark(2, 2, _NOSE), mark(3, 4, _MOUTH)), 1)


def _box(boxes: Tensor, size: int) -> Tensor:
    """Return the coverage of boxes (B, 4) in pixels, (B, size, size); 0 for a box of width 0."""
    edges = torch.arange(size).float()

    def covered(start: Tensor, length: Tensor) -> Tensor:
        return (torch.minimum(edges + 1, start + length) - torch.maximum(edges, start)).clamp(0, 1)

    across, down = covered(boxes[:, :1], boxes[:, 2:3]), covered(boxes[:, 1:2], boxes[:, 3:])
    return down.unsqueeze(2) * across.unsqueeze(1) * (boxes[:, 2] > 0).view(-1, 1, 1)
