"""The photos of a subject as training items: latents, loss weights, and words that a photo's scale asks for.

Custom Diffusion (arXiv 2212.04488) trains on photos of other scales, says so in the caption, and leaves the padding out
of the loss. SVDiff (arXiv 2303.11305, section 3.2) trains on two subjects pasted side by side (Cut-Mix).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from imagine.errors import ConfigError, PictureError
from imagine.paths import as_path, kind_of, why_no_file
from imagine.people.photos import open_photo
from train.cache.latents import box_mask
from train.methods.bases.contract import AnyBase

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".heic")
FAR, CLOSE = 0.6, 1.0  # scales below and above which the caption says so
_SCALES = (0.4, 1.4)
_FAR_WORDS, _CLOSE_WORDS = ("very small", "far away"), ("zoomed in", "close up")


@dataclass(frozen=True)
class Items:
    """Training items: latents (N, C, h, w), loss weights (N, 1, h, w), words before the caption, and subjects.

    `subject` is the index of the item's subject. In an item with two subjects it is -1, and `halves` (N, S, 1, h, w)
    says where each subject is.
    """

    latents: Tensor
    weights: Tensor
    prefixes: list[str]
    subject: list[int]
    halves: Tensor | None = None
    order: tuple[tuple[int, int], ...] = ()  # of items with two subjects: who is on the left and on the right

    def __len__(self) -> int:
        return len(self.latents)


def photo_paths(given: Sequence[str | Path]) -> list[Path]:
    """Return the photos that these files and folders name; PictureError if there are none."""
    found: list[Path] = []
    for one in given:
        path = as_path(one)
        kind = kind_of(path, PictureError)
        if kind == "folder":
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
            if not inside:
                raise PictureError(f"The folder {one} holds no pictures: name photos, or a folder with some.")
            found += inside
        elif kind == "file":
            found.append(path)
        else:
            raise PictureError(why_no_file(one, kind))
    if not found:
        raise PictureError("There are no photos: name some with --photos.")
    return found


def read_square(path: Path, side: int) -> Tensor:
    """Return the central square of a photo, scaled to `side` pixels, (3, side, side), 0 to 1."""
    image = open_photo(path)
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(square.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)


@torch.no_grad()
def read_items(base: AnyBase, subjects: Sequence[Sequence[Path]], face_weight: float) -> tuple[Items, str]:
    """Encode every photo of every subject once; return the items, and a note if faces could not be weighted."""
    pictures = [torch.stack([read_square(path, base.side) for path in photos]) for photos in subjects]
    joined = torch.cat(pictures)
    latents = base.encode(joined)
    weights, note = torch.ones_like(latents[:, :1]), ""
    if face_weight != 1:
        boxes = base.faces(joined)
        if boxes is None:
            note = f"face_weight {face_weight:g} has no effect, because {base.name} has no face detector."
        else:
            mask = box_mask(boxes, (base.side, base.side), (latents.shape[2], latents.shape[3]))
            weights = 1 + (face_weight - 1) * mask.to(weights)
    who = [number for number, photos in enumerate(subjects) for _ in photos]
    return Items(latents, weights, [""] * len(joined), who), note


@torch.no_grad()
def scaled_items(base: AnyBase, subjects: Sequence[Sequence[Path]], variants: int, seed: int) -> Items:
    """Encode `variants` versions of every photo at random scales, with the words and the valid region of each."""
    pictures, weights, prefixes, who = [], [], [], []
    cells = base.latent_shape[1:]
    dice = random.Random(seed)
    for number, photos in enumerate(subjects):
        for path in photos:
            square = read_square(path, base.side)
            for _ in range(variants):
                scale = dice.uniform(*_SCALES)
                picture, valid = _scaled(square, scale, dice)
                words = _FAR_WORDS if scale < FAR else _CLOSE_WORDS if scale > CLOSE else ("",)
                pictures.append(picture)
                weights.append(F.interpolate(valid[None], size=cells, mode="area")[0].round())
                prefixes.append(dice.choice(words))
                who.append(number)
    latents = base.encode(torch.stack(pictures))
    return Items(latents, torch.stack(weights).to(latents), prefixes, who)


def _scaled(square: Tensor, scale: float, dice: random.Random) -> tuple[Tensor, Tensor]:
    """Return the picture at another scale, on grey or cut to the same size, and where it is valid (1, S, S)."""
    side = square.shape[-1]
    wanted = max(8, round(side * scale))
    resized = F.interpolate(square[None], size=(wanted, wanted), mode="bilinear", antialias=True)[0].clamp(0, 1)
    if wanted >= side:
        top, left = (dice.randint(0, wanted - side) for _ in range(2))
        return resized[:, top : top + side, left : left + side], torch.ones(1, side, side)
    top, left = (dice.randint(0, side - wanted) for _ in range(2))
    canvas, valid = torch.full_like(square, 0.5), torch.zeros(1, side, side)
    canvas[:, top : top + wanted, left : left + wanted] = resized
    valid[:, top : top + wanted, left : left + wanted] = 1
    return canvas, valid


@torch.no_grad()
def cut_mix_items(base: AnyBase, subjects: Sequence[Sequence[Path]], count: int, seed: int) -> Items:
    """Encode `count` pictures of two subjects side by side; ConfigError unless there are two subjects."""
    if len(subjects) != 2:
        raise ConfigError(f"Cut-Mix needs two subjects, and there are {len(subjects)}: give --photos twice.")
    dice, side = random.Random(seed), base.side
    half = side // 2
    squares = [[read_square(path, side) for path in photos] for photos in subjects]
    pictures, orders = [], []
    for number in range(count):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        strips = [dice.choice(squares[who])[:, :, side // 4 : side // 4 + half] for who in order]
        pictures.append(torch.cat(strips, 2))
        orders.append(order)
    latents = base.encode(torch.stack(pictures))
    halves = torch.zeros(count, 2, 1, *latents.shape[2:])
    middle = latents.shape[3] // 2
    for number, (left, right) in enumerate(orders):
        halves[number, left, :, :, :middle] = 1
        halves[number, right, :, :, middle:] = 1
    return Items(latents, torch.ones_like(latents[:, :1]), [""] * count, [-1] * count, halves, tuple(orders))
