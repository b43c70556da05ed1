"""Export a trained branch as a standard IP-Adapter file, with its vision encoder and a separate LoRA file next to it.

The standard format has no gate, so the gate is folded into the value weights. `ExportReport.not_carried` lists whatever
else the format cannot hold.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from imagine.adapter.adapter import Adapter, BranchSpec
from imagine.adapter.attention import GATE_GAIN, attention_layers
from imagine.errors import WeightsError
from imagine.ip_adapter.layout import BRANCHES, KOHYA_FILE, LINEAR_TOKENS, LORA_FILE, PROJECTION, Layout, read_layout
from imagine.ip_adapter.reading import ENCODER_FOLDER, check_encoder, cross_attention, numbered
from imagine.networks.encoders import VisionEncoder
from imagine.networks.saving import write_whole
from imagine.networks.vision_conversion import to_transformers
from imagine.networks.weights import quiet_libraries, remove_local_paths
from imagine.people.readings import FACE_LAYER, LAYER

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ExportReport:
    """The files that were written, and one sentence for each thing that the standard format cannot hold."""

    file: Path
    encoder: Path | None
    lora: Path | None
    layout: Layout
    not_carried: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as strings and numbers."""
        written = {name: None if path is None else str(path) for name, path in self._written().items()}
        layout = self.layout
        facts = {"variant": layout.variant, "tokens": layout.tokens, "base": layout.family, "encoder": layout.encoder}
        return {"written": written, **facts, "not_carried": list(self.not_carried)}

    def _written(self) -> dict[str, Path | None]:
        return {"file": self.file, "image_encoder": self.encoder, "lora": self.lora}


def ip_adapter_tensors(adapter: Adapter, denoiser: nn.Module, name: str = "vision") -> dict[str, Tensor]:
    """Return an adapter's branch under the standard tensor names, with its gate folded into the values.

    Raises WeightsError if the standard format cannot hold this branch.
    """
    spec = _exportable(adapter, name)
    assert spec.projection is not None
    mine, layers = adapter.layers(), cross_attention(denoiser)
    if list(mine) != list(attention_layers(denoiser)):
        raise WeightsError("This adapter was built for another denoiser: pass the denoiser that it belongs to.")
    projection = adapter.get_submodule(f"projections.{name}").state_dict()
    tensors = {f"{PROJECTION}{key}": tensor.detach().contiguous() for key, tensor in projection.items()}
    for number, layer in numbered(layers):
        branch = mine[layer].branches()[name]
        key, value, gate = (each.detach() for each in (branch.to_k.weight, branch.to_v.weight, branch.gate))
        folded = (value.float() * (gate.float() * GATE_GAIN)[:, None]).to(value.dtype)
        tensors[f"{BRANCHES}{number}.to_k_ip.weight"] = key.contiguous()
        tensors[f"{BRANCHES}{number}.to_v_ip.weight"] = folded.contiguous()
    if wrong := next((str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in PRECISIONS), None):
        raise WeightsError(f"The adapter is in {wrong}: convert it to float32, float16 or bfloat16 first.")
    return tensors


def export_adapter(
    adapter: Adapter,
    denoiser: nn.Module,
    path: str | os.PathLike[str],
    image_encoder: Any = None,
    name: str = "vision",
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write branch `name` as a standard file (.safetensors), with `image_encoder/` and separate LoRA files next to it.

    `image_encoder` is the encoder that the adapter was trained with, ours or transformers'; the adapter does not work
    with another one. diffusers loads the folder with load_ip_adapter(FOLDER, subfolder="", weight_name=FILE).
    `metadata` is added to the adapter's own metadata. Raises WeightsError if the standard format cannot hold the
    branch.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise WeightsError(f"{file} must end in .safetensors: choose another name.")
    tensors = ip_adapter_tensors(adapter, denoiser, name)
    layout = read_layout({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    assert not layout.problem, layout.problem
    if image_encoder is not None:
        check_encoder(layout, image_encoder)
    with write_whole(file.parent) as folder:
        save_file(tensors, folder / file.name, {"format": "pt", **_facts(adapter, layout), **(metadata or {})})
        if image_encoder is not None:
            _save_encoder(image_encoder, folder / ENCODER_FOLDER)
        if adapter.lora_rank:
            _save_lora(adapter, folder)
    encoder = None if image_encoder is None else file.parent / ENCODER_FOLDER
    lora = file.parent / LORA_FILE if adapter.lora_rank else None
    return ExportReport(file, encoder, lora, layout, tuple(_not_carried(adapter, layout, name, encoder is None)))


def _exportable(adapter: Adapter, name: str) -> BranchSpec:
    specs = {spec.name: spec for spec in adapter.branch_specs}
    if name not in specs:
        raise WeightsError(f"The adapter has no branch {name!r}, only {', '.join(specs)}: name the vision branch.")
    spec = specs[name]
    if spec.projection is None:
        raise WeightsError(
            f"Branch {name!r} has no projection, and an IP-Adapter file needs one: export a vision branch."
        )
    if spec.projection.startswith("faceid") or adapter.metadata.get(LAYER) == FACE_LAYER:
        raise WeightsError(
            f"Branch {name!r} reads the embedding of a face, and such files are not written here: use the file that it "
            "was imported from."
        )
    if spec.fusion != "parallel":
        raise WeightsError(
            f"Branch {name!r} shares the softmax of the text, which no IP-Adapter does, so it cannot be exported: "
            "export a branch with parallel attention."
        )
    if spec.projection == "linear" and (spec.tokens or LINEAR_TOKENS) != LINEAR_TOKENS:
        raise WeightsError(
            f"Branch {name!r} makes {spec.tokens} tokens, but a base file holds 4, so it cannot be exported: "
            "export a branch with 4 tokens."
        )
    return spec


def _not_carried(adapter: Adapter, layout: Layout, name: str, without_encoder: bool) -> list[str]:
    """Return one sentence for each thing that the standard format cannot hold, with what to do about it."""
    specs = {spec.name: spec for spec in adapter.branch_specs}
    notes = [
        f"The branch {other!r} is not exported: the standard format holds one branch."
        for other in specs
        if other != name
    ]
    if adapter.lora_rank:
        notes.append(
            f"The LoRA is in separate files next to the adapter, {LORA_FILE} for diffusers and {KOHYA_FILE} for "
            "ComfyUI; its strength is set separately."
        )
    if specs[name].router:
        notes.append(
            "The router, which keeps several people in one picture apart, is not exported: the standard format has no "
            "place for it. One person is drawn as before; give several people masks in the other program."
        )
    if specs[name].scale != 1:
        notes.append(
            f"The file cannot hold the default strength {specs[name].scale:g}: call "
            f"set_ip_adapter_scale({specs[name].scale:g})."
        )
    if specs[name].absent == "off":
        notes.append(
            "This branch is off in rows without a person, but other programs encode an empty picture there: with "
            "guidance their pictures differ from ours, without guidance they are equal."
        )
    if layout.family is None:
        notes.append("The base is not a well-known one: the file fits only this denoiser.")
    if without_encoder:
        notes.append(
            "No image encoder is next to the file: supply the encoder that the adapter was trained with, because it "
            "does not work with another one."
        )
    notes += layout.unsupported_sentences()
    return [*notes, "Masks, time windows and other call settings are not in the file: set them in the other program."]


def _facts(adapter: Adapter, layout: Layout) -> dict[str, str]:
    own = {str(key): adapter.metadata[key] for key in ("base", "encoder", "licence") if key in adapter.metadata}
    facts = {
        "variant": layout.variant,
        "tokens": "all" if layout.tokens is None else str(layout.tokens),
        "feature_layer": "pooled embedding" if layout.kind == "linear" else "penultimate",
        "exported_by": "imagine",
    }
    family = {"base": layout.family} if layout.family else {}
    return {**facts, **family, **own}


def _save_encoder(image_encoder: Any, folder: Path) -> None:
    model = to_transformers(image_encoder) if isinstance(image_encoder, VisionEncoder) else image_encoder
    with quiet_libraries():
        model.save_pretrained(folder)
    remove_local_paths(folder)


def _save_lora(adapter: Adapter, folder: Path) -> None:
    """Save the LoRA of all attention layers in diffusers' format. Without an alpha entry its scale is 1, as it is here.

    ComfyUI cannot read peft's tensor names, so a copy with kohya's names and equivalent alphas is saved next to it.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    layers = {
        f"{layer}.{target}.{key}": tensor.detach().contiguous()
        for layer, weights in adapter.layers().items()
        for target in adapter.lora_targets
        if (low_rank := weights.low_rank(target)) is not None
        for key, tensor in low_rank.state_dict().items()
    }
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers=layers)
    kohya = convert_state_dict_to_kohya({f"unet.{name}": tensor for name, tensor in layers.items()})
    save_file({name: tensor.contiguous() for name, tensor in kohya.items()}, folder / KOHYA_FILE, {"format": "pt"})
