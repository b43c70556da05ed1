"""What a file or folder of weights is, read from headers alone: no network is built, nothing heavy is imported.

Beside the library, for `imagine inspect`: people collect safetensors files whose names say little, and a wrong pairing
of encoder, adapter and base shows only as a bad picture. Our own files describe themselves in their metadata; standard
IP-Adapter files are recognised by their keys, as diffusers recognises them.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from imagine.errors import WeightsError
from imagine.weights import INDEX, read_index

_BASES = {(70, 2048): "Stable Diffusion XL", (16, 768): "Stable Diffusion 1.5", (16, 1024): "Stable Diffusion 2"}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class _Header:
    """The names, shapes, types and metadata of a safetensors file."""

    shapes: dict[str, tuple[int, ...]]
    types: Counter[str]  # how many numbers of each type
    metadata: dict[str, str]
    size: int  # bytes of the file

    def summary(self) -> dict[str, Any]:
        """What can be said of any file."""
        return {
            "tensors": len(self.shapes),
            "parameters": sum(self.types.values()),
            "precision": [name for name, _ in self.types.most_common()],
            "bytes": self.size,
        }


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Say what a file or folder is, as plain numbers, words and lists; "kind" is always among them.

    Kinds: "weights" (a whole pipeline), "adapter", "persona", "face finder", "IP-Adapter", "model" (one component) and
    "tensors" (a safetensors file that says nothing of itself). Raises WeightsError if it is none of them.
    """
    path = Path(path)
    if path.is_dir():
        return {"path": str(path), **_folder(path)}
    if not path.exists():
        raise WeightsError(f"There is no file or folder {path}: check the path.")
    if path.suffix in _PICKLES:
        raise WeightsError(f"{path} is a pickle, which can run code when it is read: convert it to safetensors first.")
    return {"path": str(path), **_file(path)}


def _folder(folder: Path) -> dict[str, Any]:
    if (folder / INDEX).is_file():
        return _weights(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} holds neither {INDEX} nor a safetensors file: name a folder of weights.")
    if not (folder / "config.json").is_file():
        if len(files) == 1:
            return _file(files[0])
        raise WeightsError(f"{folder} holds {len(files)} safetensors files: name one of them.")
    return {"kind": "model", "class": _class(folder / "config.json"), **_sum([_read(file) for file in files])}


def _weights(folder: Path) -> dict[str, Any]:
    index = read_index(folder)
    components: dict[str, Any] = {}
    for part in sorted(folder.iterdir()):
        if part.is_dir() and (files := sorted(part.rglob("*.safetensors"))):
            entry = index.get(part.name)
            known = entry[1] if isinstance(entry, list) and entry[1] else None
            components[part.name] = {"class": known, **_sum([_read(file) for file in files])}
    described: dict[str, Any] = {}
    for name in ("text_adapter", "adapter"):
        if (folder / name).is_dir() and (files := sorted((folder / name).glob("*.safetensors"))):
            described[name] = _file(files[0])
    identity = described.get("adapter", {})
    return {
        "kind": "weights",
        "format_version": index["format_version"],
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
    header = _read(path)
    metadata = header.metadata
    if metadata.get("kind") == "persona":
        return {"kind": "persona", **_persona(header), **header.summary()}
    if "branches" in metadata and "lora_rank" in metadata:
        return {"kind": "adapter", **_adapter(path, header), **header.summary()}
    if metadata.get("kind") == "face finder":
        return {"kind": "face finder", "format_version": metadata.get("format_version"), **header.summary()}
    if any(name.startswith(("image_proj.", "ip_adapter.")) for name in header.shapes):
        return {"kind": "IP-Adapter", **_ip_adapter(header.shapes), **header.summary()}
    return {"kind": "tensors", "metadata": dict(metadata), **header.summary()}


def _persona(header: _Header) -> dict[str, Any]:
    metadata = header.metadata
    return {
        "format_version": metadata.get("format_version"),
        "encoder_fingerprint": metadata.get("encoder"),
        "tokens": int(metadata.get("tokens", "0")),
        "faces": _json(metadata.get("faces", "[]")),
    }


def _adapter(path: Path, header: _Header) -> dict[str, Any]:
    metadata = dict(header.metadata)
    branches = _json(metadata.pop("branches"))
    if not isinstance(branches, list) or not all(isinstance(each, dict) and "name" in each for each in branches):
        raise WeightsError(f"{path} does not describe its branches properly; save the adapter again.")
    names = [branch["name"] for branch in branches]
    variant = "identity" if "vision" in names else "text"
    projections = [branch.get("projection") for branch in branches if branch.get("projection")]
    return {
        "variant": f"{variant}, {projections[0]} projection" if projections else variant,
        "branches": names,
        "lora_rank": int(metadata.pop("lora_rank")),
        "lora_targets": _json(metadata.pop("lora_targets", "[]")),
        **metadata,
    }


def _ip_adapter(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Variant and size of a standard file, tested in diffusers' order (loaders/unet.py)."""
    projection = {name.removeprefix("image_proj."): shape for name, shape in shapes.items() if "image_proj." in name}
    keys = [shape for name, shape in shapes.items() if name.endswith("to_k_ip.weight")]
    width = keys[0][1] if keys else None
    tokens: int | str | None
    if "proj.weight" in projection:
        variant, tokens = "base", 4
    elif "proj.3.weight" in projection:
        variant, tokens = "full", "one per token of the vision encoder"
    elif "perceiver_resampler.proj_in.weight" in projection:
        variant, tokens = "FaceID Plus", 4
    elif "norm.weight" in projection:
        rows, norm = projection.get("proj.2.weight", (0,))[0], projection["norm.weight"][0]
        variant, tokens = "FaceID", rows // norm
    elif "latents" in projection:
        variant, tokens = "plus", projection["latents"][1]
    else:
        variant, tokens = "without a projection we know", None
    base = _BASES.get((len(keys), width)) if width is not None else None
    return {"variant": variant, "tokens": tokens, "base": base, "layers": len(keys), "text_width": width}


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
        raise WeightsError(f"{path} is not a complete safetensors file; download or save it again.") from error
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
    name = read.get("_class_name") or read.get("network") or (read.get("architectures") or [None])[0]
    return str(name) if name else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
