"""Rows that are worked out once for every picture of a gallery and kept on disk, carried on after any interruption.

A file's name ends in its gallery's mark, so that different galleries of one name lie side by side. Files grow and never
shrink, for another run may have them mapped; a smaller gallery maps the first rows of a larger one's file.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from train.run.checkpoint import write_json
from train.run.stopping import raise_if_stopping

try:
    import fcntl
except ImportError:  # Windows has no such locks: there two runs must not fill one folder at once
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("train")
_BLOCK = 256  # rows worked out and stored at a time
_PIXELS = 256 * 128**2  # or as many as hold this many pixels, so that large pictures fit into memory
Rows = np.memmap[tuple[int, ...], Any]
RowFormat = tuple[Sequence[int], type[Any]]  # a row's shape, and the kind of its numbers


class CachedGallery(Protocol):
    """What is to be known of a gallery whose rows are kept: how many, of how many pixels, and what they depend on."""

    @property
    def size(self) -> int: ...

    @property
    def mark(self) -> str: ...

    def __len__(self) -> int: ...


def cache_rows(
    path: Path,
    gallery: CachedGallery,
    shape: Sequence[int],
    kind: type[Any],
    make: Callable[[Tensor], Tensor],
    description: str,
) -> Rows:
    """One row of `shape` and `kind` for every picture of the gallery, (len(gallery), *shape), mapped from a file.

    `make` works out some rows (B, *shape) from their numbers; `description` labels the progress bar. A gallery that
    only grew keeps its rows, for a row does not depend on how many there are. The file is `path` with the gallery's
    mark in its name.
    """
    block = max(1, min(_BLOCK, _PIXELS // gallery.size**2))
    return cache_rows_together({path: (shape, kind)}, gallery, lambda rows: (make(rows),), description, block)[0]


def cache_rows_together(
    files: Mapping[Path, RowFormat],
    gallery: CachedGallery,
    make: Callable[[Tensor], Sequence[Tensor]],
    description: str,
    block: int,
) -> list[Rows]:
    """As `cache_rows`, for several files whose rows are made together, `block` at a time. One of two runs does it."""
    first = next(iter(files))
    first.parent.mkdir(parents=True, exist_ok=True)
    formats = {_marked(path, gallery.mark): form for path, form in files.items()}
    state, count = _marked(first, gallery.mark).with_suffix(".json"), len(gallery)
    if _rows_done(state, formats) < count:
        with (
            state.with_suffix(".lock").open("w") as lock,
            _exclusive_lock(lock.fileno(), f"{description}: another run is at it."),
        ):
            _adopt_unmarked_files(list(files), list(formats), state, gallery.mark)
            _fill(state, formats, count, make, description, block)
    return [map_file(path, (count, *shape), kind) for path, (shape, kind) in formats.items()]


def map_file(path: Path, shape: Sequence[int], kind: type[Any]) -> Rows:
    """The file's beginning as an array to read and write; what was never written is zero."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    with path.open("ab") as file, _exclusive_lock(file.fileno()):
        if os.fstat(file.fileno()).st_size < size:
            os.truncate(file.fileno(), size)
    return np.memmap(path, kind, "r+", shape=tuple(shape))


def _fill(
    state: Path,
    formats: Mapping[Path, RowFormat],
    count: int,
    make: Callable[[Tensor], Sequence[Tensor]],
    description: str,
    block: int,
) -> None:
    done = _rows_done(state, formats)  # once more: another run may have been at it meanwhile
    values = [map_file(path, (count, *shape), kind) for path, (shape, kind) in formats.items()]
    for start in track(range(done, count, block), description, disable=done >= count):
        rows = torch.arange(start, min(start + block, count))
        for stored, made in zip(values, make(rows), strict=True):
            stored[start : start + len(rows)] = made.numpy()
            stored.flush()
        write_json(state, {"rows": start + len(rows)})
        raise_if_stopping()


def _rows_done(state: Path, formats: Mapping[Path, RowFormat]) -> int:
    """How many rows are known to be there, and are."""
    if not state.exists() or not all(path.exists() for path in formats):
        return 0
    rows = int(json.loads(state.read_text(encoding="utf-8"))["rows"])
    each = {path: int(np.prod(shape)) * np.dtype(kind).itemsize for path, (shape, kind) in formats.items()}
    return min(rows, *(path.stat().st_size // size for path, size in each.items()))


def _marked(path: Path, mark: str) -> Path:
    return path.with_name(f"{path.stem}-{mark}{path.suffix}")


def _adopt_unmarked_files(before: Sequence[Path], now: Sequence[Path], state: Path, mark: str) -> None:
    """Take over what an earlier version kept for this gallery, whose mark stood in the file beside the rows alone."""
    old = before[0].with_suffix(".json")
    if state.exists() or not old.exists() or json.loads(old.read_text(encoding="utf-8")).get("gallery") != mark:
        return
    for source, place in zip(before, now, strict=True):
        if source.exists():
            os.replace(source, place)
    os.replace(old, state)


@contextmanager
def _exclusive_lock(handle: int, waiting: str = "") -> Iterator[None]:
    """For the block no other process is in it for this file; where there are no locks, nothing is waited for."""
    if fcntl is None:
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting:
            log.info("%s", waiting)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        log.debug("This disk knows no locks (%s).", error)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
