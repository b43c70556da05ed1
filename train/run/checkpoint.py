"""Checkpoints, and atomic writes: a file or folder is written to a temporary path, flushed, then renamed to its own.

One checkpoint is one safetensors file named after the images seen. Its header holds the progress and the stage's
settings as JSON, so that weights and progress stay consistent. An unreadable file, for example after a crash, is
ignored, and the checkpoint before it is used.

    weights/MODULE.PATH              trained modules, with their buffers
    average/MODULE.PATH              moving averages of the trained parameters
    optimiser/STATE/MODULE.PATH      one tensor per optimiser state, named as the parameter it belongs to

Tensors are stored unsharded, so that any number of processes can resume from them. Beside each checkpoint, under the
same number, is a link to the best weights at that time.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from imagine.errors import WeightsError
from train.run.ema import Average

log = logging.getLogger("train")
FORMAT_VERSION = 1
BEST = "best.safetensors"  # in the stage's folder, beside the folder of checkpoints
_OPTIMISER_BY_STATE_KEY = {  # a key that only this optimiser's state has -> the optimiser
    "momentum": "muon",
    "exp_avg": "adamw",
    "state1": "adamw8bit",
}


@dataclass
class Progress:
    """The progress of a stage."""

    images_seen: int = 0
    skipped: int = 0  # batches skipped because of a bad record, or a loss or gradient that is not finite
    skipped_in_a_row: int = 0
    seconds: float = 0  # training time, over all starts of the run


@dataclass
class State:
    """The training state: everything that changes while a stage trains, which is what a checkpoint holds."""

    modules: dict[str, nn.Module]  # the modules that train
    trained: dict[str, nn.Parameter]  # the trained parameters by path, module name first
    optimiser: torch.optim.Optimizer
    average: Average
    progress: Progress
    stage: dict[str, Any]  # the stage's resolved settings
    precision: str  # "fp32" or "bf16"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk: tensors on the CPU, progress, and the stage's settings when it was written."""

    tensors: dict[str, Tensor]
    progress: Progress
    stage: dict[str, Any]
    precision: str


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder; when the block ends, flush it to disk and rename it to `path`.

    A file is replaced by one rename. A folder needs two, as a folder cannot be renamed onto another: if the process is
    killed between them, the next call for the same path restores the old folder.
    """
    draft, before = (path.with_name(f".{path.name}.{kind}") for kind in ("draft", "before"))
    _restore_previous(before, path)
    _remove(draft)  # left by a run that was killed
    _remove(before)
    try:
        yield draft
        _flush_all(draft)
        if path.is_dir() or (draft.is_dir() and path.exists()):
            os.replace(path, before)
        os.replace(draft, path)
        _flush(path.parent)
        _remove(before)
    finally:
        _restore_previous(before, path)
        _remove(draft)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, indent=1), encoding="utf-8")


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each process holds only its own rows of the tensor, as with FSDP (it is a DTensor)."""
    return hasattr(tensor, "full_tensor")


def gather_full(tensor: Tensor) -> Tensor:
    """Return the full tensor, gathered if it is sharded; in that case every process must call this."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's rows of a full tensor, sharded as `like` is. Nothing is sent: all processes have it all."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; tensors that share memory are stored once each."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        start = here.untyped_storage().data_ptr()
        own[name] = here.clone() if start in seen else here
        seen.add(start)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        try:
            save_file(own, draft, dict(metadata))
        except SafetensorError as error:  # for example a full disk
            raise OSError(f"{path} cannot be written ({error})") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, on the CPU, and the metadata; WeightsError if the file is missing, truncated or invalid."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read ({error}). Delete it and train its stage again.") from None


def weights(modules: Mapping[str, nn.Module], names: Sequence[str]) -> dict[str, Tensor]:
    """Return parameters and buffers of the named modules by path, module name first."""
    return {f"{name}.{path}": value for name in names for path, value in modules[name].state_dict().items()}


def load_weights(
    modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], source: str, fresh: Sequence[str] = ()
) -> list[str]:
    """Load tensors into the modules that their names start with, strictly; return the names of these modules.

    `fresh` holds patterns, such as unet.conv_in.*, of tensors that keep their present values.
    """
    loaded = []
    for name, module in modules.items():
        own = _under_prefix(f"{name}.", tensors)
        if not own:
            continue
        now = module.state_dict()
        kept = {k: v for k, v in now.items() if any(fnmatchcase(f"{name}.{k}", pattern) for pattern in fresh)}
        own |= kept
        try:
            module.load_state_dict({k: sharded_like(v, now[k]) if k in now else v for k, v in own.items()}, strict=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise WeightsError(
                f"The module {name} does not fit the weights in {source} ({reason[:300]}). Set the same sizes for both."
            ) from None
        loaded.append(name)
    return loaded


def save(folder: Path, state: State, keep: int, permanent: bool = False, is_writer: bool = True) -> Path:
    """Write one checkpoint and delete all but the newest `keep`; one written as `permanent` is not deleted for its age.

    Checkpoints with more images seen than this one belong to an abandoned continuation and are deleted too. With
    several processes, every process must call this, and only the one with `is_writer` writes.
    """
    tensors = {}
    for name, tensor in _contents(state).items():
        full = gather_full(tensor)
        if is_writer:
            tensors[name] = full.cpu() if is_sharded(tensor) else full
    seen = state.progress.images_seen
    path = folder / f"{seen:012d}{'.kept' if permanent else ''}.safetensors"
    if is_writer:
        header = {"format_version": FORMAT_VERSION, "progress": asdict(state.progress)}
        header |= {"stage": state.stage, "precision": state.precision}
        folder.mkdir(parents=True, exist_ok=True)
        _link_best(folder, seen)
        write_tensors(path, tensors, {"checkpoint": json.dumps(header)})
        _drop_old(folder, seen, keep)
    return path


def _link_best(folder: Path, images_seen: int) -> None:
    _link_or_remove(folder.parent / BEST, _best_path(folder, images_seen))


def restore_best(folder: Path, images_seen: int) -> None:
    """Restore the best weights of the checkpoint at `images_seen`; delete them if there were none at that time."""
    _link_or_remove(_best_path(folder, images_seen), folder.parent / BEST)


def _link_or_remove(source: Path, place: Path) -> None:
    """Link `place` to the file `source`, or delete `place` if `source` does not exist."""
    if source.exists():
        _link(source, place)
    else:
        place.unlink(missing_ok=True)


def read_provenance(path: Path) -> dict[str, Any]:
    """Return the note on the weights' origin from the file's header; empty if the file does not exist."""
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        note: dict[str, Any] = json.loads((file.metadata() or {}).get("from", "{}"))
    return note


def load(folder: Path, fits: Callable[[Checkpoint], bool]) -> Checkpoint | None:
    """Return the newest readable checkpoint that `fits`, or None if the folder holds no checkpoint.

    Unreadable files are ignored with a warning. If none of the readable ones fits, the newest of them is returned with
    a warning, so that a stage never silently starts again. Raises WeightsError if there are files but none is readable.
    """
    for draft in folder.glob(".*.draft"):
        draft.unlink(missing_ok=True)  # left by a killed run; another process may delete it first
    paths = _newest_first(folder)
    newest: Checkpoint | None = None
    for path in paths:
        try:
            saved = _read(path)
        except WeightsError as error:
            log.warning("%s Using the checkpoint before it.", error)
            continue
        if fits(saved):
            return saved
        newest = newest or saved
    if paths and newest is None:
        raise WeightsError(f"No checkpoint in {folder} can be read. Delete {folder.parent} to train the stage again.")
    if newest is not None:
        log.warning("Resuming at %s images, although the learning rate was different.", newest.progress.images_seen)
    return newest


@torch.no_grad()
def restore(state: State, saved: Checkpoint, source: str) -> None:
    """Load a checkpoint into `state`, strictly: WeightsError for a missing or an extra tensor.

    Parameters that were trained with another optimiser start with an empty optimiser state; a warning counts them.
    """
    tensors = saved.tensors
    loaded = load_weights(state.modules, _under_prefix("weights/", tensors), source)
    averages = _under_prefix("average/", tensors)
    if set(loaded) != set(state.modules) or set(averages) != set(state.average.values):
        raise WeightsError(f"The checkpoint in {source} trains other parts; restore the stage's old `train` and `ema`.")
    for path, value in averages.items():
        state.average.values[path].copy_(sharded_like(value, state.average.values[path]))
    others = _of_other_optimiser(state, tensors)
    if others:
        log.warning(
            "Resuming with another optimiser: the optimiser state of %d of %d parameters is reset.",
            len(others), len(state.trained),
        )  # fmt: skip
    for name, value in _under_prefix("optimiser/", tensors).items():
        key, path = name.split("/", 1)
        if path not in state.trained:
            raise WeightsError(f"The checkpoint in {source} trains {path}; restore the stage's old `train`.")
        if path in others:
            continue
        parameter = state.trained[path]
        if value.dtype == torch.int64 and not value.ndim:
            state.optimiser.state[parameter][key] = int(value)  # bitsandbytes counts its steps in Python
            continue
        like = parameter if value.shape == parameter.shape else value.to(parameter.device)
        restored = torch.empty_like(like, dtype=value.dtype)  # in the parameter's memory layout
        state.optimiser.state[parameter][key] = restored.copy_(sharded_like(value, like))
    state.progress = saved.progress


def _of_other_optimiser(state: State, tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the paths of the parameters whose stored state is from another optimiser than their current one."""
    kind = state.stage.get("optimiser", "adamw")
    now = {
        id(p): "muon" if group.get("muon") else kind for group in state.optimiser.param_groups for p in group["params"]
    }
    stored = [name.split("/", 1) for name in _under_prefix("optimiser/", tensors)]
    before = {
        path: _OPTIMISER_BY_STATE_KEY[key]
        for key, path in stored
        if key in _OPTIMISER_BY_STATE_KEY and path in state.trained
    }
    return {path for path, one in before.items() if now[id(state.trained[path])] != one}


def _contents(state: State) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint; sharded ones are not gathered."""
    tensors = {f"weights/{name}": v for name, v in weights(state.modules, list(state.modules)).items()}
    tensors |= {f"average/{name}": v for name, v in state.average.values.items()}
    for name, parameter in state.trained.items():
        for key, value in state.optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser/{key}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def _read(path: Path) -> Checkpoint:
    tensors, metadata = read_tensors(path)
    header = json.loads(metadata["checkpoint"])
    return Checkpoint(tensors, Progress(**header["progress"]), header["stage"], header["precision"])


def _drop_old(folder: Path, images_seen: int, keep: int) -> None:
    removable = []
    for path in _newest_first(folder):
        if _images_seen(path) > images_seen:
            path.unlink()
        elif not path.stem.endswith(".kept"):
            removable.append(path)
    for path in removable[keep:]:
        path.unlink()
    numbers = {_images_seen(path) for path in _newest_first(folder)}
    for path in folder.glob("[0-9]*.best"):
        if _images_seen(path) not in numbers:
            path.unlink()


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.safetensors"), key=lambda path: (_images_seen(path), path.name), reverse=True)


def _best_path(folder: Path, images_seen: int) -> Path:
    return folder / f"{images_seen:012d}.best"


def _link(source: Path, path: Path) -> None:
    """Make `path` a hard link to the file `source`, or a copy on disks without hard links."""
    with replacing(path) as draft:
        try:
            os.link(source, draft)
        except OSError:
            shutil.copyfile(source, draft)


def _images_seen(path: Path) -> int:
    return int(path.name.split(".")[0])


def _under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {path.removeprefix(prefix): value for path, value in tensors.items() if path.startswith(prefix)}


def _restore_previous(before: Path, path: Path) -> None:
    if before.exists() and not path.exists():
        os.replace(before, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _flush_all(path: Path) -> None:
    """Flush a file, or a folder with all its files, to disk."""
    if path.is_dir():
        for inside in path.iterdir():
            _flush_all(inside)
    _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
