"""Sheets of pictures that show the results of a stage."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

_GAP = 2


def save_grid(pictures: Tensor, path: Path, columns: int) -> None:
    """Write pictures (N, 3, H, W), 0 to 1, as one sheet of `columns` columns."""
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    sheet = torch.ones(3, rows * (height + _GAP), columns * (width + _GAP))
    for i, picture in enumerate(pictures.cpu().clamp(0, 1)):
        y, x = i // columns * (height + _GAP), i % columns * (width + _GAP)
        sheet[:, y : y + height, x : x + width] = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sheet.permute(1, 2, 0) * 255).round().byte().numpy()).save(path, format="PNG")
