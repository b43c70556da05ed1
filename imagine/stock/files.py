"""Files of stock pipelines that know people: their parts by name, and our adapters beside them.

A folder stays one that diffusers loads by itself; what it does not know lies in folders of its own, `adapter`,
`text_adapter` and `ip_0`, `ip_1` ..., and in entries of model_index.json that it passes over.
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
from imagine.people.reference_encoder import saved_metadata

SCALE_KEY = "ip_adapter_scale"  # what a saved IP-Adapter says of the strength it had, as JSON

_CLASSES = {  # of parts that may be given by the name of a folder or a hub repository
    "t5_encoder": ("transformers", "T5EncoderModel"),
    "byt5_encoder": ("transformers", "T5EncoderModel"),
    "vision_encoder": ("imagine.networks.encoders", "VisionEncoder"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "controlnet": ("diffusers", "ControlNetModel"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def load_parts(given: Mapping[str, Any], dtype: "torch.dtype | None", **hub: Any) -> dict[str, Any]:
    """Those of a pipeline's parts that were given by name, loaded; an encoder's name also stands for its tokenizer.

    Raises WeightsError, in one sentence that names the part, if a name is no folder and cannot be fetched.
    """
    named = {name: each for name, each in given.items() if isinstance(each, (str, os.PathLike))}
    for name in ("t5", "byt5"):
        if f"{name}_encoder" in named and given.get(f"{name}_tokenizer") is None:
            named[f"{name}_tokenizer"] = named[f"{name}_encoder"]
    return {name: _load_part(name, source, dtype, hub) for name, source in named.items()}


def _load_part(name: str, source: Any, dtype: "torch.dtype | None", hub: Mapping[str, Any]) -> Any:
    if name not in _CLASSES and name not in ("t5_tokenizer", "byt5_tokenizer"):
        raise WeightsError(f"{name}={os.fspath(source)!r} cannot be loaded by name: load it, and give the object.")
    try:
        folder = _folder(source, hub)
    except WeightsError as error:
        raise WeightsError(
            f"{name}={os.fspath(source)!r} is no folder here and could not be fetched from the hub: download it where "
            f"there is a network, and give the local folder, as in {name}='path/to/folder'."
        ) from error
    if name.endswith("tokenizer"):
        return _load_tokenizer(folder)
    if _config(folder).get("model_type") == "clip":
        raise WeightsError(
            f"{folder} holds a whole CLIP model, and {name} is its vision half: give "
            f"{name}=CLIPVisionModelWithProjection.from_pretrained({os.fspath(folder)!r}), a class of transformers."
        )
    library, class_name = _CLASSES[name]
    if name == "vision_encoder" and _config(folder).get("_class_name") != class_name:
        library, class_name = _CLASSES["image_encoder"]
    return weights.load_model(folder, library, class_name, dtype or torch.float32)


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with weights.quiet_libraries():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{folder} holds no tokenizer that can be loaded; copy or download it again.") from error


def _folder(source: Any, hub: Mapping[str, Any]) -> Path:
    """The folder that a name means: a local one, a hub repository owner/name, or owner/name/and/a/folder inside one."""
    owner, *rest = os.fspath(source).split("/")
    repository, inside = "/".join([owner, *rest[:1]]), "/".join(rest[1:])
    # A mistyped path below a folder that exists must not turn into a question to the network.
    if not inside or Path(owner).exists() or Path(source).is_dir() or not weights.is_hub_id(repository):
        return weights.fetch_component(source, **hub)
    folder = fetch(repository, [f"{inside}/*.{kind}" for kind in ("json", "safetensors", "txt", "model")], hub) / inside
    if not folder.is_dir():
        raise WeightsError(f"The hub repository {repository} has no folder {inside}; check the name.")
    return folder


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}  # which loading it then says in a sentence


def normalise_dtype_argument(kwargs: dict[str, Any]) -> "torch.dtype | None":
    """Call the precision in a loader's arguments as this diffusers does; return it, unless it is "auto" or so."""
    older = kwargs.pop("torch_dtype", None)
    dtype = kwargs.pop("dtype", older)
    if dtype is not None:
        from diffusers import DiffusionPipeline

        kwargs[weights.dtype_argument(DiffusionPipeline)] = dtype
    return dtype if isinstance(dtype, torch.dtype) else None


def save_adapters(
    folder: Path,
    adapters: Mapping[str, Adapter | None],
    scales: Mapping[str, Any],
    encoder: str | None,
    ours: Collection[str],
) -> None:
    """Put adapters by name into a folder that diffusers has just saved, and take absent ones of earlier saves out.

    `scales` are the present strengths of IP-Adapters, which come back with them;
    `encoder` is the vision encoder's fingerprint; `ours` are components whose absence model_index.json need not tell.
    """
    for path in folder.glob("ip_*"):
        if path.name not in adapters:
            shutil.rmtree(path)
    for name, adapter in adapters.items():
        if adapter is None:
            shutil.rmtree(folder / name, ignore_errors=True)
        else:
            more = {} if encoder is None or name in scales else {"encoder_fingerprint": encoder}
            metadata = {
                **more,
                **saved_metadata(adapter),
            }  # its own word for the encoder that it was trained with counts
            adapter.save(
                folder / name, {**metadata, SCALE_KEY: json.dumps(scales[name])} if name in scales else metadata
            )
    weights.remove_local_paths(folder)  # where the parts came from is nobody's business who gets them next
    index = json.loads((folder / weights.INDEX).read_text(encoding="utf-8"))
    entries = {name: each for name, each in index.items() if name not in ours or each != [None, None]}
    (folder / weights.INDEX).write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def saved_adapter_folders(folder: Path) -> list[Path]:
    """The adapters in a pipeline's folder, in the order in which they are attached."""
    names = ["text_adapter", "adapter", *(f"ip_{number}" for number in range(len(list(folder.glob("ip_*")))))]
    return [folder / name for name in names if (folder / name).is_dir()]


def saved_scale(adapter: Adapter) -> Any:
    """The strength that an IP-Adapter had when it was saved, as set_ip_adapter_scale had made it."""
    return json.loads(adapter.metadata.get(SCALE_KEY, "1.0"))
