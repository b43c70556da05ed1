"""The folder of an evaluation: its settings, its pictures, and what made them.

A picture is written whole or not at all, so that an interrupted run can be resumed after the last one. The settings are
written first, and a run with other settings is refused, so that pictures of two evaluations are never mixed.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from imagine.errors import ConfigError, PictureError
from imagine.evaluation import report
from imagine.paths import PACKAGE, kind_of

SETTINGS = "evaluation.json"


def noise_seed(seed: int, case: int, variant: int = 0) -> int:
    """Return the seed of the noise of one picture, which depends on the run's seed, the case and its variant only."""
    return (seed * 1_000_003 + case + variant * 2_000_000_011) % 2**63  # torch accepts no larger seeds


def generator_for(seed: int, case: int) -> torch.Generator:
    """Return the source of the noise of one picture."""
    return torch.Generator().manual_seed(noise_seed(seed, case))


def read_picture(path: Path) -> Tensor:
    """Read a picture file as (3, H, W) in 0..1. Raises PictureError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return report.to_tensor(image)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises each of them for damaged files
        raise PictureError(f"{path} cannot be read as a picture: delete it, and the run draws it again.") from error


def save_atomically(image: Image.Image, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write to a temporary file and rename it, so that a file that exists is always a complete picture.

    `facts` become text chunks of the PNG file, such as its prompt and seed.
    """
    chunks = PngInfo()
    for name, value in (facts or {}).items():
        chunks.add_itxt(name, str(value))
    with config_error_on_failure(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(f".{os.getpid()}.part")
        image.save(partial_path, format="PNG", pnginfo=chunks)
        os.replace(partial_path, path)


@contextmanager
def config_error_on_failure(path: Path) -> Iterator[None]:
    """Turn an OSError while a file is written into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror or error}): free some disk space, or choose another --output."
        ) from error


def check_settings_file(output: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of this evaluation into the folder. Raises ConfigError if it holds other settings."""
    path = output / SETTINGS
    wanted = json.loads(json.dumps(settings, default=str))
    if kind_of(path, ConfigError) != "nothing":
        found = _read_settings_file(path)
        if found != wanted:
            other = ", ".join(key for key in {**wanted, **found} if found.get(key) != wanted.get(key))
            raise ConfigError(f"{output} holds an evaluation with other {other}: choose another --output folder.")
    with config_error_on_failure(path):
        output.mkdir(parents=True, exist_ok=True)
        if kind_of(path, ConfigError) == "nothing":
            partial = path.with_suffix(f".{os.getpid()}.part")
            partial.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, path)


def _read_settings_file(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged, so the pictures beside it cannot be assigned to an evaluation: choose another "
            "--output folder."
        ) from error


def commit() -> str | None:
    """Return the commit of the checkout that holds this module, with "-dirty" if files were changed since; else None.

    The result is also None for a package that is installed in a folder inside another project's repository.
    """
    root = PACKAGE.parent
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return None
        changed = _git(root, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        return _git(root, "rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
