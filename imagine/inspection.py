"""Describe a file or folder of weights from its headers, without building a network.

`imagine inspect` uses this module. The names of safetensors files often say little, and a wrong combination of encoder,
adapter and base shows only as a bad picture. Our own files describe themselves in their metadata. Standard IP-Adapter
files are recognised by their keys, as diffusers recognises them. The entry "problems" lists what will not load and why.

Two checks need more than headers, and import torch: whether the encoder in the same weights folder is the one that our
adapter was trained with, and .bin files, the format of older IP-Adapters. A pickle may run code when it is read, so
.bin files are read with torch's weights-only reader, which runs no code.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from imagine.errors import WeightsError
from imagine.ip_adapter.layout import (
    BRANCHES,
    KOHYA_FILE,
    LORA_FILE,
    PROJECTION,
    encoder_of,
    licence_of,
    projection_shapes,
    read_layout,
    standard_names,
)
from imagine.networks.files import is_pickle, why_unreadable
from imagine.networks.weights import INDEX, fingerprint_of, read_index, same_encoder
from imagine.paths import as_path, kind_of, why_no_file
from imagine.pipeline.families import class_names

_PICKLES = (".ckpt", ".pt", ".pth", ".pkl")
_ADAPTER_VERSION = "1"  # the format version that Adapter.load reads
_BRANCH = ("to_k.weight", "to_v.weight", "gate")  # the tensors of a branch in each of its layers
_TRANSFORMER_BRANCHES = {  # the same for adapters of transformers, by their layout (imagine.transformer_bases)
    "own": (*_BRANCH, "to_q.weight", "to_out.weight", "norm_q.weight", "norm_k.weight"),
    "xlabs": (*_BRANCH, "to_k.bias", "to_v.bias"),
    "instantx": (
        *_BRANCH, "norm_ip.linear.weight", "norm_ip.linear.bias", "norm_q.weight", "norm_k.weight", "norm_ip_k.weight",
    ),
}  # fmt: skip
_ENCODERS = ("vision_encoder", "image_encoder")  # folders of reference encoders, in order of preference
_RECOGNISER = "face recogniser (InsightFace)"  # the encoder of FaceID files
_PRECISIONS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@dataclass(frozen=True)
class _Header:
    """The names, shapes, types and metadata of a safetensors file."""

    shapes: dict[str, tuple[int, ...]]
    types: Counter[str]  # count of numbers of each type
    metadata: dict[str, str]
    size: int  # file size in bytes

    def summary(self) -> dict[str, Any]:
        """Return the facts that every file has: tensors, parameters, precision and bytes."""
        return {
            "tensors": len(self.shapes),
            "parameters": sum(self.types.values()),
            "precision": [name for name, _ in self.types.most_common()],
            "bytes": self.size,
        }


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a description of a file or folder as plain numbers, words and lists; it always has "kind".

    Kinds: "weights" (a whole pipeline), "adapter", "persona", "encrypted persona", "face finder", "IP-Adapter", "LoRA",
    "model" (one component) and "tensors" (a file without a description). Raises WeightsError if it is none of them.
    """
    path = as_path(path)
    kind = kind_of(path, WeightsError)
    if kind == "folder":
        return {"path": str(path), **_folder(path)}
    if kind != "file":
        raise WeightsError(why_no_file(path, kind, "file or folder"))
    if path.suffix in _PICKLES:
        raise WeightsError(f"{path} is a pickle, which can run code when it is read: convert it to safetensors first.")
    return {"path": str(path), **_file(path)}


def _folder(folder: Path) -> dict[str, Any]:
    if (folder / INDEX).is_file():
        return _weights(folder)
    if files := _adapter_files(folder / "adapter"):  # an imported IP-Adapter
        return _file(files[0])
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.name not in (LORA_FILE, KOHYA_FILE)]
    files = files or sorted(folder.glob("*.bin")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} holds neither {INDEX} nor a safetensors file: name a folder of weights.")
    if not (folder / "config.json").is_file():
        if len(files) == 1:
            return _file(files[0])
        raise WeightsError(f"{folder} holds {len(files)} safetensors files: name one of them.")
    return {"kind": "model", "class": _class(folder / "config.json"), **_sum([_read(file) for file in files])}


def _adapter_files(folder: Path) -> list[Path]:
    """Return the files of an adapter's folder; the one without a variant (adapter.safetensors) is first."""
    return sorted(folder.glob("adapter*.safetensors"), key=lambda file: (len(file.name), file.name))


def _weights(folder: Path) -> dict[str, Any]:
    index = read_index(folder, class_names())
    components: dict[str, Any] = {}
    for part in sorted(folder.iterdir()):
        if part.is_dir() and (files := sorted(part.rglob("*.safetensors"))):
            entry = index.get(part.name)
            class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[1] else None
            components[part.name] = {"class": class_name, **_sum([_read(file) for file in files])}
    described: dict[str, Any] = {}
    imported = sorted(path.name for path in folder.glob("ip_*"))  # IP-Adapters on a stock pipeline
    for name in ("text_adapter", "adapter", *imported):
        if files := _adapter_files(folder / name):
            described[name] = _file(files[0])
    identity = described.get("adapter", {})
    return {
        "kind": "weights",
        "pipeline": index["_class_name"],
        "format_version": index.get("format_version"),
        "encoder": identity.get("encoder"),
        "encoder_fingerprint": identity.get("encoder_fingerprint"),
        "base": identity.get("base"),
        "tokens": identity.get("tokens"),
        "licence": identity.get("licence"),
        "defaults": {
            name.removeprefix("default_"): index[name] for name in sorted(index) if name.startswith("default_")
        },
        "components": components,
        "adapters": described,
        "parameters": sum(part["parameters"] for part in components.values()),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def _file(path: Path) -> dict[str, Any]:
    header = _read_pickle(path) if is_pickle(path) else _read(path)
    metadata = header.metadata
    if metadata.get("kind") == "encrypted persona":
        return {"kind": "encrypted persona", "format_version": metadata.get("format_version"), **header.summary()}
    if metadata.get("kind") == "persona":
        return {"kind": "persona", **_persona(header), **header.summary()}
    if "branches" in metadata and "lora_rank" in metadata:
        return {"kind": "adapter", **_adapter(path, header), **header.summary()}
    if metadata.get("kind") == "face finder":
        return {"kind": "face finder", "format_version": metadata.get("format_version"), **header.summary()}
    names, notes = standard_names(header.shapes)
    if any(name.startswith((PROJECTION, BRANCHES)) for name in names.values()):
        shapes = {name: header.shapes[stored] for stored, name in names.items()}
        found = _ip_adapter(path, replace(header, shapes=shapes))
        return {"kind": "IP-Adapter", **found, "notes": notes, **header.summary()}
    if header.shapes and all(".lora" in name or name.endswith(".alpha") for name in header.shapes):
        return {"kind": "LoRA", "licence": licence_of(path, metadata), **header.summary()}
    return {"kind": "tensors", "metadata": dict(metadata), **header.summary()}


def _persona(header: _Header) -> dict[str, Any]:
    metadata = header.metadata
    return {
        "format_version": metadata.get("format_version"),
        "encoder": metadata.get("encoder_name") or None,
        "encoder_fingerprint": metadata.get("encoder"),
        "tokens": _whole(metadata.get("tokens")),
        "pooling": metadata.get("pooling"),
        "consent": _json(metadata.get("consent", "null")),
        "faces": _json(metadata.get("faces", "[]")),
    }


def _adapter(path: Path, header: _Header) -> dict[str, Any]:
    metadata = dict(header.metadata)
    branches, rank = _json(metadata.pop("branches")), _whole(metadata.pop("lora_rank"))
    if rank is None or not isinstance(branches, list) or not all(map(_is_branch, branches)):
        raise WeightsError(f"{path} does not describe its branches and LoRA properly; save the adapter again.")
    names = [branch["name"] for branch in branches]
    variant = "identity" if "vision" in names else "text"
    projections = [branch.get("projection") for branch in branches if branch.get("projection")]
    found = {
        "variant": f"{variant}, {projections[0]} projection" if projections else variant,
        "branches": names,
        "lora_rank": rank,
        "lora_targets": _json(metadata.pop("lora_targets", "[]")),
        **metadata,
    }
    if found.get("licence") in (None, "unspecified"):
        found["licence"] = licence_of(path, {}) or found.get("licence")
    shapes = {name: shape for name, shape in header.shapes.items() if not name.startswith("resampler.")}
    parts = _TRANSFORMER_BRANCHES.get(metadata.get("layout", ""), _BRANCH)
    problems = _adapter_problems(metadata.get("format_version"), branches, shapes, parts)
    vision = next((branch for branch in branches if branch["name"] == "vision"), None)
    folder = next((path.parent.parent / each for each in _ENCODERS if (path.parent.parent / each).is_dir()), None)
    if vision is not None and folder is not None and path.parent.name == "adapter":
        problems += _encoder_problems(vision, metadata.get("encoder_fingerprint"), folder)
    return {**found, "problems": problems}


def _is_branch(entry: Any) -> bool:
    """Return whether `entry` describes a branch: it has a name, and its sizes are whole numbers."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not isinstance(entry.get("width"), int):
        return False
    sizes = (entry.get(name) for name in ("input_width", "inner_width", "attention_width", "tokens"))
    return all(size is None or isinstance(size, int) for size in sizes)


def _encoder_problems(branch: Mapping[str, Any], fingerprint: str | None, folder: Path) -> list[str]:
    """Return the reasons, none or one, why the adapter cannot use the encoder in `folder`."""
    pooled = branch.get("projection") == "linear"
    wanted, given = branch.get("input_width") or branch.get("width"), _features(folder, pooled)
    if given is not None and wanted != given:
        return [
            f"It reads features of width {wanted}, but the {folder.name} beside it gives {given}: use the encoder that "
            "it was trained with."
        ]
    files = sorted(folder.glob("*.safetensors"))
    files = [file for file in files if ".fp16" not in file.name] or files
    if fingerprint is None or not files:
        return []
    from safetensors.torch import load_file

    for file in files:
        _read(file)  # raises a readable error if the file is truncated
    found = fingerprint_of({name: each for file in files for name, each in load_file(file).items()})
    if same_encoder(fingerprint, found):
        return []
    return [
        f"It was trained with the vision encoder {fingerprint}, but the {folder.name} beside it is {found}: use the "
        "encoder that belongs to it."
    ]


def _features(folder: Path, pooled: bool) -> int | None:
    """Return the width of an encoder's pooled embedding or of its tokens, ours or transformers'; None if unknown."""
    file = folder / "config.json"
    config = _json(file.read_text(encoding="utf-8")) if file.is_file() else None
    if not isinstance(config, dict):
        return None
    names = ("embed_width", "projection_dim") if pooled else ("width", "hidden_size")
    return next((config[name] for name in names if name in config), None)


def _adapter_problems(
    version: str | None,
    branches: list[dict[str, Any]],
    shapes: Mapping[str, tuple[int, ...]],
    parts: Sequence[str] = (),
) -> list[str]:
    """Return the reasons, one sentence each, why Adapter.load would refuse the file for every denoiser."""
    problems = []
    if version != _ADAPTER_VERSION:
        problems.append(f"It has format version {version}, and this imagine reads {_ADAPTER_VERSION}: save it again.")
    wanted: dict[str, tuple[int, ...] | None] = {}
    for branch in branches:
        layers = {name.rpartition(f".{branch['name']}.")[0] for name in shapes if f".{branch['name']}.to_k." in name}
        wanted |= {f"{layer}.{branch['name']}.{each}": None for layer in layers for each in parts or _BRANCH}
        wanted |= _projection(branch)
    low_rank = {name for name in shapes if ".lora_A." in name or ".lora_B." in name}
    wanted |= {
        name.replace(f".lora_{one}.", f".lora_{other}."): None for name in low_rank for one, other in ("AB", "BA")
    }
    if missing := sorted(wanted.keys() - shapes.keys()):
        problems.append(f"It lacks {_some(missing)}: download it again.")
    if extra := sorted(shapes.keys() - wanted.keys()):
        problems.append(f"It has the unknown tensor {_some(extra)} and will not load: use the file as it was saved.")
    for name, shape in wanted.items():
        if shape is not None and name in shapes and shapes[name] != shape:
            problems.append(f"It holds {name} of shape {list(shapes[name])} instead of {list(shape)}.")
    return problems


def _projection(branch: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Return the names and shapes of the tensors that a branch's projection has according to its description."""
    kind, input_width = branch.get("projection"), branch.get("input_width")
    if kind not in ("linear", "full", "plus") or not input_width:
        return {}
    inner = branch.get("inner_width") or branch["width"]
    tokens = branch.get("tokens") or (16 if kind == "plus" else 4)
    attention = branch.get("attention_width") or inner
    shapes = projection_shapes(kind, tokens, input_width, branch["width"], inner, attention)
    return {f"projections.{branch['name']}.{name}": shape for name, shape in shapes.items()}


def _ip_adapter(path: Path, header: _Header) -> dict[str, Any]:
    """Return the variant, sizes and problems of a standard file; also check an image encoder in the same folder."""
    layout, metadata = read_layout(header.shapes), header.metadata
    problems = [f"It {layout.problem}."] if layout.problem else []
    if not layout.problem:
        problems += layout.unsupported_sentences()
    found = _features(path.parent / "image_encoder", layout.kind == "linear")
    faces = (layout.kind or "").startswith("faceid") or layout.face_width is not None
    if (
        layout.needs_encoder
        and not faces
        and layout.input_width is not None
        and found not in (None, layout.input_width)
    ):
        needed, known = (encoder_of(layout.kind, each) or "no public one" for each in (layout.input_width, found))
        problems.append(
            f"It reads features of width {layout.input_width} ({needed}), but the image_encoder beside it gives "
            f"{found} ({known}): use the encoder that it was made with."
        )
    every = "one per token of the vision encoder"
    return {
        "variant": layout.variant,
        "tokens": every if layout.kind == "full" else layout.tokens,
        "encoder": metadata.get("encoder") or (_RECOGNISER if faces else layout.encoder),
        "base": layout.family or metadata.get("base"),
        "format_version": metadata.get("format_version"),
        "licence": licence_of(path, metadata),
        "layers": len(layout.layer_widths),
        "text_width": layout.text_width,
        "features_width": layout.input_width,
        "problems": problems,
    }


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _read_pickle(path: Path) -> _Header:
    """Return the header of a .bin file, read by torch without running any code in it."""
    from imagine.ip_adapter.reading import read_pickle

    shapes: dict[str, tuple[int, ...]] = {}
    types: Counter[str] = Counter()
    for name, tensor in read_pickle(path)[0].items():
        shapes[name] = tuple(tensor.shape)
        kind = str(tensor.dtype).removeprefix("torch.")
        types[_PRECISIONS.get(kind, kind)] += tensor.numel()
    return _Header(shapes, types, {}, path.stat().st_size)


def _read(path: Path) -> _Header:
    shapes: dict[str, tuple[int, ...]] = {}
    types: Counter[str] = Counter()
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                part = file.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                count = 1
                for length in shapes[name]:
                    count *= length
                types[str(part.get_dtype())] += count
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise WeightsError(why_unreadable(path)) from error
    return _Header(shapes, types, metadata, path.stat().st_size)


def _sum(headers: list[_Header]) -> dict[str, Any]:
    types = sum((header.types for header in headers), Counter[str]())
    tensors = {
        f"{number}:{name}": shape for number, header in enumerate(headers) for name, shape in header.shapes.items()
    }
    return _Header(tensors, types, {}, sum(header.size for header in headers)).summary()


def _class(config: Path) -> str | None:
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{config} cannot be read as JSON; copy or download it again.") from error
    if not isinstance(read, dict):
        raise WeightsError(f"{config} does not describe a model; copy or download it again.")
    architectures = read.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    name = read.get("_class_name") or read.get("network") or first
    return str(name) if name else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None
