"""Render pictures with exact ground truth from people and contexts.

A picture is painted in this order: the scene and its light, the people from back to front, the style. All code works
on batches of tensors without branches that depend on pixels, so it runs on a GPU as on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from imagine.world.arms import paint_hands, paint_sleeves
from imagine.world.body import paint_body, paint_held, paint_letters
from imagine.world.camera import Light, Place, View, light_of, portrait_place, view_of
from imagine.world.contexts import Contexts
from imagine.world.face import EYE_Y, eye_x, mouth_half_width, nose_y
from imagine.world.groups import Groups, canvas_shape, group_contexts, sample_groups
from imagine.world.hair import paint_back_hair, paint_hair
from imagine.world.head import paint_head
from imagine.world.headwear import paint_headwear
from imagine.world.paint import per_pixel
from imagine.world.people import People
from imagine.world.scenes import paint_scenes
from imagine.world.styles import apply_styles
from imagine.world.vocabulary import FRAMINGS, LIGHTS

_CHUNK = 16  # pictures per batch: small enough for the CPU's caches
_HEAD_REACH = 1.22  # how far a head with its ears reaches from its centre, in heads
_BRIGHT = 0.85  # brightness above this is compressed, so that light never bleaches a colour


class _Shape(NamedTuple):
    """Height and width of a picture, and the height of a portrait at the same scale, in pixels."""

    height: int
    width: int
    side: int


Painter = Callable[[Tensor, People, Contexts, View, Light], Tensor]


@dataclass(frozen=True)
class Painters:
    """The four most expensive painters; `compiled_painters` returns them compiled, for long jobs.

    With `full_batches` every batch has the same size, because a compiled painter is compiled again for each new one.
    """

    back_hair: Painter = paint_back_hair
    body: Painter = paint_body
    head: Painter = paint_head
    hair: Painter = paint_hair
    full_batches: bool = False


@lru_cache(maxsize=1)
def compiled_painters() -> Painters:
    """Return compiled painters: about twice as fast after a minute of compilation, and equal up to rounding (1e-5)."""
    plain = Painters()
    back_hair, body, head, hair = (
        torch.compile(paint, dynamic=False) for paint in (plain.back_hair, plain.body, plain.head, plain.hair)
    )
    return Painters(back_hair, body, head, hair, full_batches=True)


@dataclass(frozen=True)
class Renders:
    """Pictures (N, 3, H, W) in 0..1 and their ground truth.

    `masks` (N, P, H, W) cover what is seen of each person. `boxes` (N, P, 4) are left, top, width and height of each
    face in pixels (brow to chin, ear to ear). `landmarks` (N, P, 5, 2) are the eyes (the one at the left of the picture
    first), the tip of the nose and the corners of the mouth. Single portraits have no axis P.
    """

    images: Tensor
    masks: Tensor
    boxes: Tensor
    landmarks: Tensor


def render(people: People, contexts: Contexts, size: int = 128, painters: Painters | None = None) -> Renders:
    """Render one portrait per row: `people[i]` in `contexts[i]`. Raises ValueError if their numbers differ."""
    if len(people) != len(contexts):
        raise ValueError(f"{len(people)} people do not match {len(contexts)} contexts: give one context per person.")
    painters, shape = painters or Painters(), _Shape(size, size, size)
    # Heads of one framing have one size, so that the part of the picture around them has one size as well.
    batches = [
        rows
        for framing in range(len(FRAMINGS))
        for rows in (contexts.framing == framing).nonzero().squeeze(1).split(_CHUNK)
        if len(rows)
    ]
    parts = []
    for rows in batches:
        full = _filled(rows, _CHUNK) if painters.full_batches else rows
        chosen = contexts[full]
        part = _render(people[full], chosen, [portrait_place(chosen)], None, shape, painters)
        parts.append(_first(part, len(rows)))
    out = _joined(parts)
    back = torch.cat(batches).argsort() if batches else torch.zeros(0, dtype=torch.long)
    return Renders(out.images[back], out.masks[back, 0], out.boxes[back, 0], out.landmarks[back, 0])


def _filled(rows: Tensor, count: int) -> Tensor:
    """Return `count` rows: repeat the last one to make up a full batch."""
    return torch.cat((rows, rows[-1:].repeat(count - len(rows))))


def _first(part: Renders, count: int) -> Renders:
    return Renders(*(getattr(part, name)[:count] for name in Renders.__dataclass_fields__))


def render_groups(
    people: People,
    contexts: Contexts,
    people_per_picture: int,
    size: int = 128,
    painters: Painters | None = None,
    groups: "Groups | None" = None,
    width: "int | None" = None,
) -> Renders:
    """Render pictures of one to four people: picture i shows the rows i*P to i*P+P-1, from left to right.

    Scene, light and style come from the first context of each group, and all else from the context of each person.
    Portraits are `size` pixels high; pictures of more people are wider (`canvas_shape`), or `size` x `width` pixels
    where `width` is given. `groups` arranges the people; without it they are arranged by the scene's variation.
    """
    height, usual_width = canvas_shape(people_per_picture, size)
    shape = _Shape(height, usual_width, size) if width is None else _Shape(size, width, size)
    groups = groups or _arranged(contexts[::people_per_picture], people_per_picture, shape.width / shape.height)
    contexts = group_contexts(contexts, groups)
    painters, step = painters or Painters(), max(1, _CHUNK // people_per_picture)
    slots = torch.arange(people_per_picture)
    parts = []
    for pictures in torch.arange(len(groups)).split(step):
        full = _filled(pictures, step) if painters.full_batches else pictures
        some = groups[full]
        rows = (full.unsqueeze(1) * people_per_picture + slots).flatten()
        places = [Place(some.centre[:, p], some.scale[:, p], some.lean[:, p]) for p in range(people_per_picture)]
        part = _render(people[rows], contexts[rows], places, some, shape, painters)
        parts.append(_first(part, len(pictures)))
    return _joined(parts)


def _arranged(first: Contexts, count: int, aspect: float) -> Groups:
    seeds = (first.variation[:, 0].double() * 2**31).long().tolist()
    return sample_groups(seeds, count, aspect)


def _joined(parts: list[Renders]) -> Renders:
    return Renders(*(torch.cat([getattr(part, name) for part in parts]) for name in Renders.__dataclass_fields__))


@torch.no_grad()
def _render(
    people: People,
    contexts: Contexts,
    places: list[Place],
    groups: "Groups | None",
    shape: _Shape,
    painters: Painters,
) -> Renders:
    """Render a batch of pictures with one place per person; `groups` is None for portraits."""
    count = len(places)
    first = contexts[::count]
    canvas = _light_scene(paint_scenes(first, shape.height, shape.width), first)
    masks = canvas.new_zeros(len(first), count, shape.height, shape.width)
    rows = torch.arange(len(first))
    order = torch.zeros(len(first), 1, dtype=torch.long) if groups is None else groups.order
    views = [
        view_of(people[slot::count], contexts[slot::count], place, shape.height, shape.width)
        for slot, place in enumerate(places)
    ]
    for layer in range(count):
        who = order[:, layer]
        chosen = rows * count + who
        view = _chosen_view(views, who)
        if groups is not None:
            sleeve = paint_sleeves(canvas, people[chosen], contexts[chosen], groups, who, light_of(contexts[chosen]))
            _cover(masks, rows, who, sleeve)
        _cover(masks, rows, who, _paint_person(canvas, people[chosen], contexts[chosen], view, shape, painters))
    if groups is not None:
        for slot, hand in enumerate(paint_hands(canvas, people, groups)):
            _cover(masks, rows, torch.full_like(rows, slot), hand)
    canvas = apply_styles(_light_people(canvas, masks.sum(1).clamp(max=1), first), first.style, shape.side)
    geometry = [face_geometry(people[slot::count], view, shape.height) for slot, view in enumerate(views)]
    return Renders(canvas, masks, torch.stack([g[0] for g in geometry], 1), torch.stack([g[1] for g in geometry], 1))


def _chosen_view(views: list[View], who: Tensor) -> View:
    """Return, for each picture, the view of the person `who` (B,)."""
    if len(views) == 1:
        return views[0]
    rows = torch.arange(len(who))
    return View(*(torch.stack([getattr(v, n) for v in views], 1)[rows, who] for n in View.__dataclass_fields__))


def _cover(masks: Tensor, rows: Tensor, who: Tensor, painted: Tensor) -> None:
    """Add what was painted of person `who` to the masks, and remove what it covers of the others, in place."""
    masks.mul_(1 - painted.unsqueeze(1))
    masks[rows, who] = torch.maximum(masks[rows, who], painted)


def _paint_person(
    canvas: Tensor, people: People, contexts: Contexts, view: View, shape: _Shape, painters: Painters
) -> Tensor:
    light = light_of(contexts)
    layers = [
        painters.back_hair(canvas, people, contexts, view, light),
        painters.body(canvas, people, contexts, view, light),
    ]
    paint_letters(canvas, contexts, view)
    layers += [
        _paint_head_part(canvas, people, contexts, view, shape, painters.head),
        painters.hair(canvas, people, contexts, view, light),
        paint_headwear(canvas, people, contexts, view, light),
        paint_held(canvas, people, contexts, view, light),
    ]
    return torch.stack(layers).amax(0)


def _paint_head_part(
    canvas: Tensor, people: People, contexts: Contexts, view: View, shape: _Shape, painter: Painter
) -> Tensor:
    """Paint heads on the part of the picture around them, in place; return their coverage (B, H, W).

    The head is the most expensive thing to paint, and covers a quarter of most pictures.
    """
    reach = _HEAD_REACH * float(view.scale.max()) * shape.height
    size = min(-(-int(2 * reach) // 16) * 16, shape.height)
    corner = (view.centre * shape.height - size / 2).round().long()
    left = corner[:, 0].clamp(0, shape.width - size).tolist()
    top = corner[:, 1].clamp(0, shape.height - size).tolist()
    parts = [(i, slice(y, y + size), slice(x, x + size)) for i, (x, y) in enumerate(zip(left, top, strict=True))]
    part = torch.stack([canvas[i, :, rows, columns] for i, rows, columns in parts])
    moved = view.centre - torch.tensor([left, top], device=canvas.device).T / shape.height
    near = view_of(people, contexts, Place(moved, view.scale, view.lean), size, size, shape.height)
    painted = painter(part, people, contexts, near, light_of(contexts))
    full = canvas.new_zeros(len(canvas), shape.height, shape.width)
    for (i, rows, columns), piece, mask in zip(parts, part, painted, strict=True):
        canvas[i, :, rows, columns] = piece
        full[i, rows, columns] = mask
    return full


def _light_scene(canvas: Tensor, contexts: Contexts) -> Tensor:
    """Tint the scene, and make light from one side decrease across it."""
    light = light_of(contexts)
    width = canvas.shape[-1]
    across = (torch.arange(width, device=canvas.device) + 0.5) / width * 2 - 1
    side = (contexts.light == LIGHTS.index("right")).float() - (contexts.light == LIGHTS.index("left")).float()
    fall = 1 + 0.22 * side.view(-1, 1, 1, 1) * across.view(1, 1, 1, -1)
    night = 0.55 * (contexts.light == LIGHTS.index("moonlight")).float().view(-1, 1, 1, 1)
    grey = canvas.mean(1, keepdim=True)
    return (canvas + night * (grey - canvas)) * light.scene_tint.view(-1, 3, 1, 1) * fall


def _light_people(canvas: Tensor, mask: Tensor, contexts: Contexts) -> Tensor:
    """Tint people less than the scene, so that skin and hair keep their colour; compress what is too bright."""
    tint = light_of(contexts).people_tint.view(-1, 3, 1, 1)
    lit = canvas * (1 + (tint - 1) * mask.unsqueeze(1))
    return (lit - 0.55 * (lit - _BRIGHT).clamp(min=0)).clamp(0, 1)


def face_geometry(people: People, view: View, height: int) -> tuple[Tensor, Tensor]:
    """Return face boxes (B, 4) and landmarks (B, 5, 2), in pixels."""
    eye, mouth, nose = per_pixel(eye_x(people)), per_pixel(0.92 * mouth_half_width(people)), per_pixel(nose_y(people))
    points = [
        view.place(-eye, EYE_Y, 0.9), view.place(eye, EYE_Y, 0.9), view.place(0.0, nose, 1.20),
        view.place(-mouth, 0.50, 0.85), view.place(mouth, 0.50, 0.85),
    ]  # fmt: skip
    head_x = torch.stack([x for x, _ in points], 1).flatten(1)
    head_y = torch.stack([y for _, y in points], 1).flatten(1)
    landmarks = view.to_picture(head_x, head_y) * height
    middle = view.to_picture(torch.zeros_like(view.scale), torch.full_like(view.scale, 0.2))
    box_width = 2 * view.width.flatten() * view.scale
    box_height = 1.6 * view.scale
    corner = middle - torch.stack((box_width, box_height), 1) / 2
    return torch.cat((corner, torch.stack((box_width, box_height), 1)), 1) * height, landmarks
