"""Build the networks of a base, with its adapters attached to the denoiser, from their configurations.

No weights are needed: the real classes are built on torch's meta device, where tensors have shapes but no values.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from imagine.adapter.adapter import LORA_TARGETS, Adapter, BranchSpec
from imagine.blueprints.blueprint import DENOISERS, DIFFUSERS, OURS, AdapterShape, Blueprint, Component
from imagine.blueprints.published import published_text_encoder, published_vision_encoder
from imagine.errors import ConfigError, WeightsError

VISION, T5, BYT5 = "vision", "t5", "byt5"  # our branches
VISION_ENCODERS = ("vision_encoder", "image_encoder")  # component names of the vision encoder, in order of preference
LORA_PART = "lora"
# The layers that LoRA on a transformer is added to: the projections of its attention, fused in FLUX.2's single blocks.
TRANSFORMER_LORA = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")


@dataclass
class Networks:
    """The built networks of a base, with the adapters attached to the denoiser."""

    models: dict[str, nn.Module]
    adapters: dict[str, Adapter]

    @property
    def denoiser_name(self) -> str:
        """Return the component name of the denoiser."""
        return next(name for name in DENOISERS if name in self.models)

    @property
    def denoiser(self) -> Any:
        """Return the denoiser."""
        return self.models[self.denoiser_name]

    @property
    def unet(self) -> Any:
        """Return the denoiser of a Stable Diffusion base."""
        return self.models["unet"]

    @property
    def vision_encoder(self) -> str | None:
        """Return the component name of the vision encoder; None if there is none."""
        return next((name for name in VISION_ENCODERS if name in self.models), None)

    def text_encoders(self) -> list[str]:
        """Return the component names of the text encoders."""
        return [name for name in self.models if is_text_encoder(name)]

    def modules(self) -> dict[str, nn.Module]:
        """Return every network and every adapter, by name."""
        return {**self.models, **self.adapters}


def is_text_encoder(name: str) -> bool:
    """Return whether a component of this name encodes text."""
    return name.startswith("text_encoder") or name in ("t5_encoder", "byt5_encoder")


def add_branches(base: Blueprint, text_encoders: Sequence[str], projection: str, lora_rank: int) -> Blueprint:
    """Return the base with our encoders and adapters; a base that has adapters is returned unchanged.

    `text_encoders` are names of the table, each with a branch on a U-Net; `projection` of the vision branch is "plus"
    or "full". Raises ConfigError if two text encoders would feed one branch, a name is unknown, or the denoiser takes
    no such branch.
    """
    if base.adapters:
        return base
    components = dict(base.components)
    text: list[BranchSpec] = []
    for name in text_encoders:
        encoder = published_text_encoder(name)
        if base.denoiser_name != "unet":
            raise ConfigError(f"{base.name} is a transformer, whose adapters read no text: use --readers none.")
        branch = BYT5 if name.startswith("byt5") else T5
        if any(spec.name == branch for spec in text):
            raise ConfigError(f"{' and '.join(text_encoders)} would feed one branch, {branch}: choose one of them.")
        components[f"{branch}_encoder"] = encoder
        text.append(BranchSpec(branch, encoder.config["d_model"]))
    vision_encoder = next((name for name in VISION_ENCODERS if name in components), None)
    if vision_encoder is None:
        vision_encoder = VISION_ENCODERS[0]
        components[vision_encoder] = published_vision_encoder()
    encoder_config = components[vision_encoder].config
    width = int(encoder_config.get("width") or encoder_config["hidden_size"])
    token_width = _text_width(base.denoiser) if base.denoiser_name == "unet" else width
    vision = BranchSpec(VISION, token_width, projection=projection, input_width=width)  # type: ignore[arg-type]
    adapters = {"text_adapter": AdapterShape(tuple(text))} if text else {}
    return replace(base, components=components, adapters={**adapters, "adapter": AdapterShape((vision,), lora_rank)})


def build(base: Blueprint, device: str = "meta", leave_out: Sequence[str] = ()) -> Networks:
    """Build every network of a base and attach its adapters; on the meta device they take no memory."""
    with torch.device(device):
        models = {
            name: _built(name, component).eval() for name, component in base.components.items() if name not in leave_out
        }
        networks = Networks(models, {})
        for name, shape in base.adapters.items():
            networks.adapters[name] = _adapter(base.name, networks.denoiser, shape).eval()
    for adapter in networks.adapters.values():
        adapter.attach(networks.denoiser)
    return networks


def _adapter(name: str, denoiser: Any, shape: AdapterShape) -> Adapter:
    if isinstance(denoiser, _unet_class()):
        return Adapter(denoiser, shape.branches, shape.lora_rank, shape.lora_targets)
    from imagine.transformer_bases.adapter import TransformerAdapter

    if shape.lora_rank:
        targets = TRANSFORMER_LORA if shape.lora_targets == LORA_TARGETS else shape.lora_targets
        _add_lora(name, denoiser, shape.lora_rank, targets)
    return TransformerAdapter(denoiser, shape.branches, shape.heads, shape.every)


def _unet_class() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel


def _add_lora(name: str, transformer: Any, rank: int, targets: Sequence[str]) -> None:
    """Add LoRA of peft, as diffusers does, to these layers of a transformer."""
    if not hasattr(transformer, "add_adapter"):
        raise ConfigError(f"diffusers loads no LoRA into {name}: use --lora-rank 0.")
    from peft import LoraConfig

    transformer.add_adapter(LoraConfig(r=rank, target_modules=list(targets)))


def lora_parameters(denoiser: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of peft's LoRA on a transformer."""
    return [parameter for name, parameter in denoiser.named_parameters() if ".lora_" in name]


def _built(name: str, component: Component) -> Any:
    library = "diffusers" if component.kind in DIFFUSERS else "transformers"
    library = "imagine.networks.encoders" if component.kind in OURS else library
    try:
        kind = getattr(importlib.import_module(library), component.kind)
        if library == "transformers":
            return kind(kind.config_class.from_dict(dict(component.config)))
        return kind.from_config(dict(component.config))
    except Exception as error:  # wrong values raise many kinds of errors, and all of them have the same remedy
        reason = str(error).strip().split("\n")[0][:200]
        raise WeightsError(
            f"No network can be built from the config.json of {name} ({reason}): download it again."
        ) from error


def _text_width(unet: Component) -> int:
    width = unet.config.get("cross_attention_dim", 1280)  # diffusers' default
    return int(width[0] if isinstance(width, (list, tuple)) else width)
