"""Draw contact sheets with scores under the pictures, and name metrics and rows for people who read reports."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

MARGIN = 10
TITLES = {
    "prompt": "Prompt: share of the requested attributes that were found",
    "sim_gt": "SimGT: similarity to another picture of the person",
    "sim_ref": "SimRef: similarity to the reference",
    "rank1": "Rank-1 among the people in the gallery",
    "copy_paste": "Copy-paste (0: none, 1: a copy of the reference)",
    "letters": "Letters: share of the requested letters that were read in full",
    "leakage": "Leakage: share of the reference's attributes that appear where the prompt asks for others",
    "sim_gt_second": "SimGT by the second recogniser, of another architecture and trained on other people",
    "rank1_second": "Rank-1 by the second recogniser",
    "sim_gt_traits": "SimGT by the traits of the person that the reader sees",
    "rank1_traits": "Rank-1 by the traits of the person that the reader sees",
    "frechet": "Frechet distance to real pictures, in the recogniser's features",
    "kernel": "Kernel distance to real pictures, in the recogniser's features",
    "diversity": "Diversity of pictures that differ in their seed only",
    "disturbance": "Disturbance: how much a reference changes what the base draws",
    "clip_t": "CLIP-T: similarity of picture and prompt",
    "clip_i": "CLIP-I: similarity to the photos of the subject, by CLIP",
    "dino": "DINO: similarity to the photos of the subject, by DINO",
    "missing": "Missing: share of people without a face in their place",
    "kept": "Kept: share of people whose face is their own",
    "drift": "Drift: share of people who became nobody of the group",
    "swap": "Swap: share of people who exchanged faces",
    "dominance": "Dominance: share of people who became somebody who is also elsewhere",
    "blending": "Blending: share of people who took on somebody else's features beside their own",
    "present": "Present: share of people who are in their picture",
    "doubled": "Doubled: share of pictures that show one person twice",
    "assigned": "Assigned: share of pictures with everyone, in the requested places",
    "attributes": "Attributes: share of what is asked of each person that was found",
    "exchanged": "Exchanged: share of pairs that change places when their references do",
}
ROW_TITLES = {
    "full": "pipeline",
    "detached": "adapter detached",
    "ceiling": "real renders (ceiling)",
    "other": "real renders of other people",
    "copy": "the reference itself",
}


@dataclass(frozen=True)
class Cell:
    """One picture of a contact sheet and the short lines under it, each good (True), bad (False) or neutral (None)."""

    image: Image.Image
    notes: Sequence[tuple[str, bool | None]] = ()


def to_pil(picture: Tensor) -> Image.Image:
    """Convert (3, H, W) in 0..1 to an RGB picture."""
    values = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(values))


def to_tensor(image: Image.Image) -> Tensor:
    """Convert a picture to (3, H, W) in 0..1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def contact_sheet(
    headers: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    side: int = 128,
    title: str = "",
    height: int | None = None,
) -> Image.Image:
    """Draw rows of pictures under wrapped headers, with one column per header.

    Each picture is scaled to fit into `side` x `height` px; without `height`, into a square.
    """
    height = height or side
    font, bold = ImageFont.load_default(size=11), ImageFont.load_default(size=16)
    wrapped = [_wrap(header, font, side) for header in headers]
    title_height = 30 if title else 0
    top = MARGIN + title_height + 14 * max(map(len, wrapped)) + 6
    notes = max((len(cell.notes) for row in rows for cell in row), default=0)
    step = height + 14 * notes + MARGIN
    sheet = Image.new("RGB", (MARGIN + (side + MARGIN) * len(headers), top + step * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, fill="black", font=bold)
    for column, lines in enumerate(wrapped):
        for number, line in enumerate(lines):  # bottom-aligned, so that a short header is next to its picture
            y = top - 6 - 14 * (len(lines) - number)
            pen.text((MARGIN + column * (side + MARGIN), y), line, fill="black", font=font)
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            _place(sheet, pen, cell, (MARGIN + column * (side + MARGIN), top + number * step), (side, height), font)
    return sheet


def _place(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, cell: Cell, corner: tuple[int, int], size: tuple[int, int], font: Any
) -> None:
    left, top = corner
    sheet.paste(ImageOps.pad(cell.image.convert("RGB"), size, Image.Resampling.LANCZOS, "white"), corner)
    for number, (note, good) in enumerate(cell.notes):
        colour = {None: "#333333", True: "#1a7f37", False: "#b42318"}[good]
        pen.text((left, top + size[1] + 1 + 14 * number), note, fill=colour, font=font)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def blank(side: int = 128) -> Image.Image:
    """Return the picture that stands for one that could not be read."""
    image = Image.new("RGB", (side, side), "#dddddd")
    ImageDraw.Draw(image).text((8, side // 2 - 8), "unreadable", fill="#b42318", font=ImageFont.load_default(size=14))
    return image
