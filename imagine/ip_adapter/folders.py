"""Import and export IP-Adapters folder by folder, for `imagine import-ip-adapter` and `export-ip-adapter`.

An imported IP-Adapter is a folder with the layout of our weights, so that training and pipelines can start from it:

    adapter/adapter.safetensors    the vision branch, in our format
    image_encoder/                 its encoder in our format, if one was found
    unet/config.json               the configuration of its denoiser, without weights, which belong to the base
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from imagine.adapter.adapter import FILE_NAME, Adapter, find_file
from imagine.blueprints.published import read_base
from imagine.errors import WeightsError
from imagine.ip_adapter.export import ExportReport, export_adapter
from imagine.ip_adapter.reading import (
    ENCODER_FOLDER,
    check_encoder,
    find_weights_file,
    import_adapter,
    load_encoder,
    read_ip_adapter,
    read_pickle,
)
from imagine.networks import weights
from imagine.networks.models import empty_denoiser
from imagine.networks.saving import write_whole
from imagine.networks.vision_conversion import from_transformers

ADAPTER, DENOISER = "adapter", "unet"
ENCODERS = ("vision_encoder", "image_encoder")  # folders of the encoder of references, in order of preference
OURS, THEIRS = ("imagine.networks.encoders", "VisionEncoder"), ("transformers", "CLIPVisionModelWithProjection")


def import_folder(
    source: str,
    base: str,
    output: Path,
    subfolder: str | None = None,
    weight_name: str | None = None,
    image_encoder: str | None = None,
) -> dict[str, Any]:
    """Convert the IP-Adapter `source` to a folder in our layout, and return a report of strings and numbers.

    `base` is sdxl, sd15, portrait, a folder or a hub id (`imagine.blueprints.published`); its weights are not needed.
    The image encoder is read from the folder `image_encoder`, else from the one next to the file. Raises WeightsError
    or ConfigError if the source, the base or the encoder does not fit.
    """
    denoiser = empty_denoiser(read_base(base).components[DENOISER].config)
    path = find_weights_file(source, subfolder, weight_name)
    file = read_ip_adapter(path)
    adapter, report = import_adapter(file, denoiser)
    place = Path(image_encoder).expanduser() if image_encoder else path.parent / ENCODER_FOLDER
    encoder = None
    if image_encoder and not place.is_dir():
        raise WeightsError(f"There is no folder {image_encoder}: give the folder that holds the image encoder.")
    if place.is_dir():
        theirs = load_encoder(place.parent, place.name, stored_precision(place), {})
        check_encoder(file.layout, theirs)
        encoder = from_transformers(theirs)
    with write_whole(output) as folder, weights.quiet_libraries():
        denoiser.save_config(folder / DENOISER)
        if encoder is not None:
            encoder.save_pretrained(folder / ENCODER_FOLDER)
        weights.remove_local_paths(folder)
        adapter.save(folder / ADAPTER, adapter.metadata)
    notes = list(report.notes)
    if encoder is None:
        notes.append("No image encoder is next to the file: give it with --image-encoder.")
    return {**report.as_dict(), "output": str(output), "image_encoder": encoder is not None, "notes": notes}


def export_folder(folder: Path, file: Path, base: str | None = None) -> ExportReport:
    """Export the identity adapter of a weights folder, or of an imported IP-Adapter, as a standard file.

    The folder holds adapter/, image_encoder/ and unet/config.json; `base` replaces unet/config.json. A folder with only
    adapter.safetensors is also accepted. Raises WeightsError or ConfigError if something is missing or cannot be
    exported.
    """
    place = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
    if not find_file(place).is_file():
        raise WeightsError(f"There is no {ADAPTER}/{FILE_NAME} in {folder}: give a folder that holds an adapter.")
    if base is not None:
        config: Mapping[str, Any] = read_base(base).components[DENOISER].config
    elif (folder / DENOISER / "config.json").is_file():
        config = json.loads((folder / DENOISER / "config.json").read_text(encoding="utf-8"))
    else:
        raise WeightsError(
            f"{folder} has no {DENOISER}/config.json, so its adapter's denoiser is unknown: give the base with --base."
        )
    denoiser = empty_denoiser(config)
    adapter = Adapter.load(place, denoiser)
    return export_adapter(adapter, denoiser, file, _encoder_in(folder))


def stored_precision(folder: Path) -> torch.dtype:
    """Return the dtype of a model folder's floating-point weights; float32 if there are none.

    A .bin file is read if there is no safetensors file, without running code in it.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                dtype: torch.dtype = opened.get_tensor(name).dtype
                if dtype.is_floating_point:
                    return dtype
        return torch.float32
    tensors = (tensor for file in sorted(folder.glob("*.bin")) for tensor in read_pickle(file)[0].values())
    return next((tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point), torch.float32)


def _encoder_in(folder: Path) -> Any:
    """Load the encoder, ours or transformers', from a weights folder. Return None if there is none."""
    for name in ENCODERS:
        place = folder / name
        if (place / "config.json").is_file():
            config = json.loads((place / "config.json").read_text(encoding="utf-8"))
            ours = config.get("_class_name") == "VisionEncoder"
            library, cls = OURS if ours else THEIRS
            return weights.load_model(place, library, cls, stored_precision(place))
    return None
