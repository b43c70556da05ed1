"""Read published IP-Adapter files for transformers: XLabs' for FLUX.1, and InstantX's for Stable Diffusion 3.5.

The result is a TransformerAdapter with one branch "vision", which draws what diffusers' own loaders draw, takes
`reference=`, and can be saved in our form. Files are read strictly: a missing or unexpected tensor is an error.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from imagine.adapter.adapter import BranchSpec
from imagine.adapter.attention import GATE_GAIN
from imagine.errors import WeightsError
from imagine.ip_adapter.reading import find_weights_file
from imagine.networks.files import why_unreadable
from imagine.networks.finite import check_finite
from imagine.records import VISION
from imagine.transformer_bases.adapter import SITES, TransformerAdapter
from imagine.transformer_bases.families import family_of, sites_of
from imagine.transformer_bases.ip_branches import INSTANTX, XLABS

_PROJECTION, _LAYERS = "image_proj", "ip_adapter"
_PREFIXES = {  # of flat files
    "ip_adapter_proj_model": _PROJECTION, "image_proj": _PROJECTION, "double_blocks": _LAYERS, "ip_adapter": _LAYERS,
}  # fmt: skip
_XLABS_NAMES = (
    ("processor.", ""), ("ip_adapter_double_stream_k_proj", "to_k_ip"), ("ip_adapter_double_stream_v_proj", "to_v_ip"),
)  # fmt: skip
_INSTANTX_NAMES = (  # of one layer of the resampler, to those of diffusers
    ("0.norm1", "ln0"), ("0.norm2", "ln1"), ("0.to_q", "attn.to_q"), ("0.to_kv", "attn.to_kv"),
    ("0.to_out", "attn.to_out.0"), ("1.0", "adaln_norm"), ("1.1", "ff.net.0.proj"), ("1.3", "ff.net.2"),
    ("2.1", "adaln_proj"),
)  # fmt: skip


def read_ip_adapter(
    source: "str | os.PathLike[str] | Mapping[str, Any]",
    transformer: nn.Module,
    subfolder: str | None = None,
    weight_name: str | None = None,
    **hub: Any,
) -> TransformerAdapter:
    """Return the adapter of an IP-Adapter file for this transformer; it is not attached yet.

    source: a file, a folder or a hub id with `subfolder` and `weight_name`, or a state dict, nested or flat. Raises
    WeightsError if the family has no such files, or if the file is for another base.
    """
    family = family_of(transformer)
    layout = {"FLUX.1": XLABS, "Stable Diffusion 3": INSTANTX}.get(family.title)
    if layout is None:
        raise WeightsError(
            f"No IP-Adapter file is known for {family.title}: XLabs has made one for FLUX.1, and InstantX for Stable "
            "Diffusion 3.5. Load an adapter of imagine with load_adapter."
        )
    if isinstance(source, Mapping):
        origin, parts = "The state dict", _parts(source)
    else:
        file = find_weights_file(source, subfolder, weight_name, **hub)
        origin, parts = str(file), _parts(_load(file))
    check_finite(origin, {f"{part}.{name}": each for part, named in parts.items() for name, each in named.items()})
    make = _xlabs if layout == XLABS else _instantx
    adapter, tensors = make(origin, parts, transformer)
    _check_names(origin, family.title, adapter, tensors)
    adapter.load_state_dict(tensors, assign=True)
    adapter.metadata = {
        "base": family.title, "encoder": "CLIP ViT-L/14" if layout == XLABS else "SigLIP SO400M",
        "feature_layer": "pooled embedding" if layout == XLABS else "penultimate",
        "tokens": str(adapter.branch_specs[0].tokens or adapter.resampler_sizes.get("num_queries")),
        "licence": "unspecified", "imported_from": Path(origin).name,
    }  # fmt: skip
    return adapter.to(next(transformer.parameters()).device).eval()


def _load(file: Path) -> Mapping[str, Any]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return dict(torch.load(file, map_location="cpu", weights_only=True))  # tensors only, so that no code runs
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError) as error:
        raise WeightsError(why_unreadable(file)) from error
    except Exception as error:  # a pickle of something else than tensors
        raise WeightsError(f"{file} holds more than tensors: give a file of weights.") from error


def _parts(given: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of both parts of a file, nested or flat, under the names that diffusers gives them."""
    found: dict[str, dict[str, Tensor]] = {_PROJECTION: {}, _LAYERS: {}}
    for name, value in given.items():
        if isinstance(value, Mapping) and name in found:
            found[name] |= {key: each for key, each in value.items()}
            continue
        prefix, _, rest = name.partition(".")
        if prefix not in _PREFIXES or not isinstance(value, Tensor):
            raise WeightsError(
                f"{name!r} is not a part of an IP-Adapter for FLUX.1 or Stable Diffusion 3.5: check the file."
            )
        for theirs, ours in _XLABS_NAMES:
            rest = rest.replace(theirs, ours)
        found[_PREFIXES[prefix]][rest] = value
    return found


def _xlabs(
    origin: str, parts: Mapping[str, Mapping[str, Tensor]], transformer: Any
) -> tuple[TransformerAdapter, dict[str, Tensor]]:
    projection, width = parts[_PROJECTION].get("proj.weight"), int(transformer.config.joint_attention_dim)
    if projection is None or projection.shape[0] % width:
        found = "no projection" if projection is None else f"a projection to {projection.shape[0]} numbers"
        raise WeightsError(
            f"{origin} has {found}, but FLUX.1 needs one to tokens of width {width}: use the file made for this base."
        )
    spec = BranchSpec(
        VISION, width, zero_init=False, projection="linear", input_width=int(projection.shape[1]),
        tokens=projection.shape[0] // width,
    )  # fmt: skip
    with torch.device("meta"):
        adapter = TransformerAdapter(transformer, [spec], layout=XLABS)
    tensors = {f"projections.{VISION}.{name}": each for name, each in parts[_PROJECTION].items()}
    tensors |= _site_tensors(transformer, parts[_LAYERS])
    return adapter, _with_gates(adapter, tensors)


def _instantx(
    origin: str, parts: Mapping[str, Mapping[str, Tensor]], transformer: Any
) -> tuple[TransformerAdapter, dict[str, Tensor]]:
    projection = {_instantx_name(name): each for name, each in parts[_PROJECTION].items()}
    try:
        sizes = {
            "embed_dim": projection["proj_in.weight"].shape[1], "output_dim": projection["proj_out.weight"].shape[0],
            "hidden_dim": projection["proj_in.weight"].shape[0], "num_queries": projection["latents"].shape[1],
            "heads": projection["layers.0.attn.to_q.weight"].shape[0] // 64,
            "timestep_in_dim": projection["time_embedding.linear_1.weight"].shape[1],
            "depth": 1 + max(int(name.split(".")[1]) for name in projection if name.startswith("layers.")),
        }  # fmt: skip
    except KeyError as error:
        raise WeightsError(f"{origin} lacks {error.args[0]}: use an IP-Adapter for Stable Diffusion 3.5.") from error
    width = family_of(transformer).width(transformer.config)
    if sizes["output_dim"] != width:
        raise WeightsError(
            f"{origin} gives tokens of width {sizes['output_dim']}, but this transformer has width {width}: use the "
            "file made for this base (InstantX's is for Stable Diffusion 3.5 Large)."
        )
    if transformer.config.dual_attention_layers:
        raise WeightsError(
            "This Stable Diffusion 3.5 has blocks with two attentions (Medium), for which no IP-Adapter is known: use "
            "Stable Diffusion 3.5 Large."
        )
    spec = BranchSpec(VISION, int(sizes["embed_dim"]), zero_init=False, absent="zeros")
    with torch.device("meta"):
        adapter = TransformerAdapter(transformer, [spec], layout=INSTANTX, resampler=sizes)
    tensors = {f"resampler.{name}": each for name, each in projection.items()}
    tensors |= _site_tensors(transformer, parts[_LAYERS])
    return adapter, _with_gates(adapter, tensors)


def _instantx_name(name: str) -> str:
    match = re.fullmatch(r"(layers\.\d+)\.(.+)", name)
    if match is None:
        return name
    for theirs, ours in _INSTANTX_NAMES:
        if match[2] == theirs or match[2].startswith(f"{theirs}."):
            return f"{match[1]}.{ours}{match[2][len(theirs) :]}"
    return name


def _site_tensors(transformer: nn.Module, layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of numbered layers under our names; a number without a site keeps its own name."""
    sites = [name for name, site in sites_of(transformer).items() if not site.joint]
    found = {}
    for name, each in layers.items():
        number, _, rest = name.partition(".")
        rest = rest.replace("to_k_ip", "to_k").replace("to_v_ip", "to_v")
        known = number.isdecimal() and int(number) < len(sites)
        found[f"{SITES}.{sites[int(number)]}.{VISION}.{rest}" if known else name] = each
    return found


def _with_gates(adapter: TransformerAdapter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    gates = {name: each for name, each in adapter.state_dict().items() if name.endswith(".gate")}
    like = next(iter(tensors.values()))
    return tensors | {name: torch.full(each.shape, 1 / GATE_GAIN, dtype=like.dtype) for name, each in gates.items()}


def _check_names(origin: str, family: str, adapter: TransformerAdapter, tensors: Mapping[str, Tensor]) -> None:
    wanted = adapter.state_dict()
    missing, more = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or more:
        what = f"lacks {missing[0]}" if missing else f"also has {more[0]}"
        raise WeightsError(f"{origin} {what}, so it is not for this {family} transformer: use the file made for it.")
    for name, each in tensors.items():
        if each.shape != wanted[name].shape:
            raise WeightsError(
                f"{origin} holds {name} of shape {list(each.shape)} instead of {list(wanted[name].shape)}: use the "
                f"file made for this {family} transformer."
            )
