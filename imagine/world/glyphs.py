"""Draw capital letters for shirts into one small atlas, from Pillow's built-in font."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from imagine.world.vocabulary import LETTERS

WIDTH, HEIGHT = 20, 24


@lru_cache(maxsize=1)
def atlas() -> Tensor:
    """Return (27, 24, 20), with 1 inside a letter; entry 0 is empty.

    Letters fill cells of equal size, so that all are equally legible.
    """
    font = ImageFont.load_default(size=64)
    cells: list[NDArray[Any]] = [np.zeros((HEIGHT, WIDTH), np.float32)]
    for letter in LETTERS:
        picture = Image.new("L", (120, 120))
        if letter == "I":  # the font's has no serifs: stretched to a cell it would be a block
            for box in ((30, 20, 70, 30), (44, 20, 56, 80), (30, 70, 70, 80)):
                ImageDraw.Draw(picture).rectangle(box, fill=255)
        else:
            ImageDraw.Draw(picture).text((20, 20), letter, fill=255, font=font, stroke_width=2)
        tight = picture.crop(picture.getbbox())
        width = WIDTH - 4 if letter not in "IJ" else WIDTH // 2
        cell = Image.new("L", (WIDTH, HEIGHT))
        cell.paste(tight.resize((width, HEIGHT - 2), Image.Resampling.LANCZOS), ((WIDTH - width) // 2, 1))
        cells.append(np.asarray(cell, np.float32) / 255)
    return torch.from_numpy(np.stack(cells))
