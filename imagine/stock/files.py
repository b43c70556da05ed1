"""Load components of stock pipelines by name, and save our adapters next to the stock components.

diffusers can still load a saved folder without us. Our additions are in separate folders (`adapter`, `text_adapter`,
`ip_0`, `ip_1` ...) and in entries of model_index.json that diffusers ignores.
"""

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from imagine.adapter.adapter import Adapter
from imagine.errors import WeightsError
from imagine.ip_adapter.reading import fetch
from imagine.networks import weights
from imagine.networks.files import variant_of
from imagine.people.reference_encoder import saved_metadata
from imagine.pipeline.families import class_names

SCALE_KEY = "ip_adapter_scale"  # metadata key of a saved IP-Adapter's scale, as JSON

_CLASSES = {  # classes of the components that may be given as the name of a folder or a hub repository
    "t5_encoder": ("transformers", "T5EncoderModel"),
    "byt5_encoder": ("transformers", "T5EncoderModel"),
    "vision_encoder": ("imagine.networks.encoders", "VisionEncoder"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "controlnet": ("diffusers", "ControlNetModel"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def load_parts(
    given: Mapping[str, Any], dtype: "torch.dtype | None", variant: str | None = None, **hub: Any
) -> dict[str, Any]:
    """Load the components that were given by name; an encoder's name also loads its tokenizer.

    The files of a `variant` are loaded from the folders that have them.
    Raises WeightsError that names the component if its name is not a folder and cannot be downloaded.
    """
    named = {name: each for name, each in given.items() if isinstance(each, (str, os.PathLike))}
    for name in ("t5", "byt5"):
        if f"{name}_encoder" in named and given.get(f"{name}_tokenizer") is None:
            named[f"{name}_tokenizer"] = named[f"{name}_encoder"]
    return {name: _load_part(name, source, dtype, variant, hub) for name, source in named.items()}


def _load_part(name: str, source: Any, dtype: "torch.dtype | None", variant: str | None, hub: Mapping[str, Any]) -> Any:
    if name not in _CLASSES and name not in ("t5_tokenizer", "byt5_tokenizer"):
        raise WeightsError(f"{name}={os.fspath(source)!r} cannot be loaded by name: load it, and give the object.")
    try:
        folder = _folder(source, hub)
    except WeightsError as error:
        raise WeightsError(
            f"{name}={os.fspath(source)!r} is not a local folder and could not be downloaded from the hub: download it "
            f"on a machine with a network, and give the local folder, as in {name}='path/to/folder'."
        ) from error
    if name.endswith("tokenizer"):
        return _load_tokenizer(folder)
    if _config(folder).get("model_type") == "clip":
        raise WeightsError(
            f"{folder} holds a whole CLIP model, but {name} needs only its vision encoder: give "
            f"{name}=CLIPVisionModelWithProjection.from_pretrained({os.fspath(folder)!r}), a class of transformers."
        )
    library, class_name = _CLASSES[name]
    if name == "vision_encoder" and _config(folder).get("_class_name") != class_name:
        library, class_name = _CLASSES["image_encoder"]
    options = {"variant": variant} if variant and any(folder.glob(f"*.{variant}.*")) else {}
    return weights.load_model(folder, library, class_name, dtype or torch.float32, allow_bin=True, **options)


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with weights.quiet_libraries():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{folder} holds no tokenizer that can be loaded; copy or download it again.") from error


def _folder(source: Any, hub: Mapping[str, Any]) -> Path:
    """Resolve a name to a folder: a local one, a hub repository owner/name, or owner/name/and/a/folder inside one."""
    owner, *rest = os.fspath(source).split("/")
    repository, inside = "/".join([owner, *rest[:1]]), "/".join(rest[1:])
    # A mistyped path below an existing folder must not cause a network request.
    if not inside or Path(owner).exists() or Path(source).is_dir() or not weights.is_hub_id(repository):
        return weights.fetch_component(source, **hub)
    patterns = [f"{inside}/*.{kind}" for kind in ("json", "safetensors", "txt", "model")]
    folder = fetch(repository, patterns, hub) / inside
    if not any(folder.glob("*.safetensors")):
        fetch(repository, [f"{inside}/*.bin"], hub)
    if not folder.is_dir():
        raise WeightsError(f"The hub repository {repository} has no folder {inside}; check the name.")
    return folder


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}  # loading the model then raises the error


def normalise_dtype_argument(kwargs: dict[str, Any]) -> "torch.dtype | None":
    """Rename the dtype argument in `kwargs` as this version of diffusers names it. Return it if it is a torch.dtype."""
    older = kwargs.pop("torch_dtype", None)
    dtype = kwargs.pop("dtype", older)
    if dtype is not None:
        from diffusers import DiffusionPipeline

        kwargs[weights.dtype_argument(DiffusionPipeline)] = dtype
    return dtype if isinstance(dtype, torch.dtype) else None


def choose_variant(folder: Path, variant: str | None, given: Collection[str]) -> str | None:
    """Return the variant to load from a saved pipeline: `variant`, or without it the only one that the folder holds.

    given: components that are not read from the folder. Raises WeightsError if the folder lacks the variant, or holds
    several and no files without one.
    """
    index = weights.read_index(folder, class_names())
    names = [name for name, entry in index.items() if name not in given and isinstance(entry, list) and any(entry)]
    found = [
        {each for file in (folder / name).glob("*") if (each := variant_of(file.name)) is not None} for name in names
    ]
    known = set[str]().union(*found)
    if variant is not None and known and variant not in known:
        choices = " or ".join(f"give variant={each!r}" if each else "leave variant out" for each in sorted(known))
        raise WeightsError(f"{folder} has no files of the variant {variant!r}; {choices}.")
    needed = set[str]().union(*(each for each in found if "" not in each))
    if variant is None and len(needed) > 1:
        choices = " or ".join(f"variant={each!r}" for each in sorted(needed))
        raise WeightsError(f"{folder} has no files without a variant; give {choices}.")
    return needed.pop() if variant is None and needed else variant


def save_adapters(
    folder: Path,
    adapters: Mapping[str, Adapter | None],
    scales: Mapping[str, Any],
    encoder: str | None,
    ours: Collection[str],
    variant: str | None = None,
) -> None:
    """Save adapters by name into a folder that diffusers has just saved, and delete those of earlier saves.

    scales: the current scales of IP-Adapters by name, which loading restores. encoder: the vision encoder's
    fingerprint. ours: components that are removed from model_index.json if they are absent. variant: part of the
    files' names.
    """
    for path in folder.glob("ip_*"):
        if path.name not in adapters:
            shutil.rmtree(path)
    for name, adapter in adapters.items():
        if adapter is None:
            shutil.rmtree(folder / name, ignore_errors=True)
        else:
            more = {} if encoder is None or name in scales else {"encoder_fingerprint": encoder}
            # If the adapter names the encoder that it was trained with, that entry takes precedence.
            metadata = {**more, **saved_metadata(adapter)}
            scale = {SCALE_KEY: json.dumps(scales[name])} if name in scales else {}
            adapter.save(folder / name, {**metadata, **scale}, variant)
    weights.remove_local_paths(folder)  # local paths are private and useless to the next user
    index = json.loads((folder / weights.INDEX).read_text(encoding="utf-8"))
    entries = {name: each for name, each in index.items() if name not in ours or each != [None, None]}
    (folder / weights.INDEX).write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def saved_adapter_folders(folder: Path) -> list[Path]:
    """Return the adapter folders in a pipeline's folder, in the order in which they are attached."""
    names = ["text_adapter", "adapter", *(f"ip_{number}" for number in range(len(list(folder.glob("ip_*")))))]
    return [folder / name for name in names if (folder / name).is_dir()]


def saved_scale(adapter: Adapter) -> Any:
    """Return the scale of an IP-Adapter at the time it was saved, in the form that set_ip_adapter_scale stores."""
    return json.loads(adapter.metadata.get(SCALE_KEY, "1.0"))
