"""Check the paths that users name, and turn every failure into a readable error.

pathlib raises PermissionError for a path that may not be read and OSError for a name that is too long. `expanduser`
raises RuntimeError for a name that begins with ~ and is not a home folder. Every file or folder that a user names is
therefore checked here, and the target of --output is checked before any slow work begins.
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
_ABSENT_ON_WINDOWS = (21, 123, 1921)  # not ready, not a valid name, a broken link
_LONGEST_SHOWN = 200  # characters of a path in an error message

PACKAGE = Path(__file__).resolve().parent  # the folder of the package `imagine`
VERSION = "0.1.0"  # of the package


def data_folder() -> Path:
    """Return the folder for what imagine keeps of this user between runs; it may not exist yet.

    $XDG_DATA_HOME/imagine where that is set, else the usual place of the system.
    """
    given = os.environ.get("XDG_DATA_HOME")
    if given:
        return Path(given) / "imagine"
    if os.name == "nt" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "imagine"
    return Path.home() / ".local" / "share" / "imagine"


def as_path(name: str | os.PathLike[str]) -> Path:
    """Return the path for `name`. A leading ~ is expanded if it means a home folder, and kept as a name otherwise."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError:  # no user has this home folder
        return path


def kind_of(path: Path, error: type[ImagineError]) -> Kind:
    """Return what is at a path. Raise `error` if the path cannot be checked."""
    try:
        mode = path.stat().st_mode
    except ValueError:  # a zero byte, which no file name can contain
        return "nothing"
    except OSError as reason:
        if reason.errno in _ABSENT or getattr(reason, "winerror", None) in _ABSENT_ON_WINDOWS:
            return "nothing"
        why = reason.strerror or type(reason).__name__
        raise error(f"{shorten_path(path)} cannot be checked ({why}): check its permissions and the path.") from reason
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def why_no_file(name: str | os.PathLike[str], kind: Kind, what: str = "file") -> str:
    """Return the sentence for a path at which there is no ordinary file; `kind` is what `kind_of` found."""
    text = shorten_path(name)
    if text == "-" and kind == "nothing":
        return f"- stands for standard input, which is not read: save the {what} and give its path."
    if kind == "other":
        return (
            f"{text} is not an ordinary file but standard input, a pipe or a device, which is not read: save the "
            f"{what} and give its path."
        )
    return (
        f"{text} is a folder: give a {what} in it."
        if kind == "folder"
        else f"There is no {what} {text}: check the path."
    )


def shorten_path(path: str | os.PathLike[str]) -> str:
    """Return a path for an error message; a very long one is shortened in the middle."""
    text = os.fspath(path)
    half = _LONGEST_SHOWN // 2
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:half]}...{text[-half:]}"


def writable_file(path: Path, suffixes: Collection[str]) -> Path:
    """Return the file that --output names, if it can be written. Raise ConfigError otherwise."""
    path = as_path(path)
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"--output {shorten_path(path)} must end in {' or '.join(suffixes)}: choose another name.")
    if kind_of(path, ConfigError) == "folder":
        raise ConfigError(f"--output {path} is a folder: name a file in it.")
    if kind_of(path.parent, ConfigError) != "folder":
        raise ConfigError(f"There is no folder {path.parent} for --output {path.name}: create it first.")
    if not _is_writable(path.parent):
        raise ConfigError(f"The folder {path.parent} is not writable: choose another folder for --output.")
    return path


def writable_folder(path: Path) -> Path:
    """Return the folder that --output names, if it is new or empty and can be written. Raise ConfigError otherwise."""
    path = as_path(path)
    kind = kind_of(path, ConfigError)
    try:
        taken = kind not in ("folder", "nothing") or (kind == "folder" and any(path.iterdir()))
    except OSError:  # the folder may not be readable
        taken = True
    if taken:
        raise ConfigError(f"--output {path} already exists: name a folder that is new or empty.")
    parent = path.absolute().parent
    if kind_of(parent, ConfigError) != "folder" or not _is_writable(parent):
        raise ConfigError(f"The folder {parent} is not writable: choose another place for --output.")
    return path


def folder_to_fill(path: Path) -> Path:
    """Return the folder that --output names, if it can be written or created. Raise ConfigError otherwise."""
    path = as_path(path)
    here = path.absolute()
    while kind_of(here, ConfigError) == "nothing" and here != here.parent:
        here = here.parent
    if kind_of(here, ConfigError) != "folder":
        raise ConfigError(f"{here} is a file, so --output {path} cannot be a folder: choose another.")
    if not _is_writable(here):
        raise ConfigError(f"The folder {here} is not writable: choose another place for --output.")
    return path


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
