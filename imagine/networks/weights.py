"""Find folders of weights and load models from them strictly.

The pipeline, the judge and the command line find their files through this module. A folder of weights is a diffusers
pipeline folder (model_index.json and one folder per component) that also contains our adapters, the judge and the face
finder. If a file lacks tensors or has unknown ones, diffusers and transformers only warn: they initialise the first
randomly and ignore the second. Here a missing, unexpected, renamed or misshapen tensor is an error.

Nothing is downloaded unless the caller names a hub repository.
"""

import difflib
import hashlib
import importlib
import inspect
import json
import logging
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagine.errors import WeightsError
from imagine.networks.files import is_safetensors, variants_in, why_unreadable
from imagine.networks.vision_names import names_in, to_our_tensor
from imagine.paths import PACKAGE, as_path, kind_of, shorten_path

if TYPE_CHECKING:  # headers and folders are checked without torch, which takes a second to import
    import torch
    from torch import Tensor, nn

FORMAT_VERSION = "1"
INDEX = "model_index.json"
PIPELINE = "ImaginePipeline"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")  # options of snapshot_download

COMPONENTS = {  # the classes that our model_index.json may name; no other class is imported from a folder's index
    "unet": ("diffusers", r"UNet2DConditionModel"),
    "vae": ("diffusers", r"\w*Autoencoder\w+"),
    "scheduler": ("diffusers", r"\w+Scheduler"),
    "text_encoder": ("transformers", r"CLIPTextModel(WithProjection)?"),
    "text_encoder_2": ("transformers", r"T5EncoderModel"),
    "text_encoder_3": ("transformers", r"T5EncoderModel"),
    "tokenizer": ("transformers", r"CLIPTokenizer(Fast)?"),
    "tokenizer_2": ("transformers", r"T5Tokenizer(Fast)?"),
    "tokenizer_3": ("transformers", r"ByT5Tokenizer"),
    "image_encoder": ("imagine.networks.encoders", r"VisionEncoder"),
}
ADAPTERS = ("text_adapter", "adapter")  # our own components, which diffusers cannot save or load

_COLOURS = re.compile(r"\x1b\[[\d;]*m")  # escape sequences of terminals
# In the warnings of diffusers, and in the reports of transformers.
_RANDOM = re.compile(
    r"weights of (?P<first>\w+) were not initialized|(?P<last>\w+) LOAD REPORT(?=.*\bMISSING\b)", re.DOTALL
)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.md", "*.png"]
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
ALIGNMENT = 64  # bytes; torch aligns every tensor that it allocates to a multiple of this
_SAMPLES = 4096  # the most entries of a tensor that are hashed for a fingerprint


def default_folder() -> Path:
    """Return the shipped weights, from a checkout or an installed wheel. Raise WeightsError if there are none."""
    for folder in (PACKAGE.parent / "weights", PACKAGE / "_weights"):
        if (folder / INDEX).is_file():
            return folder
    raise WeightsError(
        "No weights are installed with imagine; make them with `make weights`, or name a folder of weights."
    )


def resolve_folder(
    source: str | os.PathLike[str] | None = None,
    other_classes: Collection[str] = (),
    variant: str | None = None,
    use_safetensors: bool | None = None,
    **hub: Any,
) -> Path:
    """Return the folder for `source`: the default for None, else a folder, else a hub repository owner/name.

    `other_classes` names further pipeline classes to accept, and `variant` and `use_safetensors` select among their
    files, as in diffusers. `hub` holds options of huggingface_hub.snapshot_download (revision, token, cache_dir,
    local_files_only ...).
    Raises WeightsError if there are no weights there.
    """
    if source is None:
        return default_folder()
    folder = as_path(source)
    kind = kind_of(folder, WeightsError)
    if kind == "folder":
        read_index(folder, other_classes)
        return folder
    if kind != "nothing":
        raise WeightsError(f"{source} is a file; name the folder of weights that holds {INDEX}.")
    if is_hub_id(source):
        return _fetch(os.fspath(source), other_classes, {"variant": variant, "use_safetensors": use_safetensors}, hub)
    raise WeightsError(
        f"There is no folder {shorten_path(source)}; name a folder of weights, or leave it out for the default."
    )


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Return whether a path that does not exist can be a hub repository owner/name."""
    # A mistyped path in an existing folder must not cause a network request.
    return _HUB_ID.fullmatch(os.fspath(source)) is not None and kind_of(Path(source).parent, WeightsError) != "folder"


def read_index(folder: Path, other_classes: Collection[str] = ()) -> dict[str, Any]:
    """Return the content of model_index.json. Raise WeightsError unless its class is ours or in `other_classes`."""
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(
            f"{folder} is not a weights folder, since it has no {INDEX}; name the folder that holds one."
        ) from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder / INDEX} cannot be read as JSON; copy or download the weights again.") from error
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name in other_classes:
        return index
    if name != PIPELINE:
        others = ", or a pipeline of diffusers that takes references" if other_classes else ""
        raise WeightsError(f"{folder} holds a {name}, not an {PIPELINE}; name a folder that imagine saved{others}.")
    version = index.get("format_version")
    if version != FORMAT_VERSION:
        raise WeightsError(
            f"{folder} has format version {version}, but this version of imagine reads {FORMAT_VERSION}; "
            "update imagine, or use weights made for this version."
        )
    return index


def check_components(folder: Path, index: Mapping[str, Any], given: Collection[str] = ()) -> None:
    """Raise WeightsError unless the index names an allowed class for every component that is not in `given`."""
    for name, (library, pattern) in COMPONENTS.items():
        if name in given:
            continue
        entry = index.get(name)
        if not entry or entry == [None, None]:
            raise WeightsError(f"{folder / INDEX} does not mention {name}; copy or download the weights again.")
        is_allowed = isinstance(entry, list) and len(entry) == 2 and entry[0] == library
        if not is_allowed or not isinstance(entry[1], str) or not re.fullmatch(pattern, entry[1]):
            raise WeightsError(
                f"{folder / INDEX} names {entry} as its {name}, a class that is not allowed; copy or download the "
                f"weights again, or give the object as {name}=."
            )
    for name in ADAPTERS:
        if index.get(name, [None, None]) != [None, None]:
            raise WeightsError(f"{folder / INDEX} names a class for {name}; copy or download the weights again.")


def check_statistics(channels: int, **statistics: Any) -> None:
    """Raise WeightsError unless each of the given statistics that is not None has one number per latent channel."""
    for name, values in statistics.items():
        if values is None:
            continue
        if not isinstance(values, (list, tuple)) or not all(
            isinstance(each, (int, float)) and math.isfinite(each) for each in values
        ):
            raise WeightsError(f"{name} must be a list of {channels} finite numbers, one for each latent channel.")
        if len(values) != channels:
            raise WeightsError(
                f"{name} holds {len(values)} numbers for {channels} latent channels: give one for each channel."
            )


def load_model(
    folder: Path, library: str, class_name: str, dtype: "torch.dtype", allow_bin: bool = False, **options: Any
) -> Any:
    """Load one diffusers or transformers model from a component folder, in eval mode, with strict key matching.

    Weights stored in half precision are converted to `dtype`. If the folder holds one variant only, such as "fp16", it
    is loaded without naming it. `allow_bin` also reads a folder that has only .bin files, as weights without code.
    Raises WeightsError if the folder does not fit, or if a number in it is not finite.
    """
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} has no config.json; copy or download the weights again.")
    options = {**_file_options(folder, options.pop("variant", None), allow_bin), **options}
    try:
        cls = getattr(importlib.import_module(library), class_name)
        options = {"local_files_only": True, **options, dtype_argument(cls): dtype}
        with quiet_libraries():  # their warnings become the error below
            model, found = cls.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except Exception as error:  # each library and file format raises its own errors; the user's remedy is the same
        reason = str(error).strip().split("\n")[0][:200]
        raise WeightsError(
            f"The weights in {folder} cannot be loaded ({reason}); copy or download them again."
        ) from error
    check_tensor_names(
        str(folder),
        missing=list(found["missing_keys"]),
        unexpected=list(found["unexpected_keys"]),
        misshapen=[str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in found["mismatched_keys"]],
    )
    _align(model)
    from imagine.networks.finite import check_finite

    check_finite(str(folder), model.state_dict())
    return model.eval()


def _file_options(folder: Path, variant: str | None, allow_bin: bool) -> dict[str, Any]:
    """Return the loader's options for the files of a component folder. Raise WeightsError if they cannot be read."""
    files = sorted(folder.glob("*.safetensors"))
    if not files and allow_bin and any(folder.glob("*.bin")):
        return {"use_safetensors": False, "weights_only": True}
    if not files and any(folder.glob("*.bin")):
        raise WeightsError(
            f"{folder} holds its weights as .bin only, a pickle, which is not read here; use weights that were saved "
            "as safetensors."
        )
    if not files:
        raise WeightsError(f"{folder} has no safetensors file; copy or download the weights again.")
    found = variants_in(folder)
    chosen = "" if variant is None else variant
    if chosen not in found and len(found) == 1 and variant is None:
        chosen = min(found)
    elif found and chosen not in found:
        lacking = f"of the variant {chosen!r}" if chosen else "without a variant"
        known = " or ".join(f"give variant={each!r}" if each else "leave variant out" for each in sorted(found))
        raise WeightsError(f"{folder} has no files {lacking}; {known}.")
    if broken := next((file for file in files if not is_safetensors(file)), None):
        raise WeightsError(why_unreadable(broken))
    return {"use_safetensors": True, **({"variant": chosen} if chosen else {})}


def _align(model: "nn.Module") -> None:
    """Copy tensors at unaligned addresses, as in a file, to the alignment that torch's allocator gives.

    CPU kernels sum in another order at unaligned addresses, so a loaded model could differ from the saved one in the
    last bits of a picture. Tensors that were converted to another precision have already been copied.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def check_tokenizer(folder: Path, class_name: str) -> None:
    """Raise WeightsError if a tokenizer's files are missing; transformers would build one with an empty vocabulary."""
    needed = ("tokenizer_config.json",) if class_name.startswith("ByT5") else _VOCABULARIES
    if not any((folder / name).is_file() for name in needed):
        raise WeightsError(f"{folder} has no {' or '.join(needed)}; copy or download the weights again.")


def check_tensor_names(
    where: str, missing: Sequence[str] = (), unexpected: Sequence[str] = (), misshapen: Sequence[str] = ()
) -> None:
    """Raise WeightsError for the file or folder `where` if any tensor name is given."""
    problems = []
    if missing:
        problems.append(f"lacks {_some(missing)}")
    if unexpected:
        near = difflib.get_close_matches(min(unexpected), missing, n=1)
        problems.append(
            f"has the unknown tensor {_some(unexpected)}" + (f" (is it {near[0]}, renamed?)" if near else "")
        )
    if misshapen:
        problems.append(f"holds {_some(misshapen)} in another shape than its config.json says")
    if problems:
        raise WeightsError(f"The file in {where} {' and '.join(problems)}; copy or download the weights again.")


def remove_local_paths(folder: Path) -> None:
    """Remove from the configurations in a saved folder the local path that each model was loaded from."""
    for file in folder.rglob("*.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def fingerprint(module: "nn.Module") -> str:
    """Return a fingerprint of an encoder's weights in hexadecimal digits; compare two with `same_encoder`.

    It hashes the names, shapes and up to 4,096 evenly spaced entries of every tensor. Training changes all entries of a
    network, so a sample is enough, and even the largest encoders are hashed quickly. Entries are rounded to bfloat16 in
    two ways, directly and through float16. Weights in full precision therefore have two hashes of 16 digits, "a-b", if
    the two differ, and each half precision has one of them. A vision tower of transformers is hashed in our layout.
    """
    return fingerprint_of(module.state_dict())


def fingerprint_of(tensors: "Mapping[str, Tensor]") -> str:
    """Return the `fingerprint` of a module with these tensors, for example those of a file."""
    import torch

    names = names_in(tensors)
    ours = {name: (name,) for name in tensors} if names is None else {f"tower.{n}": each for n, each in names.items()}
    digests = hashlib.sha256(), hashlib.sha256()
    for name, parts in sorted(ours.items()):
        tensor = tensors[name] if names is None else to_our_tensor(tensors, parts)
        flat = tensor.detach().reshape(-1)
        sample: Tensor = flat[:: max(1, -(-flat.numel() // _SAMPLES))].cpu()
        halved = sample.half() if sample.is_floating_point() else sample
        for digest, each in zip(digests, (sample, halved), strict=True):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(each.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return "-".join(dict.fromkeys(digest.hexdigest()[:16] for digest in digests))


def same_encoder(one: str, other: str) -> bool:
    """Return whether two fingerprints are of the same encoder, whatever its precision and layout.

    The text after a colon names the output that was used, and must be equal too.
    """
    (first, _, output), (second, _, other_output) = one.partition(":"), other.partition(":")
    return output == other_output and not set(first.split("-")).isdisjoint(second.split("-"))


def _fetch(repository: str, other_classes: Collection[str], choice: Mapping[str, Any], hub: Mapping[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    with fetching(repository):
        index = read_index(Path(hf_hub_download(repository, INDEX, **hub)).parent, other_classes)
        if index["_class_name"] == PIPELINE:
            return Path(snapshot_download(repository, allow_patterns=_HUB_FILES, **hub))
        from diffusers import DiffusionPipeline  # it selects the needed files of such a repository

        return Path(DiffusionPipeline.download(repository, **choice, **hub))


@contextmanager
def fetching(repository: str) -> Iterator[None]:
    """Turn any error while `repository` is fetched from the hub into a WeightsError."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # no network, no such repository or no permission: the remedy is the same
        raise WeightsError(
            f"There is no folder {repository}, and a hub repository of that name could not be fetched; check the name "
            "and your connection, or download it on another machine and give the path of the local folder."
        ) from error


def fetch_component(source: str | os.PathLike[str], **hub: Any) -> Path:
    """Return the folder of one model or tokenizer: a folder, or a hub repository owner/name, which is downloaded."""
    folder = as_path(source)
    if kind_of(folder, WeightsError) == "folder":
        return folder
    if not is_hub_id(source):
        raise WeightsError(f"There is no folder {shorten_path(source)}; check the path.")
    from huggingface_hub import snapshot_download

    with fetching(os.fspath(source)):
        folder = Path(snapshot_download(os.fspath(source), allow_patterns=_HUB_FILES, **hub))
        if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
            snapshot_download(os.fspath(source), allow_patterns=["*.bin"], **hub)
        return folder


def adapter_path(source: str | os.PathLike[str], **hub: Any) -> Path:
    """Return the file or folder of a saved adapter: a path, or a hub repository owner/name, which is downloaded.

    A folder may also hold the adapter in its folder `adapter`, as folders of weights do. `hub` holds options of a
    download. Raises WeightsError if they are unknown or not needed, or if the repository cannot be fetched.
    """
    if unknown := [name for name in hub if name not in HUB_OPTIONS]:
        raise WeightsError(f"There is no option {unknown[0]}: choose from {', '.join(HUB_OPTIONS)}.")
    path = as_path(source)
    if kind_of(path, WeightsError) == "nothing" and is_hub_id(source):
        from huggingface_hub import snapshot_download

        with fetching(os.fspath(source)):
            patterns = ["adapter*.safetensors", "adapter/*.safetensors", "*.md"]
            path = Path(snapshot_download(os.fspath(source), allow_patterns=patterns, **hub))
    elif hub:
        raise WeightsError(f"{next(iter(hub))} is an option of a hub id, and {source} is none: leave it out.")
    is_weights = path.is_dir() and not any(path.glob("adapter*.safetensors")) and (path / "adapter").is_dir()
    return path / "adapter" if is_weights else path


def dtype_argument(cls: type) -> str:
    """Return the name of `from_pretrained`'s precision argument.

    It is torch_dtype in diffusers before 0.40, and dtype in transformers (from 4.56) and newer diffusers.
    """
    if cls.__module__.startswith("transformers."):
        return "dtype"
    return "dtype" if '"dtype"' in inspect.getsource(cls.from_pretrained) else "torch_dtype"  # type: ignore[attr-defined]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppress the progress bars and warnings of diffusers and transformers while they load or save."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bar in before:
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()


@contextmanager
def refuse_random_weights(folder: Path) -> Iterator[None]:
    """Raise WeightsError if a pipeline's loader initialises weights at random because a file lacks them.

    diffusers' pipelines load their components without returning what was missing. Both libraries log it as a warning,
    so the warnings are collected here, and not printed.
    """
    collected = _Collected()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    with quiet_libraries():
        before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
        try:
            for logger in loggers:
                logger.handlers, logger.propagate = [collected], False
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, handlers, propagates, level in before:
                logger.handlers, logger.propagate = handlers, propagates
                logger.setLevel(level)
    for message in collected.messages:
        if found := _RANDOM.search(message):
            raise WeightsError(
                f"{folder} lacks weights of its {found['first'] or found['last']}, which would become random numbers: "
                "copy or download it again. If it was saved while LoRA was loaded, save it without."
            )


class _Collected(logging.Handler):
    """Collects the messages of log records, without colours."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(_COLOURS.sub("", record.getMessage()))


def _some(names: Sequence[str]) -> str:
    return min(names) if len(names) == 1 else f"{min(names)} and {len(names) - 1} more"
