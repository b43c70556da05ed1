"""Locate, identify and load the models that backends run in this process.

A model is a folder, a file or the id of a hub repository. A folder is identified by a fingerprint of its content, so it
can be moved without repeating a build. A repository is identified by its revision, so name a commit if results must be
reproducible.
"""

import functools
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from data_synth.backends.contracts import Failed
from imagine.errors import FaceError, ImagineError, PictureError, PromptError, WeightsError
from imagine.licences import licence_of

if TYPE_CHECKING:  # settings are validated without torch, whose import takes a second
    import torch

_READ_WHOLE, _BLOCK, _BLOCKS = 1 << 20, 4096, 64  # bytes; of larger files, 64 evenly spaced blocks are read
_IGNORED_SUFFIXES = {".md", ".png", ".jpg", ".jpeg", ".webp", ".gif"}  # files that do not affect a model
_LICENCE = re.compile(r"^licen[sc]e:\s*(\S.*?)\s*$", re.MULTILINE)
_REASONS: dict[type[Exception], str] = {
    FaceError: "no usable face",
    PictureError: "a picture that cannot be read",
    PromptError: "a prompt that cannot be used",
}


def _expand_home(source: str) -> str:
    return str(Path(source).expanduser()) if source.startswith("~") else source


# A folder, a file or a hub repository owner/name. A shell does not expand ~ in a build file, so it is expanded here.
ModelSource = Annotated[str, AfterValidator(_expand_home)]


class ModelSettings(BaseModel):
    """The model and how it runs. Its location and device do not change results."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSource = Field(min_length=1, exclude=True)  # a folder or a hub repository; part of `identity`
    revision: str | None = Field(default=None, exclude=True)  # of a hub repository, preferably a commit
    device: str = Field(default="auto", exclude=True)  # "cuda:1", "cpu", ...; auto: a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    licence: str = Field(default="", exclude=True)  # for the manifest; "": from the folder's README.md
    options: dict[str, Any] = Field(default_factory=dict)  # further arguments of from_pretrained, such as a variant


def identity_of(backend: object, version: int, **facts: Any) -> dict[str, Any]:
    """Return the identity of a backend: its class, the version of its code, and these facts."""
    kind = type(backend)
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "version": version, **facts}


def model_identity(settings: ModelSettings) -> dict[str, str]:
    """Return name, fingerprint or revision, and licence of the settings' model, without loading it."""
    return source_identity(settings.model, settings.revision, settings.licence)


def source_identity(source: str, revision: str | None = None, licence: str = "") -> dict[str, str]:
    """Return the same as `model_identity`, for any folder, file or hub repository.

    The licence of a hub repository that the caller does not state comes from the table of licences, if it is there.
    """
    path = Path(source).expanduser()
    if not path.exists():
        known = licence_of(source)
        stated = licence or ("" if known is None else known.licence)
        return {"model": source, "weights": revision or "main", "licence": stated}
    return {"model": path.resolve().name, "weights": fingerprint(path), "licence": licence or _stated_licence(path)}


@functools.cache
def fingerprint(path: Path) -> str:
    """Return 16 hexadecimal digits of a hash of a file's content, or of the names and contents of a folder's files.

    Of files above 1 MB, only the size and 64 blocks are read, which is enough because training changes every part of a
    model. Hidden files, Markdown files and pictures in a folder are ignored. The result is cached for the process.
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    for file in files:
        name = Path(file.name) if file == path else file.relative_to(path)
        if file != path and (
            file.suffix.lower() in _IGNORED_SUFFIXES or any(part.startswith(".") for part in name.parts)
        ):
            continue
        size = file.stat().st_size
        digest.update(f"{name.as_posix()} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= _READ_WHOLE:
                digest.update(stream.read())
                continue
            for number in range(_BLOCKS):
                stream.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()[:16]


def _stated_licence(path: Path) -> str:
    """Return the licence in the header of the folder's model card; "" if there is none."""
    card = path / "README.md"
    if not card.is_file():
        return ""
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    found = _LICENCE.search(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    return found[1] if found else ""


def choose_device(name: str) -> "torch.device":
    """Return the device with this name; auto is a GPU if there is one. Raises ImagineError if it is not available."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ImagineError(f"There is no device {name!r}. Choose auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ImagineError(f"The device {name} is not available, because torch finds no GPU. Choose auto or cpu.")
    return device


def choose_dtype(name: str, device: "torch.device") -> "torch.dtype":
    """Return the precision with this name; auto is bfloat16 on a GPU and float32 on a CPU."""
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Silence the libraries in this block, and turn their errors into a WeightsError about `model`."""
    from imagine.networks.weights import quiet_libraries

    try:
        with quiet_libraries():
            yield
    except ImagineError:
        raise
    # Libraries and file formats raise different errors, but the remedy is always the same.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise WeightsError(
            f"The model {model} cannot be loaded ({reason}). Name a folder that contains a model of this kind, or "
            "a hub repository that this machine can reach."
        ) from error


def failure(error: Exception) -> Failed:
    """Return the failure of an item for an error about it, with a fixed reason for each type of error."""
    return Failed(_REASONS.get(type(error), "drawing failed"), str(error))
