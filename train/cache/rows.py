"""Cache one row per picture of a gallery on disk: each row is computed once, and an interrupted computation is resumed.

A file's name ends in its gallery's mark (a fingerprint), so that different galleries of one name have different files.
Files grow and never shrink, because another run may have them mapped; a smaller gallery maps the first rows of a larger
one's file.
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
from torch import Tensor

from train.run.checkpoint import write_json
from train.run.progress import blocks
from train.run.stopping import raise_if_stopping

try:
    import fcntl
except ImportError:  # Windows has no fcntl locks: there, two runs must not fill one folder at the same time
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("train")
_BLOCK = 256  # rows computed and stored at a time
_PIXELS = 256 * 128**2  # most pixels of a block, so that large pictures fit into memory
Rows = np.memmap[tuple[int, ...], Any]
RowFormat = tuple[Sequence[int], type[Any]]  # the shape of a row, and its data type


class CachedGallery(Protocol):
    """The interface of a gallery whose rows are cached: number of rows, side of a picture in pixels, fingerprint."""

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
    """Return one row per picture of the gallery, (len(gallery), *shape) of type `kind`, mapped from a file.

    `make` computes rows (B, *shape) from their numbers; `description` labels the progress bar. If a gallery only grew,
    its rows stay valid, because a row does not depend on the number of rows. The file is `path` with the gallery's mark
    in its name.
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
    """As `cache_rows`, for several files whose rows are computed together, `block` at a time.

    If two runs need the same rows, one computes them while the other waits.
    """
    first = next(iter(files))
    first.parent.mkdir(parents=True, exist_ok=True)
    formats = {_marked(path, gallery.mark): form for path, form in files.items()}
    state, count = _marked(first, gallery.mark).with_suffix(".json"), len(gallery)
    if _rows_done(state, formats) < count:
        with (
            state.with_suffix(".lock").open("w") as lock,
            _exclusive_lock(lock.fileno(), f"{description}: waiting for another run that does this."),
        ):
            _adopt_unmarked_files(list(files), list(formats), state, gallery.mark)
            _fill(state, formats, count, make, description, block)
    return [map_file(path, (count, *shape), kind) for path, (shape, kind) in formats.items()]


def map_file(path: Path, shape: Sequence[int], kind: type[Any]) -> Rows:
    """Map the beginning of the file as an array to read and write; values that were never written are zero."""
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
    done = _rows_done(state, formats)  # again: another run may have added rows before the lock was taken
    values = [map_file(path, (count, *shape), kind) for path, (shape, kind) in formats.items()]
    for numbers in blocks(done, count, block, description):
        rows = torch.arange(numbers.start, numbers.stop)
        for stored, made in zip(values, make(rows), strict=True):
            stored[numbers.start : numbers.stop] = made.numpy()
            stored.flush()
        write_json(state, {"rows": numbers.stop})
        raise_if_stopping()


def _rows_done(state: Path, formats: Mapping[Path, RowFormat]) -> int:
    """Return how many rows are finished by the state file, and present in all files."""
    if not state.exists() or not all(path.exists() for path in formats):
        return 0
    rows = int(json.loads(state.read_text(encoding="utf-8"))["rows"])
    each = {path: int(np.prod(shape)) * np.dtype(kind).itemsize for path, (shape, kind) in formats.items()}
    return min(rows, *(path.stat().st_size // size for path, size in each.items()))


def _marked(path: Path, mark: str) -> Path:
    return path.with_name(f"{path.stem}-{mark}{path.suffix}")


def _adopt_unmarked_files(before: Sequence[Path], now: Sequence[Path], state: Path, mark: str) -> None:
    """Rename the files of an earlier version, which had the gallery's mark in the state file and not in their names."""
    old = before[0].with_suffix(".json")
    if state.exists() or not old.exists() or json.loads(old.read_text(encoding="utf-8")).get("gallery") != mark:
        return
    for source, place in zip(before, now, strict=True):
        if source.exists():
            os.replace(source, place)
    os.replace(old, state)


@contextmanager
def _exclusive_lock(handle: int, waiting: str = "") -> Iterator[None]:
    """Hold an exclusive lock on the file for the block, and log `waiting` if it is taken; do nothing without locks."""
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
        log.debug("This disk does not support locks (%s).", error)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
