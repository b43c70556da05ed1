"""Paths as users name them: looked at without a traceback, whatever is wrong with them.

pathlib raises where one may not look (PermissionError) and where a name is too long, and `expanduser` does where a name
begins with ~ and is nobody's home. Every file or folder that a user names is looked at through here, and what
--output names is checked before anything slow begins.
"""

import errno
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from imagine.errors import ConfigError, ImagineError

Kind = Literal["file", "folder", "other", "nothing"]

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)
_ABSENT_ON_WINDOWS = (21, 123, 1921)  # not ready, not a valid name, a link that leads nowhere
_LONGEST_SHOWN = 200  # characters of a path in a sentence

PACKAGE = Path(__file__).resolve().parent  # the folder of the package `imagine`


def as_path(name: str | os.PathLike[str]) -> Path:
    """The path that a user means: with ~ as a home folder, unless a file's own name just begins with it."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError:  # nobody has that home
        return path


def kind_of(path: Path, error: type[ImagineError]) -> Kind:
    """What lies at a path. Raises `error`, in a sentence, if that cannot be told."""
    try:
        mode = path.stat().st_mode
    except ValueError:  # a zero byte, which no name can hold
        return "nothing"
    except OSError as reason:
        if reason.errno in _ABSENT or getattr(reason, "winerror", None) in _ABSENT_ON_WINDOWS:
            return "nothing"
        why = reason.strerror or type(reason).__name__
        raise error(
            f"{shorten_path(path)} cannot be looked at ({why}): check its permissions and the path."
        ) from reason
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def shorten_path(path: str | os.PathLike[str]) -> str:
    """A path as a sentence can hold it: a very long one is cut in its middle."""
    text = os.fspath(path)
    half = _LONGEST_SHOWN // 2
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:half]}...{text[-half:]}"


def writable_file(path: Path, suffixes: Collection[str]) -> Path:
    """The file that --output names, as long as it can be written. Raises ConfigError, before anything slow begins."""
    path = as_path(path)
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"--output {shorten_path(path)} must end in {' or '.join(suffixes)}: choose another name.")
    if kind_of(path, ConfigError) == "folder":
        raise ConfigError(f"--output {path} is a folder: name a file in it.")
    if kind_of(path.parent, ConfigError) != "folder":
        raise ConfigError(f"There is no folder {path.parent} for --output {path.name}: make it first.")
    if not _is_writable(path.parent):
        raise ConfigError(f"Nothing can be written to {path.parent}: choose another folder for --output.")
    return path


def writable_folder(path: Path) -> Path:
    """The folder that --output names, as long as it can be written and is new or empty. Raises ConfigError."""
    path = as_path(path)
    kind = kind_of(path, ConfigError)
    try:
        taken = kind not in ("folder", "nothing") or (kind == "folder" and any(path.iterdir()))
    except OSError:  # it may not be read
        taken = True
    if taken:
        raise ConfigError(f"--output {path} is there already: name a folder that is new or empty.")
    parent = path.absolute().parent
    if kind_of(parent, ConfigError) != "folder" or not _is_writable(parent):
        raise ConfigError(f"Nothing can be written to {parent}: choose another place for --output.")
    return path


def folder_to_fill(path: Path) -> Path:
    """The folder that --output names, as long as it can be written, or made with those above it. Raises ConfigError."""
    path = as_path(path)
    here = path.absolute()
    while kind_of(here, ConfigError) == "nothing" and here != here.parent:
        here = here.parent
    if kind_of(here, ConfigError) != "folder":
        raise ConfigError(f"{here} is a file, so that --output {path} cannot be a folder: choose another.")
    if not _is_writable(here):
        raise ConfigError(f"Nothing can be written to {here}: choose another place for --output.")
    return path


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
