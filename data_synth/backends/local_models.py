"""What backends with models of their own share: where a model lies, what tells it from others, and on what it runs.

A model is a folder, a file or the id of a hub repository. A folder is known by a fingerprint of its content, so that it
may be moved without a build being redone; a repository by its revision, so name a commit where results must last.
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

if TYPE_CHECKING:  # the settings are checked without torch, which takes a second to import
    import torch

_READ_WHOLE, _BLOCK, _BLOCKS = 1 << 20, 4096, 64  # bytes; larger files are known by as many blocks, evenly spaced
_IGNORED_SUFFIXES = {".md", ".png", ".jpg", ".jpeg", ".webp", ".gif"}  # what a model does not depend on
_LICENCE = re.compile(r"^licen[sc]e:\s*(\S.*?)\s*$", re.MULTILINE)
_REASONS: dict[type[Exception], str] = {
    FaceError: "no usable face",
    PictureError: "a picture that cannot be read",
    PromptError: "a sentence that cannot be used",
}


def _expand_home(source: str) -> str:
    return str(Path(source).expanduser()) if source.startswith("~") else source


# A folder, a file or a hub repository owner/name; ~ means what it means to a shell, which has not seen it in a file.
ModelSource = Annotated[str, AfterValidator(_expand_home)]


class ModelSettings(BaseModel):
    """Which model, and how it runs. Where it lies and on what it runs leave results as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSource = Field(min_length=1, exclude=True)  # a folder, or a hub repository; `identity` knows it
    revision: str | None = Field(default=None, exclude=True)  # of a hub repository: best a commit
    device: str = Field(default="auto", exclude=True)  # "cuda:1", "cpu", ...; auto: a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    licence: str = Field(default="", exclude=True)  # for the manifest; "": what the folder's README.md says
    options: dict[str, Any] = Field(default_factory=dict)  # further arguments of from_pretrained, such as a variant


def identity_of(backend: object, version: int, **facts: Any) -> dict[str, Any]:
    """What tells a backend from others: its class, the version of its code, and these facts."""
    kind = type(backend)
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "version": version, **facts}


def model_identity(settings: ModelSettings) -> dict[str, str]:
    """Name, content or revision, and licence of the settings' model. Reads little, loads nothing."""
    return source_identity(settings.model, settings.revision, settings.licence)


def source_identity(source: str, revision: str | None = None, licence: str = "") -> dict[str, str]:
    """As `model_identity`, of any folder, file or hub repository."""
    path = Path(source).expanduser()
    if not path.exists():
        return {"model": source, "weights": revision or "main", "licence": licence}
    return {"model": path.resolve().name, "weights": fingerprint(path), "licence": licence or _stated_licence(path)}


@functools.cache
def fingerprint(path: Path) -> str:
    """16 hexadecimal digits of a file's content, or of the names and contents of all files in a folder.

    Of files above 1 MB, sizes and 64 blocks are read: training changes all of a model. Hidden files, texts for people
    and pictures do not count. Worked out once in a process.
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
    """The licence that a model card names in its header; "" if there is none."""
    card = path / "README.md"
    if not card.is_file():
        return ""
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    found = _LICENCE.search(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    return found[1] if found else ""


def choose_device(name: str) -> "torch.device":
    """The device called `name`; auto is a GPU if there is one. Raises ImagineError for a device that is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ImagineError(f"There is no device {name!r}: choose auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ImagineError(f"The device {name} is not there: this torch sees no GPU; choose auto or cpu.")
    return device


def choose_dtype(name: str, device: "torch.device") -> "torch.dtype":
    """The precision called `name`; auto is bfloat16 on a GPU and float32 on a CPU."""
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Load something quietly in this block; whatever the libraries raise becomes one WeightsError about `model`."""
    from imagine.networks.weights import quiet_libraries

    try:
        with quiet_libraries():
            yield
    except ImagineError:
        raise
    # Each library and file format fails in its own way; the user can do only one thing about it.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise WeightsError(
            f"The model {model} cannot be loaded ({reason}); name a folder that holds a model of this kind, or a hub "
            "repository that this machine can reach."
        ) from error


def failure(error: Exception) -> Failed:
    """An error about one item as that item's failure; its reason is always one of a few."""
    return Failed(_REASONS.get(type(error), "it could not be drawn"), str(error))
