"""Rows that are worked out once for every picture of a gallery and kept on disk, carried on after any interruption."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from train.checkpoint import write_json
from train.pictures import AnyGallery

_BLOCK = 256  # rows worked out and stored at a time
_PIXELS = 256 * 128**2  # or as many as hold this many pixels, so that large pictures fit into memory
Rows = np.memmap[tuple[int, ...], Any]


def keep(
    path: Path, gallery: AnyGallery, shape: Sequence[int], kind: type[Any], make: Callable[[Tensor], Tensor], words: str
) -> Rows:
    """One row of `shape` and `kind` for every picture of the gallery, (len(gallery), *shape), mapped from `path`.

    `make` works out some rows (B, *shape) from their numbers; `words` describe it on the progress bar. A gallery that
    only grew keeps its rows, for a row does not depend on how many there are; rows of another gallery are made anew.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    state, count = path.with_suffix(".json"), len(gallery)
    done = min(_rows_done(state, path, gallery), count)
    if done:
        os.truncate(path, int(np.prod((count, *shape))) * np.dtype(kind).itemsize)
    values = np.memmap(path, kind, "r+" if done else "w+", shape=(count, *shape))
    block = max(1, min(_BLOCK, _PIXELS // gallery.size**2))
    for start in track(range(done, count, block), words, disable=done >= count):
        rows = torch.arange(start, min(start + block, count))
        values[start : start + len(rows)] = make(rows).numpy()
        values.flush()
        write_json(state, {"gallery": gallery.mark, "rows": start + len(rows)})
    return values


def _rows_done(state: Path, path: Path, gallery: AnyGallery) -> int:
    if not (state.exists() and path.exists()):
        return 0
    known = json.loads(state.read_text())
    return int(known["rows"]) if known["gallery"] == gallery.mark else 0
