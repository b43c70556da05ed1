"""Save a folder of weights whole or not at all.

A save that stops half-way, by an error, a full disk or Ctrl-C, must not leave a folder that loads and lacks a part.
"""

import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imagine.errors import WeightsError
from imagine.networks.files import variant_of
from imagine.paths import as_path, kind_of, shorten_path

PUSH_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr")  # of diffusers' push_to_hub
_LAST = "model_index.json"


def check_save_options(options: Mapping[str, Any]) -> None:
    """Raise WeightsError for options of `save_pretrained` whose files `from_pretrained` could not read."""
    for name, usual in (("safe_serialization", True), ("use_flashpack", False)):
        if bool(options.get(name, usual)) != usual:
            raise WeightsError(
                f"{name}={options[name]!r} writes files that imagine does not load: leave it out, which saves "
                "safetensors files."
            )


@contextmanager
def write_whole(target: Path, owned: Collection[str] = ()) -> Iterator[Path]:
    """Give a new folder to write into; move its files into `target` when the block ends without an error.

    Files of `target` that the block did not write stay, except weights that the new ones replace (those of an earlier
    save in the same variant, in other shards or in the other format, .bin or safetensors) and entries of `owned`,
    patterns such as "ip_*", that the block did not write.
    If anything fails, `target` is as it was before.
    """
    target = as_path(target).absolute()
    if (kind := kind_of(target, WeightsError)) in ("file", "other"):
        raise WeightsError(f"{shorten_path(target)} is a file: name a folder to save in.")
    name = f".{target.name}.{secrets.token_hex(4)}.partial"
    # Inside an existing folder, because that may be on another disk than its parent.
    unfinished = (target if kind == "folder" else target.parent) / name
    unfinished.mkdir(parents=True)
    try:
        new = unfinished / "new"
        new.mkdir()
        yield new
        if kind == "folder":
            _move(new, target, owned, unfinished / "old")
        else:
            new.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _move(new: Path, target: Path, owned: Collection[str], old: Path) -> None:
    """Move the files of `new` into `target`, and those that they replace to `old`; undo all of it on failure."""
    written = sorted((file.relative_to(new) for file in new.rglob("*") if file.is_file()), key=_order)
    undo: list[Callable[[], Any]] = []

    def move(source: Path, to: Path) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        source.rename(to)
        undo.append(lambda: to.rename(source))

    try:
        for path in _replaced(new, target, owned, written):
            move(target / path, old / path)
        for path in written:
            move(new / path, target / path)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    for folder in {target / path for path in _absent(new, target, owned)}:
        shutil.rmtree(folder, ignore_errors=True)  # empty by now


def _order(path: Path) -> tuple[bool, str]:
    return path.name == _LAST, str(path)  # last, since without it nobody takes the folder for weights


def _absent(new: Path, target: Path, owned: Collection[str]) -> list[Path]:
    """Return the entries of `owned` in `target` that `new` lacks."""
    found = {path for pattern in owned for path in target.glob(pattern) if not (new / path.name).exists()}
    return sorted(path.relative_to(target) for path in found)


def _replaced(new: Path, target: Path, owned: Collection[str], written: Collection[Path]) -> list[Path]:
    """Return the files of `target` that the new ones replace; the index comes first."""
    variants: dict[Path, set[str]] = {}
    for path in written:
        if (variant := variant_of(path.name)) is not None:
            variants.setdefault(path.parent, set()).add(variant)
    absent = _absent(new, target, owned)
    replaced = []
    for folder in {target / path.parent for path in written} | {target / path for path in absent}:
        for file in folder.rglob("*") if folder.relative_to(target) in absent else folder.glob("*"):
            path = file.relative_to(target)
            superseded = variant_of(path.name) in variants.get(path.parent, ()) or path in written
            if file.is_file() and (superseded or any(path.is_relative_to(each) for each in absent)):
                replaced.append(path)
    return sorted(replaced, key=_order, reverse=True)
