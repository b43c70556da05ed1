"""Paint scenes for batches of pictures: each has a sky or wall, a middle ground and a foreground."""

from collections.abc import Callable

import torch
from torch import Tensor

from imagine.world.contexts import Contexts
from imagine.world.paint import blend, coverage, per_pixel
from imagine.world.vocabulary import SCENES

SOFT = 0.02  # width of edges, as a share of the picture's side: backgrounds are slightly out of focus


def paint_scenes(contexts: Contexts, height: int, width: "int | None" = None) -> Tensor:
    """Return background pictures (N, 3, height, width) in 0..1; without `width` they are square."""
    device = contexts.scene.device
    width = width or height
    down = (torch.arange(height, device=device) + 0.5) / height
    across = (torch.arange(width, device=device) + 0.5 - (width - height) / 2) / height  # 0 to 1 in the middle square
    y, x = torch.meshgrid(down, across, indexing="ij")
    out = torch.empty(len(contexts), 3, height, width, device=device)
    for number, name in enumerate(SCENES):
        rows = (contexts.scene == number).nonzero().squeeze(1)
        if len(rows):
            out[rows] = _PAINTERS[name](x, y, contexts.variation[rows])
    return out


def _flat(rgb: tuple[float, float, float], like: Tensor) -> Tensor:
    return like.new_tensor(rgb).view(1, 3, 1, 1)


def _sky(y: Tensor, v: Tensor, top: tuple[float, float, float], low: tuple[float, float, float]) -> Tensor:
    share = (y / 0.7).clamp(0, 1).view(1, 1, *y.shape)
    picture = _flat(top, y) * (1 - share) + _flat(low, y) * share
    return picture.repeat(len(v), 1, 1, 1) * (0.92 + 0.12 * v[:, 0]).view(-1, 1, 1, 1)


def _disc(x: Tensor, y: Tensor, cx: Tensor, cy: "Tensor | float", radius: "Tensor | float") -> Tensor:
    return torch.sqrt((x - cx) ** 2 + (y - cy) ** 2 + 1e-9) - radius


def _beach(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    out = _sky(y, v, (0.35, 0.66, 0.95), (0.80, 0.92, 1.0))
    sea = per_pixel(0.44 + 0.08 * v[:, 1])
    blend(
        out,
        _flat((1.0, 0.93, 0.62), y),
        coverage(_disc(x, y, per_pixel(0.12 + 0.76 * v[:, 2]), per_pixel(v[:, 3] * 0.2), 0.1), SOFT),
    )
    blend(out, _flat((0.10, 0.48, 0.68), y), coverage(sea - y, SOFT))
    blend(
        out,
        _flat((0.93, 0.83, 0.60), y),
        coverage(sea + 0.18 + 0.03 * torch.sin(7 * x + 6 * per_pixel(v[:, 2])) - y, SOFT),
    )
    return out


def _forest(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    out = _sky(y, v, (0.62, 0.82, 0.70), (0.80, 0.90, 0.72))
    for layer, (rgb, width) in enumerate((((0.42, 0.60, 0.44), 9.0), ((0.20, 0.38, 0.22), 5.0))):
        phase = (x + per_pixel(v[:, 1 + layer])) * width
        blend(out, _flat(rgb, y), coverage((phase - phase.round()).abs() / width - 0.2 / width, SOFT))
    crown = 0.16 + 0.05 * torch.sin(11 * x + 6 * per_pixel(v[:, 3]))
    blend(out, _flat((0.16, 0.40, 0.18), y), coverage(y - crown, 2 * SOFT))
    blend(out, _flat((0.30, 0.42, 0.18), y), coverage(0.8 - y, 2 * SOFT))
    return out


def _city(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    out = _sky(y, v, (0.55, 0.65, 0.82), (0.92, 0.86, 0.80))
    for layer, (rgb, width, low) in enumerate((((0.60, 0.62, 0.72), 7.0, 0.28), ((0.30, 0.32, 0.42), 4.0, 0.42))):
        place = (x + per_pixel(v[:, 1 + layer])) * width
        block = place.floor()
        height = low + 0.2 * torch.sin(block * 2.7 + 9 * per_pixel(v[:, 3]))
        blend(out, _flat(rgb, y), coverage(height - y, SOFT))
        if layer == 1:
            inside = (place - block - 0.5).abs()
            rows = (y * 13) - (y * 13).floor() - 0.5
            window = (
                coverage((inside - 0.22) / width, SOFT) * coverage((rows.abs() - 0.2) / 13, SOFT) * (y > height + 0.03)
            )
            blend(out, _flat((1.0, 0.86, 0.50), y), window * 0.9)
    return out


def _mountains(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    out = _sky(y, v, (0.45, 0.62, 0.90), (0.92, 0.90, 0.92))
    for layer, (rgb, steep, low) in enumerate((((0.52, 0.56, 0.70), 0.9, 0.30), ((0.30, 0.38, 0.46), 0.7, 0.55))):
        place = (x * (1.6 + layer) + per_pixel(v[:, 1 + layer])) % 1.0
        ridge = low + steep * 0.5 * (place - 0.5).abs()
        blend(out, _flat(rgb, y), coverage(ridge - y, SOFT))
        if layer == 0:
            blend(out, _flat((0.97, 0.98, 1.0), y), coverage(ridge - y, SOFT) * coverage(y - low - 0.09, SOFT))
    blend(out, _flat((0.36, 0.54, 0.28), y), coverage(0.82 - y, SOFT))
    return out


def _room(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    warm = torch.stack((0.80 + 0.12 * v[:, 0], 0.66 + 0.16 * v[:, 1], 0.55 + 0.2 * v[:, 2]), 1)
    out = warm.view(-1, 3, 1, 1).repeat(1, 1, *y.shape)
    left = per_pixel(torch.where(v[:, 3] > 0.5, 0.72, 0.06))
    across, down = (x - left - 0.12).abs(), (y - 0.22).abs()
    blend(out, _flat((0.98, 0.97, 0.93), y), coverage(torch.maximum(across - 0.15, down - 0.18), SOFT))
    blend(out, _flat((0.60, 0.82, 0.96), y), coverage(torch.maximum(across - 0.12, down - 0.15), SOFT))
    blend(
        out,
        _flat((0.98, 0.97, 0.93), y),
        coverage(torch.minimum(across, down) - 0.012, SOFT) * coverage(torch.maximum(across - 0.13, down - 0.16), SOFT),
    )
    blend(out, _flat((0.48, 0.30, 0.18), y), coverage(0.78 - y, SOFT))
    return out


def _snow(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    out = _sky(y, v, (0.70, 0.76, 0.84), (0.88, 0.90, 0.94))
    hill = 0.55 + 0.06 * torch.sin(4 * x + 6 * per_pixel(v[:, 1]))
    for tree in range(2):
        place = (x * 3 + per_pixel(v[:, 2 + tree])) % 1.0
        top = 0.24 + 0.1 * tree
        blend(
            out,
            _flat((0.22, 0.38, 0.36), y),
            coverage(((place - 0.5).abs() - 0.42 * (y - top)) / 3, SOFT)
            * coverage(y - hill, SOFT)
            * coverage(top - y, SOFT),
        )
    blend(out, _flat((0.97, 0.98, 1.0), y), coverage(hill - y, SOFT))
    return out


def _desert(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    out = _sky(y, v, (0.98, 0.72, 0.45), (1.0, 0.90, 0.70))
    blend(out, _flat((1.0, 0.97, 0.86), y), coverage(_disc(x, y, per_pixel(0.1 + 0.8 * v[:, 1]), 0.14, 0.09), SOFT))
    far = 0.46 + 0.07 * torch.sin(3.2 * x + 6 * per_pixel(v[:, 2]))
    near = 0.68 + 0.08 * torch.sin(2.4 * x + 6 * per_pixel(v[:, 3]))
    blend(out, _flat((0.88, 0.56, 0.32), y), coverage(far - y, SOFT))
    blend(out, _flat((0.76, 0.42, 0.24), y), coverage(near - y, SOFT))
    return out


def _space(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    out = _sky(y, v, (0.05, 0.04, 0.14), (0.20, 0.10, 0.34))
    for star in range(10):
        cx, cy = (
            (per_pixel(v[:, star % 4]) * 7.3 + star * 0.37) % 1.0,
            (per_pixel(v[:, (star + 1) % 4]) * 5.1 + star * 0.61) % 1.0,
        )
        blend(out, _flat((1.0, 1.0, 0.92), y), coverage(_disc(x, y, cx, cy, 0.007), SOFT))
    px, py = per_pixel(torch.where(v[:, 1] > 0.5, 0.14, 0.86)), per_pixel(0.16 + 0.2 * v[:, 2])
    blend(out, _flat((0.86, 0.50, 0.38), y), coverage(_disc(x, y, px, py, 0.11), SOFT))
    blend(
        out,
        _flat((0.96, 0.80, 0.56), y),
        coverage(((y - py) + 0.25 * (x - px)).abs() - 0.014, SOFT) * coverage((x - px).abs() - 0.18, SOFT),
    )
    return out


_PAINTERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "beach": _beach,
    "forest": _forest,
    "city": _city,
    "mountains": _mountains,
    "room": _room,
    "snow": _snow,
    "desert": _desert,
    "space": _space,
}

assert set(_PAINTERS) == set(SCENES), "every scene has a painter"
