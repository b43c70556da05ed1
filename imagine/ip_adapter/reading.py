"""Import standard IP-Adapter files: read a file and convert it to an adapter with one branch for one denoiser.

    read_ip_adapter    reads a file, a folder, a hub id or a state dict strictly (`imagine.ip_adapter.layout`)
    import_adapter     converts it to an adapter that gives the same pictures as diffusers
    load_encoder       loads the image encoder next to the file

A file numbers the cross-attention layers in the order down, up, middle, in which a UNet2DConditionModel registers them.
The gate of an imported branch is exactly one, so that exporting it reproduces the file.
"""

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from imagine.adapter.adapter import Adapter, BranchSpec
from imagine.adapter.attention import GATE_GAIN, attention_layers
from imagine.adapter.projections import Kind
from imagine.errors import WeightsError
from imagine.ip_adapter.layout import (
    BRANCHES,
    FAMILIES,
    LORA_LAYERS,
    PROJECTION,
    Layout,
    Shape,
    difference,
    encoder_of,
    licence_of,
    read_layout,
    standard_names,
)
from imagine.ip_adapter.references import FACE_LICENCE, crop_of, has_shortcut
from imagine.networks import weights
from imagine.networks.encoders import VisionEncoder
from imagine.networks.files import is_pickle, why_unreadable
from imagine.networks.finite import check_finite
from imagine.paths import kind_of, why_no_file
from imagine.people.crops import CropKind
from imagine.people.readings import CROP, FACE_LAYER, LAYER

ENCODER_FOLDER = "image_encoder"
_CHECKPOINTS = ("state_dict", "model_state_dict", "module", "model")  # names of the state dict in training checkpoints


@dataclass(frozen=True)
class IPAdapterFile:
    """A standard file that was read and checked: its tensors under their flat names, and its layout."""

    origin: str  # path of the file, or "the state dict"
    layout: Layout
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    licence: str | None
    notes: tuple[str, ...] = ()  # one sentence for each thing that was done to bring the file into the standard form


@dataclass(frozen=True)
class ImportReport:
    """What was imported; `used` maps each tensor of the file to the adapter's tensor."""

    origin: str
    variant: str
    tokens: int | None  # per picture; None: as many as the encoder has
    encoder: str
    base: str
    licence: str | None
    used: Mapping[str, str]
    parameters: int
    notes: tuple[str, ...] = ()  # what was done to bring the file into the standard form

    def as_dict(self) -> dict[str, Any]:
        """Return the report as strings, numbers and mappings."""
        return asdict(self)


def read_ip_adapter(
    source: "str | os.PathLike[str] | Mapping[str, Any]",
    subfolder: str | None = None,
    weight_name: str | None = None,
    **hub: Any,
) -> IPAdapterFile:
    """Read a file for SD 1.5 or SDXL from the place where diffusers' load_ip_adapter finds it.

    The file may be a base, Plus, Full, FaceID or FaceID Plus file, or InstantID's.

    `source` is a file (.safetensors; a .bin is read as weights only, so that no code in it runs), a folder or a hub id
    with `subfolder` and `weight_name`, or a state dict, nested ({"image_proj": ..., "ip_adapter": ...}) or flat. `hub`
    holds options of huggingface_hub.snapshot_download. Checkpoints of IP-Adapter's own trainer, and names with the
    prefixes of compiled and data-parallel modules, are converted; `notes` of the result say so. Raises WeightsError for
    anything that diffusers would drop or misread, and for numbers that are not finite.
    """
    if isinstance(source, Mapping):
        tensors, notes = _flat(source)
        return _checked("the state dict", tensors, {}, None, notes)
    file = find_weights_file(source, subfolder, weight_name, **hub)
    tensors, metadata, notes = _read(file)
    return _checked(str(file), tensors, metadata, licence_of(file, metadata), notes)


def read_file_layout(file: Path) -> Layout:
    """Describe an IP-Adapter file from the names and shapes of its tensors, without reading these where it can."""
    if is_pickle(file):
        shapes = {name: tuple(tensor.shape) for name, tensor in read_pickle(file)[0].items()}
    else:
        try:
            with safe_open(file, framework="pt") as opened:
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118  (not a dict)
        except (SafetensorError, OSError) as error:
            raise WeightsError(why_unreadable(file, "download it again")) from error
    names, _ = standard_names(shapes)
    return read_layout({name: shapes[stored] for stored, name in names.items()})


def find_weights_file(
    source: str | os.PathLike[str], subfolder: str | None = None, weight_name: str | None = None, **hub: Any
) -> Path:
    """Return the file that diffusers finds under these names. Only a hub id is downloaded.

    Without `weight_name` the folder must hold exactly one weights file. Raises WeightsError if no file is found.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if (kind := kind_of(path, WeightsError)) == "other" or os.fspath(source) == "-":
        raise WeightsError(why_no_file(source, kind))
    if not path.is_dir():
        if not weights.is_hub_id(source):
            raise WeightsError(f"There is no file or folder {source}: give an IP-Adapter file, a folder or a hub id.")
        if weight_name is None:
            raise WeightsError(f"{source} is a hub id: choose one of its files with weight_name (and subfolder).")
        path = fetch(os.fspath(source), ["/".join(filter(None, (subfolder, weight_name)))], hub)
    if weight_name is None:
        return _only_file(path / (subfolder or ""))
    for file in (path / weight_name, path / (subfolder or "") / weight_name):  # in diffusers' order
        if file.is_file():
            return file
    raise WeightsError(f"There is no file {weight_name} in {path / (subfolder or '')}: check its name and subfolder.")


def fetch(repository: str, patterns: Sequence[str], hub: Mapping[str, Any]) -> Path:
    """Download files of a hub repository, or find them in the cache. Return the repository's local folder."""
    from huggingface_hub import snapshot_download

    options = {name: value for name, value in hub.items() if value is not None}
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), **options))
    except Exception as error:  # no network, no such repository or no permission
        raise WeightsError(
            f"{', '.join(patterns)} of the hub repository {repository} could not be downloaded: check the name and "
            "the connection, or download it elsewhere and pass the local folder instead."
        ) from error


def import_adapter(
    file: IPAdapterFile,
    denoiser: nn.Module,
    name: str = "vision",
    crop: CropKind | None = None,
    shortcut: bool | None = None,
) -> tuple[Adapter, ImportReport]:
    """Create an adapter for this denoiser, with one branch `name`, from a file. The adapter is not attached yet.

    The denoiser may be on the meta device. `crop` is the part of a photo that the adapter was trained with, and
    `shortcut` is of FaceID Plus v2; by default both are known from the file's name and layout (`references`). The LoRA
    of a FaceID file becomes the adapter's. Raises WeightsError if the file was made for another base.
    """
    layers = cross_attention(denoiser)
    check_base(file, layers)
    layout, origin = file.layout, Path(file.origin).name
    assert layout.width is not None
    plus = layout.kind == "faceid-plus"
    spec = BranchSpec(
        name, layout.width, zero_init=False, projection=cast(Kind, layout.kind), input_width=layout.input_width,
        tokens=layout.tokens, inner_width=layout.inner_width, attention_width=layout.attention_width, absent="zeros",
        face_width=layout.face_width if plus else None,
        shortcut=plus and (has_shortcut(origin) if shortcut is None else shortcut),
        lora="presence" if layout.lora_rank else "strength",
    )  # fmt: skip
    with torch.device("meta"):
        adapter = Adapter(denoiser, [spec], layout.lora_rank)
    used = {f"{PROJECTION}{key}": f"projections.{name}.{key}" for key in _below(PROJECTION, file.tensors)}
    for number, layer in numbered(layers):
        for each in ("to_k", "to_v"):
            used[f"{BRANCHES}{number}.{each}_ip.weight"] = f"{layer}.{name}.{each}.weight"
    tensors = {ours: file.tensors[theirs] for theirs, ours in used.items()}
    tensors |= _low_rank_tensors(file, adapter, used)
    for layer in layers:
        tensors[f"{layer}.{name}.gate"] = torch.full_like(tensors[f"{layer}.{name}.to_v.weight"][:, 0], 1 / GATE_GAIN)
    adapter.load_state_dict(tensors, strict=True, assign=True)
    report = _report(file, used)
    adapter.metadata = {**_described(report, layout), CROP: crop or crop_of(layout, origin)}
    device = next(denoiser.parameters()).device
    return (adapter if device.type == "meta" else adapter.to(device)), report


def _low_rank_tensors(file: IPAdapterFile, adapter: Adapter, used: dict[str, str]) -> dict[str, Tensor]:
    """Return the LoRA of a file under the adapter's names, and record them in `used`; layers without LoRA get zeros.

    Raises WeightsError if a tensor is unknown or does not fit its layer.
    """
    stored = {each: file.tensors[f"{BRANCHES}{each}"] for each in _below(BRANCHES, file.tensors) if "_lora." in each}
    if not stored:
        return {}
    needed = {name: tensor for name, tensor in adapter.state_dict().items() if ".lora_" in name}
    tensors = {name: torch.zeros(tensor.shape) for name, tensor in needed.items()}
    wanted: dict[str, Shape] = {}
    for number, layer in enumerate(adapter.layers()):
        for each in LORA_LAYERS if any(name.startswith(f"{number}.") for name in stored) else ():
            target = "to_out.0" if each == "out" else f"to_{each}"
            for side, ours in (("down", "lora_A"), ("up", "lora_B")):
                theirs, name = f"{number}.to_{each}_lora.{side}.weight", f"{layer}.{target}.{ours}.weight"
                wanted[theirs] = tuple(needed[name].shape)
                if theirs in stored:
                    tensors[name] = stored[theirs]
                    used[f"{BRANCHES}{theirs}"] = name
    if problem := difference(BRANCHES, wanted, {name: tuple(tensor.shape) for name, tensor in stored.items()}):
        raise WeightsError(f"{file.origin} {problem}.")
    dtype = next(iter(stored.values())).dtype
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def load_encoder(source: "str | os.PathLike[str]", place: str, dtype: torch.dtype, hub: Mapping[str, Any]) -> Any:
    """Load the transformers image encoder in folder `place` of a local folder or hub repository, strictly."""
    root = Path(source).expanduser()
    root = root.parent if root.is_file() else root
    if not root.is_dir():
        root = fetch(os.fspath(source), [f"{place}/*.json", f"{place}/*.safetensors"], hub)
        if not any((root / place).glob("*.safetensors")):
            root = fetch(os.fspath(source), [f"{place}/*.json", f"{place}/*.bin"], hub)
    if not (root / place).is_dir():
        raise WeightsError(
            f"There is no image encoder in {root / place}: give its folder with image_encoder_folder, or pass "
            "image_encoder_folder=None to load none."
        )
    return weights.load_model(root / place, "transformers", "CLIPVisionModelWithProjection", dtype, allow_bin=True)


def check_encoder(layout: Layout, image_encoder: Any) -> None:
    """Raise WeightsError unless the projection's input width equals the width of this encoder's features."""
    if not layout.needs_encoder:
        return
    config = image_encoder.config
    ours = isinstance(image_encoder, VisionEncoder)
    tokens, pooled = (config.width, config.embed_width) if ours else (config.hidden_size, config.projection_dim)
    found = pooled if layout.kind == "linear" else tokens
    if found != layout.input_width:
        what = "pooled embeddings" if layout.kind == "linear" else "penultimate tokens"
        raise WeightsError(
            f"This IP-Adapter reads {what} of width {layout.input_width}{_of(layout.encoder)}, but the image encoder's "
            f"are {found} wide{_of(encoder_of(layout.kind, found))}: pass the image_encoder_folder that belongs to it."
        )


def _of(encoder: str | None) -> str:
    return f" ({encoder})" if encoder else ""


def _described(report: ImportReport, layout: Layout) -> dict[str, str]:
    """Return the metadata that an imported adapter is saved with."""
    layer = "pooled embedding" if layout.kind == "linear" else "penultimate" if layout.needs_encoder else FACE_LAYER
    return {
        "base": report.base,
        "encoder": report.encoder,
        LAYER: layer,
        "tokens": "all" if layout.tokens is None else str(layout.tokens),
        "licence": report.licence or "unspecified",
        "imported_from": Path(report.origin).name,
    }


def _report(file: IPAdapterFile, used: Mapping[str, str]) -> ImportReport:
    layout, metadata = file.layout, file.metadata
    return ImportReport(
        origin=file.origin,
        variant=layout.variant,
        tokens=layout.tokens,
        encoder=_encoder_named(file),
        base=metadata.get("base") or layout.family or "unknown",
        licence=file.licence,
        used=dict(used),
        parameters=sum(file.tensors[name].numel() for name in used),
        notes=(*file.notes, FACE_LICENCE) if layout.face_width else file.notes,
    )


def _encoder_named(file: IPAdapterFile) -> str:
    layout, named = file.layout, file.metadata.get("encoder")
    vision = layout.encoder or f"unknown, with features of width {layout.input_width}"
    if layout.face_width is None:
        return named or vision
    recogniser = f"a face recogniser with embeddings of width {layout.face_width}"
    return named or (f"{recogniser}, and {vision}" if layout.needs_encoder else recogniser)


def check_base(file: IPAdapterFile, layers: Mapping[str, Any]) -> None:
    """Raise WeightsError unless the file was made for a denoiser with these cross-attention layers."""
    text_widths = {name: attn.to_k.in_features for name, attn in layers.items()}
    widths = [attn.inner_dim for attn in layers.values()]
    layout, found = file.layout, list(file.layout.layer_widths)
    if (len(found), {layout.width}) != (len(widths), set(text_widths.values())):
        width = next(iter(text_widths.values()), 0)
        needed = FAMILIES.get((len(widths), width), "this denoiser")
        raise WeightsError(
            f"{file.origin} is for {layout.family or 'another base'} ({len(found)} layers that read text of width "
            f"{layout.width}), but {needed} has {len(widths)} layers and width {width}: use the file made for it."
        )
    if found == list(widths):
        return
    names = list(text_widths)
    middle_before_up = sorted(
        range(len(names)), key=lambda place: ("down", "mid", "up").index(names[place].split("_")[0])
    )
    if found == [widths[place] for place in middle_before_up]:
        raise WeightsError(
            f"{file.origin} holds its layers in the order down, middle, up, but the standard is down, up, middle: "
            "use a file that was converted correctly."
        )
    number, theirs, ours = next((n, a, b) for n, (a, b) in enumerate(zip(found, widths, strict=True)) if a != b)
    raise WeightsError(
        f"{file.origin} gives layer {2 * number + 1} the width {theirs}, but this denoiser's {names[number]} has "
        f"{ours}: use the file made for it."
    )


def cross_attention(denoiser: nn.Module) -> dict[str, Any]:
    """Return the denoiser's cross-attention layers by module path, in the standard's order.

    Raises WeightsError while diffusers' own IP-Adapter is loaded, because its projection also has attention layers.
    """
    if getattr(getattr(denoiser, "config", None), "encoder_hid_dim_type", None) == "ip_image_proj":
        raise WeightsError("diffusers has loaded an IP-Adapter into this denoiser: call unload_ip_adapter() first.")
    return {name: attn for name, attn in attention_layers(denoiser).items() if attn.is_cross_attention}


def numbered(layers: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Return the layers with their numbers in the standard format."""
    return [(2 * place + 1, layer) for place, layer in enumerate(layers)]


def _below(prefix: str, names: Mapping[str, Any]) -> list[str]:
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _checked(
    origin: str,
    stored: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    licence: str | None,
    notes: Sequence[str],
) -> IPAdapterFile:
    names, renamed = standard_names(stored)
    tensors = {name: stored[each] for each, name in names.items()}
    layout = read_layout({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if layout.problem:
        raise WeightsError(f"{origin} {layout.problem}.")
    check_finite(origin, tensors)
    # Tensors are cloned, as in `Adapter.load`: at a file's unaligned addresses kernels sum in another order.
    copies = {name: each.detach().clone() for name, each in tensors.items()}
    return IPAdapterFile(origin, layout, copies, metadata, licence, (*notes, *renamed))


def _flat(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a nested or flat state dict under their flat names, and what was done.

    A training checkpoint holds the state dict under one name, next to a step number and the like, which are left out.
    """
    notes: list[str] = []
    if outer := next((name for name in _CHECKPOINTS if isinstance(state.get(name), Mapping)), None):
        others = [name for name in state if name != outer]
        notes = [f"The tensors were taken from {outer!r}{f', and {_listed(others)} left out' if others else ''}."]
        state = state[outer]
    flat: dict[str, Any] = {}
    for name, value in state.items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, Mapping) else {name: value}
    if wrong := [name for name, value in flat.items() if not isinstance(value, Tensor)]:
        raise WeightsError(
            f"The state dict holds {wrong[0]}, which is not a tensor: pass only image_proj and ip_adapter."
        )
    return flat, notes


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Return the tensors and metadata of a file, whatever its ending, and a sentence for each thing done."""
    if is_pickle(file):
        tensors, notes = read_pickle(file)
        if file.suffix == ".safetensors":
            notes = ["The file is a pickle of torch despite its name; it was read without running code in it.", *notes]
        return tensors, {}, notes
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
            return tensors, dict(opened.metadata() or {}), []
    except (SafetensorError, OSError) as error:
        raise WeightsError(why_unreadable(file, "download it again")) from error


def read_pickle(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the tensors of a .bin file under their flat names, without running code that it may contain.

    Also return a sentence for each thing that was done.
    """
    try:
        if file.suffix == ".safetensors":  # of a path, torch.load believes the ending
            with file.open("rb") as opened:
                state = torch.load(opened, map_location="cpu", weights_only=True)
        else:
            # Memory mapping avoids reading the tensors when only shapes are needed; it requires the newer zip format.
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # damaged pickles raise many types of exceptions
        raise WeightsError(
            f"{file} is a pickle that is truncated or holds more than tensors, and reading it could run code: use the "
            ".safetensors file instead."
        ) from error
    if not isinstance(state, Mapping):
        raise WeightsError(f"{file} holds no named tensors: use an IP-Adapter file.")
    return _flat(state)


def _only_file(folder: Path) -> Path:
    files = [file for file in sorted(folder.glob("*")) if file.suffix in (".safetensors", ".bin")]
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} weights files" if files else "no weights file"
    raise WeightsError(f"{folder} holds {found}: choose the file with weight_name (and subfolder).")
