"""Render pictures with exact ground truth from people and contexts.

A picture is painted in this order: the scene, the person from back to front, light on the whole picture, the style. All
code works on batches of tensors without branches that depend on pixels, so it runs on a GPU as on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from imagine.world.body import paint_body, paint_held, paint_letters
from imagine.world.camera import Light, View, light_of, view_of
from imagine.world.contexts import Contexts
from imagine.world.hair import paint_back_hair, paint_hair, paint_headwear
from imagine.world.head import paint_head
from imagine.world.people import People
from imagine.world.scenes import paint_scenes
from imagine.world.styles import apply_styles
from imagine.world.vocabulary import LIGHTS

_CHUNK = 16  # pictures per batch: small enough for the CPU's caches
_GROUP_PLACES = {1: ((0.5, 0.42),), 2: ((0.29, 0.46), (0.71, 0.46)), 3: ((0.2, 0.5), (0.5, 0.42), (0.8, 0.5))}
_GROUP_SHRINK = {1: 1.0, 2: 0.74, 3: 0.58}


Painter = Callable[[Tensor, People, View, Light], Tensor]


@dataclass(frozen=True)
class Painters:
    """The four most expensive painters; `compiled_painters` returns them compiled, for long jobs."""

    back_hair: Painter = paint_back_hair
    body: Callable[[Tensor, People, Contexts, View, Light], Tensor] = paint_body
    head: Callable[[Tensor, People, Contexts, View, Light], Tensor] = paint_head
    hair: Painter = paint_hair


@lru_cache(maxsize=1)
def compiled_painters() -> Painters:
    """Return compiled painters: about twice as fast after a minute of compilation, and equal up to rounding (1e-5)."""
    plain = Painters()
    return Painters(
        *(torch.compile(paint, dynamic=False) for paint in (plain.back_hair, plain.body, plain.head, plain.hair))
    )


@dataclass(frozen=True)
class Renders:
    """Pictures (N, 3, S, S) in 0..1 and their ground truth.

    `masks` (N, S, S) cover the people. `boxes` (N, P, 4) are left, top, width and height of each face in pixels (brow
    to chin, ear to ear). `landmarks` (N, P, 5, 2) are the eyes (the one at the left of the picture first), the tip of
    the nose and the corners of the mouth. Single portraits have no axis P.
    """

    images: Tensor
    masks: Tensor
    boxes: Tensor
    landmarks: Tensor


def render(people: People, contexts: Contexts, size: int = 128, painters: Painters | None = None) -> Renders:
    """Render one portrait per row: `people[i]` in `contexts[i]`. Raises ValueError if their numbers differ."""
    if len(people) != len(contexts):
        raise ValueError(f"{len(people)} people do not match {len(contexts)} contexts: give one context per person.")
    group = render_groups(people, contexts, people_per_picture=1, size=size, painters=painters)
    return Renders(group.images, group.masks, group.boxes[:, 0], group.landmarks[:, 0])


def render_groups(
    people: People, contexts: Contexts, people_per_picture: int, size: int = 128, painters: Painters | None = None
) -> Renders:
    """Render pictures of one to three people: picture i shows the rows i*P to i*P+P-1, from left to right.

    Scene, light and style come from the first context of each group, and all else from the context of each person.
    """
    if people_per_picture not in _GROUP_PLACES:
        raise ValueError(f"{people_per_picture} people do not fit into a picture: choose 1, 2 or 3.")
    step = max(1, _CHUNK // people_per_picture) * people_per_picture
    parts = [
        _render(people[i : i + step], contexts[i : i + step], people_per_picture, size, painters or Painters())
        for i in range(0, len(people), step)
    ]
    return Renders(*(torch.cat([getattr(part, name) for part in parts]) for name in Renders.__dataclass_fields__))


@torch.no_grad()
def _render(people: People, contexts: Contexts, count: int, size: int, painters: Painters) -> Renders:
    first = contexts[::count]
    canvas = paint_scenes(first, size)
    mask = torch.zeros(len(first), size, size, device=canvas.device)
    boxes, landmarks = [], []
    for slot in range(count):
        group_people, group_contexts = people[slot::count], contexts[slot::count]
        group_contexts = group_contexts.replace(light=first.light)
        centre = None
        if count > 1:
            centre = canvas.new_tensor(_GROUP_PLACES[count][slot]).expand(len(group_people), 2)
            group_contexts = group_contexts.replace(framing=1)
        view = view_of(group_people, group_contexts, size, centre, _GROUP_SHRINK[count])
        mask = torch.maximum(mask, _paint_person(canvas, group_people, group_contexts, view, painters))
        box, points = _geometry(group_people, view, size)
        boxes.append(box)
        landmarks.append(points)
    canvas = apply_styles(_light_scene(canvas, first), first.style)
    return Renders(canvas, mask, torch.stack(boxes, 1), torch.stack(landmarks, 1))


def _paint_person(canvas: Tensor, people: People, contexts: Contexts, view: View, painters: Painters) -> Tensor:
    light = light_of(contexts)
    layers = [
        painters.back_hair(canvas, people, view, light),
        painters.body(canvas, people, contexts, view, light),
    ]
    paint_letters(canvas, contexts, view)
    layers += [
        painters.head(canvas, people, contexts, view, light),
        painters.hair(canvas, people, view, light),
        paint_headwear(canvas, people, contexts, view, light),
        paint_held(canvas, people, contexts, view, light),
    ]
    return torch.stack(layers).amax(0)


def _light_scene(canvas: Tensor, contexts: Contexts) -> Tensor:
    """Tint the picture, and make light from one side decrease across it."""
    light = light_of(contexts)
    size = canvas.shape[-1]
    across = (torch.arange(size, device=canvas.device) + 0.5) / size * 2 - 1
    side = (contexts.light == LIGHTS.index("right")).float() - (contexts.light == LIGHTS.index("left")).float()
    fall = 1 + 0.28 * side.view(-1, 1, 1, 1) * across.view(1, 1, 1, -1)
    return (canvas * light.tint.view(-1, 3, 1, 1) * fall).clamp_(0, 1)


def _geometry(people: People, view: View, size: int) -> tuple[Tensor, Tensor]:
    """Return face boxes (B, 4) and landmarks (B, 5, 2), in pixels."""
    eye = 0.33 + 0.12 * people.eye_spacing.view(-1, 1, 1)
    mouth = 0.23 + 0.13 * people.mouth_width.view(-1, 1, 1)
    nose = 0.17 + 0.17 * people.nose_length.view(-1, 1, 1)
    points = [
        view.place(-eye, -0.08, 0.9), view.place(eye, -0.08, 0.9), view.place(0.0, nose, 1.22),
        view.place(-mouth, 0.48, 0.85), view.place(mouth, 0.48, 0.85),
    ]  # fmt: skip
    head_x = torch.stack([x for x, _ in points], 1).flatten(1)
    head_y = torch.stack([y for _, y in points], 1).flatten(1)
    landmarks = view.to_picture(head_x, head_y) * size
    middle = view.to_picture(torch.zeros_like(view.scale), torch.full_like(view.scale, 0.2))
    width = 2 * view.width.flatten() * view.scale
    height = 1.6 * view.scale
    corner = middle - torch.stack((width, height), 1) / 2
    return torch.cat((corner, torch.stack((width, height), 1)), 1) * size, landmarks
