"""Standard IP-Adapter files in and out: from a file to an adapter with one branch, and from an adapter to a file.

    read_ip_adapter    a file, a folder, a hub id or a state dict, strictly (ip_adapter_layout.py says what fits)
    import_adapter     ... to an adapter for one denoiser, whose output is diffusers' own
    export_adapter     an adapter's branch, its vision encoder beside it, and its LoRA as a file of its own

A file numbers the cross-attention layers in the order down, up, middle, which is that in which a UNet2DConditionModel
registers them. Our gate has no place in the standard, so it is folded into the values; an imported branch has a gate of
exactly one, so that files come out as they went in.
"""

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from imagine import __version__
from imagine.adapter import Adapter, BranchSpec
from imagine.attention import GATE_GAIN, attention_layers
from imagine.encoders import VisionEncoder
from imagine.errors import WeightsError
from imagine.ip_adapter_layout import BRANCHES, FAMILIES, LINEAR_TOKENS, PROJECTION, Layout, encoder_of, licence_of
from imagine.ip_adapter_layout import read_layout as read_layout_of
from imagine.projections import Kind
from imagine.vision_conversion import to_transformers
from imagine.weights import forget_paths, hushed, is_hub_id

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
ENCODER_FOLDER = "image_encoder"
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class IPAdapterFile:
    """A standard file that was read and found whole: its tensors under their flat names, and what it is."""

    origin: str  # the file as it was named, or "the state dict"
    layout: Layout
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    licence: str | None


@dataclass(frozen=True)
class ImportReport:
    """What was imported, and which tensor of the file became which of the adapter's."""

    origin: str
    variant: str
    tokens: int | None  # of one picture; None: as many as the encoder has
    encoder: str
    base: str
    licence: str | None
    used: Mapping[str, str]
    parameters: int

    def as_dict(self) -> dict[str, Any]:
        """The report as plain words, numbers and mappings."""
        return asdict(self)


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what the standard cannot carry, a sentence each."""

    file: Path
    encoder: Path | None
    lora: Path | None
    layout: Layout
    not_carried: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain words and numbers."""
        written = {name: None if path is None else str(path) for name, path in self._written().items()}
        layout = self.layout
        facts = {"variant": layout.variant, "tokens": layout.tokens, "base": layout.family, "encoder": layout.encoder}
        return {"written": written, **facts, "not_carried": list(self.not_carried)}

    def _written(self) -> dict[str, Path | None]:
        return {"file": self.file, "image_encoder": self.encoder, "lora": self.lora}


# --- in ---------------------------------------------------------------------------------------------------------------


def read_ip_adapter(
    source: "str | os.PathLike[str] | Mapping[str, Any]",
    subfolder: str | None = None,
    weight_name: str | None = None,
    **hub: Any,
) -> IPAdapterFile:
    """Read a base, Plus or Full file of SD 1.5 or SDXL from where diffusers' load_ip_adapter would.

    `source` is a file (.safetensors; .bin is read as weights only, so that nothing in it runs), a folder or a hub id
    with `subfolder` and `weight_name`, or a state dict, nested ({"image_proj": ..., "ip_adapter": ...}) or flat. `hub`
    are options of huggingface_hub.snapshot_download. Raises WeightsError, in one sentence, for anything that diffusers
    would drop or misread.
    """
    if isinstance(source, Mapping):
        return _checked("the state dict", _flat(source), {}, None)
    file = locate(source, subfolder, weight_name, **hub)
    tensors, metadata = _read(file)
    return _checked(str(file), tensors, metadata, licence_of(file, metadata))


def locate(
    source: str | os.PathLike[str], subfolder: str | None = None, weight_name: str | None = None, **hub: Any
) -> Path:
    """Return the file that diffusers would find under these names. Only a hub id is ever downloaded.

    Without `weight_name` the folder must hold exactly one weights file.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        if not is_hub_id(source):
            raise WeightsError(f"There is no file or folder {source}: name an IP-Adapter file, or a folder or hub id.")
        if weight_name is None:
            raise WeightsError(f"{source} is a hub id: say which of its files with weight_name (and subfolder).")
        path = fetch(os.fspath(source), ["/".join(filter(None, (subfolder, weight_name)))], hub)
    if weight_name is None:
        return _only_file(path / (subfolder or ""))
    for file in (path / weight_name, path / (subfolder or "") / weight_name):  # in diffusers' order
        if file.is_file():
            return file
    raise WeightsError(f"There is no file {weight_name} in {path / (subfolder or '')}: check its name and subfolder.")


def fetch(repository: str, patterns: Sequence[str], hub: Mapping[str, Any]) -> Path:
    """Download files of a hub repository, or find them in the cache; return the folder that stands for it."""
    from huggingface_hub import snapshot_download

    options = {name: value for name, value in hub.items() if value is not None}
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), **options))
    except Exception as error:  # no network, no such repository, no permission: all mean that it is not to be had
        raise WeightsError(
            f"{', '.join(patterns)} of the hub repository {repository} could not be fetched: check name and "
            "connection, or download it elsewhere and pass the local folder instead."
        ) from error


def import_adapter(file: IPAdapterFile, denoiser: nn.Module, name: str = "vision") -> tuple[Adapter, ImportReport]:
    """Make an adapter for this denoiser, with one branch `name`, out of a file; it is not attached yet.

    The denoiser may be on the meta device. Raises WeightsError if the file was made for another base.
    """
    layers = _cross_attention(denoiser)
    _check_base(file, {layer: attn.to_k.in_features for layer, attn in layers.items()},
                [attn.inner_dim for attn in layers.values()])  # fmt: skip
    layout = file.layout
    assert layout.width is not None
    spec = BranchSpec(
        name, layout.width, zero_init=False, projection=cast(Kind, layout.kind), input_width=layout.input_width,
        tokens=layout.tokens, inner_width=layout.inner_width, attention_width=layout.attention_width, absent="zeros",
    )  # fmt: skip
    with torch.device("meta"):
        adapter = Adapter(denoiser, [spec])
    used = {f"{PROJECTION}{key}": f"projections.{name}.{key}" for key in _below(PROJECTION, file.tensors)}
    for number, layer in _numbered(layers):
        for each in ("to_k", "to_v"):
            used[f"{BRANCHES}{number}.{each}_ip.weight"] = f"{layer}.{name}.{each}.weight"
    tensors = {ours: file.tensors[theirs] for theirs, ours in used.items()}
    for layer in layers:
        tensors[f"{layer}.{name}.gate"] = torch.full_like(tensors[f"{layer}.{name}.to_v.weight"][:, 0], 1 / GATE_GAIN)
    adapter.load_state_dict(tensors, strict=True, assign=True)
    report = _report(file, used)
    adapter.metadata = _described(report, layout)
    device = next(denoiser.parameters()).device
    return (adapter if device.type == "meta" else adapter.to(device)), report


def _described(report: ImportReport, layout: Layout) -> dict[str, str]:
    """What an imported adapter says of itself when it is saved."""
    return {
        "base": report.base,
        "encoder": report.encoder,
        "feature_layer": "pooled embedding" if layout.kind == "linear" else "penultimate",
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
        encoder=metadata.get("encoder") or layout.encoder or f"unknown, with features of width {layout.input_width}",
        base=metadata.get("base") or layout.family or "unknown",
        licence=file.licence,
        used=dict(used),
        parameters=sum(file.tensors[name].numel() for name in used),
    )


def _check_base(file: IPAdapterFile, text_widths: Mapping[str, int], widths: Sequence[int]) -> None:
    layout, found = file.layout, list(file.layout.layer_widths)
    if (len(found), {layout.width}) != (len(widths), set(text_widths.values())):
        width = next(iter(text_widths.values()), 0)
        needed = FAMILIES.get((len(widths), width), "this denoiser")
        raise WeightsError(
            f"{file.origin} is for {layout.family or 'another base'} ({len(found)} layers that read text of width "
            f"{layout.width}), but {needed} has {len(widths)} layers and width {width}: take the file made for it."
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
            "take a file that was converted properly."
        )
    number, theirs, ours = next((n, a, b) for n, (a, b) in enumerate(zip(found, widths, strict=True)) if a != b)
    raise WeightsError(
        f"{file.origin} gives layer {2 * number + 1} the width {theirs}, but this denoiser's {names[number]} has "
        f"{ours}: take the file made for it."
    )


def _cross_attention(denoiser: nn.Module) -> dict[str, Any]:
    """The denoiser's cross-attention layers by module path, in the standard's order."""
    if getattr(getattr(denoiser, "config", None), "encoder_hid_dim_type", None) == "ip_image_proj":
        raise WeightsError("diffusers has loaded an IP-Adapter into this denoiser: call unload_ip_adapter() first.")
    return {name: attn for name, attn in attention_layers(denoiser).items() if attn.is_cross_attention}


def _numbered(layers: Mapping[str, Any]) -> list[tuple[int, str]]:
    return [(2 * place + 1, layer) for place, layer in enumerate(layers)]


def _below(prefix: str, names: Mapping[str, Any]) -> list[str]:
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _checked(
    origin: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], licence: str | None
) -> IPAdapterFile:
    layout = read_layout_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if layout.problem:
        raise WeightsError(f"{origin} {layout.problem}.")
    # Cloned, as in `Adapter.load`: a file's tensors start at odd addresses, where kernels sum in another order.
    return IPAdapterFile(
        origin, layout, {name: each.detach().clone() for name, each in tensors.items()}, metadata, licence
    )


def _flat(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict, nested or flat, under the flat names."""
    flat: dict[str, Any] = {}
    for name, value in state.items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, Mapping) else {name: value}
    if wrong := [name for name, value in flat.items() if not isinstance(value, Tensor)]:
        raise WeightsError(
            f"The state dict holds {wrong[0]}, which is no tensor: pass image_proj and ip_adapter alone."
        )
    return flat


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
                return tensors, dict(opened.metadata() or {})
        except SafetensorError as error:
            raise WeightsError(f"{file} is not a complete safetensors file: download it again.") from error
    return read_pickle(file), {}


def read_pickle(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read the tensors of a .bin file, under their flat names, without running anything that is in it."""
    try:
        state = torch.load(file, map_location=device, weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise WeightsError(
            f"{file} is a pickle that holds more than tensors or is cut off, and reading it could run code: take the "
            ".safetensors file instead."
        ) from error
    if not isinstance(state, Mapping):
        raise WeightsError(f"{file} holds no named tensors: take an IP-Adapter file.")
    return _flat(state)


def _only_file(folder: Path) -> Path:
    files = [file for file in sorted(folder.glob("*")) if file.suffix in (".safetensors", ".bin")]
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} weights files" if files else "no weights file"
    raise WeightsError(f"{folder} holds {found}: say which with weight_name (and subfolder).")


# --- out --------------------------------------------------------------------------------------------------------------


def ip_adapter_tensors(adapter: Adapter, denoiser: nn.Module, name: str = "vision") -> dict[str, Tensor]:
    """Return an adapter's branch under the standard's names, its gate folded into the values.

    Raises WeightsError if the standard has no place for this branch.
    """
    spec = _exportable(adapter, name)
    assert spec.projection is not None
    mine, layers = adapter.layers(), _cross_attention(denoiser)
    if list(mine) != list(attention_layers(denoiser)):
        raise WeightsError("This adapter was built for another denoiser: pass the one that it belongs to.")
    projection = adapter.get_submodule(f"projections.{name}").state_dict()
    tensors = {f"{PROJECTION}{key}": tensor.detach().contiguous() for key, tensor in projection.items()}
    for number, layer in _numbered(layers):
        branch = mine[layer].branches()[name]
        key, value, gate = (each.detach() for each in (branch.to_k.weight, branch.to_v.weight, branch.gate))
        folded = (value.float() * (gate.float() * GATE_GAIN)[:, None]).to(value.dtype)
        tensors[f"{BRANCHES}{number}.to_k_ip.weight"] = key.contiguous()
        tensors[f"{BRANCHES}{number}.to_v_ip.weight"] = folded.contiguous()
    if wrong := next((str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in PRECISIONS), None):
        raise WeightsError(f"The adapter is in {wrong}: bring it to float32, float16 or bfloat16 first.")
    return tensors


def export_adapter(
    adapter: Adapter,
    denoiser: nn.Module,
    path: str | os.PathLike[str],
    image_encoder: Any = None,
    name: str = "vision",
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write branch `name` as a standard file (.safetensors), `image_encoder/` beside it, and LoRA as a file of its own.

    `image_encoder` is the encoder that the adapter was trained with, ours or transformers'; an adapter is worth nothing
    with another one. The folder is what diffusers' load_ip_adapter takes:
    load_ip_adapter(FOLDER, subfolder="", weight_name=FILE). `metadata` is added to what the adapter says of itself.
    Raises WeightsError if the branch cannot be carried.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise WeightsError(f"{file} must end in .safetensors: choose another name.")
    tensors = ip_adapter_tensors(adapter, denoiser, name)
    layout = read_layout_of({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    assert not layout.problem, layout.problem
    if image_encoder is not None:
        check_encoder(layout, image_encoder)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.partial")
    save_file(tensors, unfinished, {"format": "pt", **_facts(adapter, layout), **(metadata or {})})
    unfinished.replace(file)
    encoder = None if image_encoder is None else _save_encoder(image_encoder, file.parent / ENCODER_FOLDER)
    lora = _save_lora(adapter, file.parent) if adapter.lora_rank else None
    return ExportReport(file, encoder, lora, layout, tuple(_not_carried(adapter, layout, name, encoder is None)))


def check_encoder(layout: Layout, image_encoder: Any) -> None:
    """Raise WeightsError unless the projection reads features as wide as this encoder's."""
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


def _exportable(adapter: Adapter, name: str) -> BranchSpec:
    specs = {spec.name: spec for spec in adapter.branch_specs}
    if name not in specs:
        raise WeightsError(f"The adapter has no branch {name!r}, only {', '.join(specs)}: name the vision branch.")
    spec = specs[name]
    if spec.projection is None:
        raise WeightsError(
            f"Branch {name!r} has no projection, and an IP-Adapter file needs one: export a vision branch."
        )
    if spec.fusion != "parallel":
        raise WeightsError(
            f"Branch {name!r} shares the text's softmax, which no IP-Adapter does: it cannot be exported."
        )
    if spec.projection == "linear" and (spec.tokens or LINEAR_TOKENS) != LINEAR_TOKENS:
        raise WeightsError(
            f"Branch {name!r} makes {spec.tokens} tokens, and a base file holds 4: it cannot be exported."
        )
    return spec


def _not_carried(adapter: Adapter, layout: Layout, name: str, without_encoder: bool) -> list[str]:
    """What the standard has no place for, and what to do about it, a sentence each."""
    specs = {spec.name: spec for spec in adapter.branch_specs}
    notes = [f"The branch {other!r} stays behind: the standard knows one branch." for other in specs if other != name]
    if adapter.lora_rank:
        notes.append(f"LoRA lies beside the file, for load_lora_weights ({LORA_FILE}); its strength is now its own.")
    if specs[name].scale != 1:
        notes.append(
            f"The default strength {specs[name].scale:g} is lost: call set_ip_adapter_scale({specs[name].scale:g})."
        )
    if specs[name].absent == "off":
        notes.append(
            "This branch is off where nobody is shown, but others read an empty picture there: with guidance their "
            "pictures differ from ours, without guidance they do not."
        )
    if layout.family is None:
        notes.append("The base is none of the well-known ones: the file fits that denoiser alone.")
    if without_encoder:
        notes.append(
            "No image encoder lies beside the file: it is worth nothing without the one that it was trained with."
        )
    if layout.comfyui:
        notes.append(f"ComfyUI_IPAdapter_plus cannot load it: it {layout.comfyui}.")
    return [*notes, "Masks, time windows and other settings of a call are given to the other program again."]


def _facts(adapter: Adapter, layout: Layout) -> dict[str, str]:
    said = {str(key): adapter.metadata[key] for key in ("base", "encoder", "licence") if key in adapter.metadata}
    facts = {
        "variant": layout.variant,
        "tokens": "all" if layout.tokens is None else str(layout.tokens),
        "feature_layer": "pooled embedding" if layout.kind == "linear" else "penultimate",
        "exported_by": f"imagine {__version__}",
    }
    family = {"base": layout.family} if layout.family else {}
    return {**facts, **family, **said}


def _save_encoder(image_encoder: Any, folder: Path) -> Path:
    model = to_transformers(image_encoder) if isinstance(image_encoder, VisionEncoder) else image_encoder
    with hushed():
        model.save_pretrained(folder)
    forget_paths(folder)
    return folder


def _save_lora(adapter: Adapter, folder: Path) -> Path:
    """LoRA of all attention layers in diffusers' own file; without an alpha in it the scale is one, as it is here."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    layers = {
        f"{layer}.{target}.{key}": tensor.detach().contiguous()
        for layer, weights in adapter.layers().items()
        for target in adapter.lora_targets
        if (low_rank := weights.low_rank(target)) is not None
        for key, tensor in low_rank.state_dict().items()
    }
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers=layers)
    return folder / LORA_FILE
