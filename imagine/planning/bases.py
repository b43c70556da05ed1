"""Read the configurations of a base's networks, from a folder or from a small table of public bases, and build them.

No weights are needed: the real classes are built on torch's meta device, where tensors have shapes but no values. The
table holds the values of the public config.json files that differ from the classes' defaults:
stabilityai/stable-diffusion-xl-base-1.0, stable-diffusion-v1-5/stable-diffusion-v1-5, google/t5-v1_1-xl and -xxl,
google/ul2, google/byt5-small and -base on the hub, and open_clip's model_configs/ViT-H-14.json.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imagine.adapter.adapter import LORA_TARGETS, Adapter, BranchSpec, read_metadata, saved_specs
from imagine.errors import ConfigError, WeightsError
from imagine.networks.weights import ADAPTERS, INDEX, default_folder

PORTRAIT = "portrait"  # the shipped weights
VISION, T5, BYT5 = "vision", "t5", "byt5"  # our branches
VISION_ENCODERS = ("vision_encoder", "image_encoder")  # component names of the vision encoder, in order of preference
_OURS = ("VisionEncoder",)
_DIFFUSERS = ("UNet2DConditionModel", "AutoencoderKL", "AutoencoderDC")
_TRANSFORMERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "CLIPVisionModelWithProjection")


@dataclass(frozen=True)
class Component:
    """One network: the name of its class and the contents of its config.json."""

    kind: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class AdapterShape:
    """The arguments that an adapter is built from."""

    branches: tuple[BranchSpec, ...]
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = LORA_TARGETS


@dataclass(frozen=True)
class Blueprint:
    """The networks of a base, and the adapters on its denoiser."""

    name: str
    components: Mapping[str, Component]
    adapters: Mapping[str, AdapterShape] = field(default_factory=dict)


@dataclass
class Networks:
    """The built networks of a base, with the adapters attached to the denoiser."""

    models: dict[str, nn.Module]
    adapters: dict[str, Adapter]

    @property
    def unet(self) -> Any:
        return self.models["unet"]

    @property
    def vision_encoder(self) -> str | None:
        """Return the component name of the vision encoder; None if there is none."""
        return next((name for name in VISION_ENCODERS if name in self.models), None)

    def text_encoders(self) -> list[str]:
        """Return the component names of the text encoders."""
        return [
            name for name in self.models if name.startswith("text_encoder") or name in ("t5_encoder", "byt5_encoder")
        ]

    def modules(self) -> dict[str, nn.Module]:
        """Return every network and every adapter, by name."""
        return {**self.models, **self.adapters}


def _clip_text(kind: str, **config: Any) -> Component:
    shared = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2}
    return Component(kind, {**shared, **config})


_CLIP_L = _clip_text(
    "CLIPTextModel", hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    hidden_act="quick_gelu", projection_dim=768,
)  # fmt: skip
_BIG_G = _clip_text(
    "CLIPTextModelWithProjection", hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
    num_attention_heads=20, hidden_act="gelu", projection_dim=1280,
)  # fmt: skip


def _autoencoder(sample_size: int, force_upcast: bool) -> Component:
    return Component("AutoencoderKL", {
        "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "latent_channels": 4,
        "sample_size": sample_size, "force_upcast": force_upcast,
    })  # fmt: skip


_SDXL = {
    "unet": Component("UNet2DConditionModel", {
        "sample_size": 128, "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }),
    "vae": _autoencoder(1024, True),
    "text_encoder": _CLIP_L,
    "text_encoder_2": _BIG_G,
}  # fmt: skip
_SD15 = {
    "unet": Component("UNet2DConditionModel", {
        "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "attention_head_dim": 8, "cross_attention_dim": 768,
    }),
    "vae": _autoencoder(512, False),
    "text_encoder": _CLIP_L,
}  # fmt: skip
KNOWN_BASES = {"sdxl": _SDXL, "sd15": _SD15}


def _t5(d_model: int, d_ff: int, layers: int, heads: int, d_kv: int, vocabulary: int = 32128) -> Component:
    return Component("T5EncoderModel", {
        "d_model": d_model, "d_ff": d_ff, "num_layers": layers, "num_heads": heads, "d_kv": d_kv,
        "vocab_size": vocabulary, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    })  # fmt: skip


TEXT_ENCODERS = {  # text encoders beside CLIP; the ByT5 ones read the letters
    "t5-xl": _t5(2048, 5120, 24, 32, 64),
    "t5-xxl": _t5(4096, 10240, 24, 64, 64),
    "ul2": _t5(4096, 16384, 32, 16, 256),
    "byt5-small": _t5(1472, 3584, 12, 6, 64, 384),
    "byt5-base": _t5(1536, 3968, 18, 12, 64, 384),
}
VIT_H = Component("VisionEncoder", {
    "image_size": 224, "patch_size": 14, "width": 1280, "layers": 32, "heads": 16, "mlp_ratio": 4.0,
    "embed_width": 1024,
})  # fmt: skip


def read_base(source: str) -> Blueprint:
    """Return the base `source`: a name in `KNOWN_BASES`, "portrait", a folder, or a hub id that is in the local cache.

    Downloads nothing. Raises ConfigError for an unknown base, and WeightsError if its folder cannot be planned for.
    """
    if source in KNOWN_BASES:
        return Blueprint(source, KNOWN_BASES[source])
    folder = default_folder() if source == PORTRAIT else Path(source).expanduser()
    if not folder.is_dir():
        folder = _cached(source)
    components = {name: _component(folder / name, kind) for name, kind in _listed(folder).items()}
    for needed in ("unet", "vae"):
        if needed not in components:
            raise WeightsError(f"{folder} has no {needed} that can be planned for: choose a Stable Diffusion folder.")
    return Blueprint(source, components, {name: _shape(folder / name) for name in ADAPTERS if (folder / name).is_dir()})


def add_branches(base: Blueprint, text_encoders: Sequence[str], projection: str, lora_rank: int) -> Blueprint:
    """Return the base with our encoders and adapters; a base that has adapters is returned unchanged.

    `text_encoders` are names in `TEXT_ENCODERS`, each with a branch; `projection` of the vision branch is "plus" or
    "full". Raises ConfigError if two text encoders would feed one branch, or a name is unknown.
    """
    if base.adapters:
        return base
    components = dict(base.components)
    text: list[BranchSpec] = []
    for name in text_encoders:
        if name not in TEXT_ENCODERS:
            raise ConfigError(f"There is no text encoder {name!r}: choose from {', '.join(TEXT_ENCODERS)}.")
        branch = BYT5 if name.startswith("byt5") else T5
        if any(spec.name == branch for spec in text):
            raise ConfigError(f"{' and '.join(text_encoders)} would feed one branch, {branch}: choose one of them.")
        components[f"{branch}_encoder"] = TEXT_ENCODERS[name]
        text.append(BranchSpec(branch, TEXT_ENCODERS[name].config["d_model"]))
    vision_encoder = next((name for name in VISION_ENCODERS if name in components), None)
    if vision_encoder is None:
        vision_encoder = VISION_ENCODERS[0]
        components[vision_encoder] = VIT_H
    encoder_config = components[vision_encoder].config
    width = int(encoder_config.get("width") or encoder_config["hidden_size"])
    text_width = _text_width(components["unet"])
    vision = BranchSpec(VISION, text_width, projection=projection, input_width=width)  # type: ignore[arg-type]
    adapters = {"text_adapter": AdapterShape(tuple(text))} if text else {}
    return Blueprint(base.name, components, {**adapters, "adapter": AdapterShape((vision,), lora_rank)})


def default_resolution(base: Blueprint) -> int:
    """Return the default side of a base's pictures, in pixels."""
    latents = int(base.components["unet"].config.get("sample_size") or 64)
    vae = base.components["vae"].config
    halvings = len(vae.get("block_out_channels") or vae["encoder_block_out_channels"]) - 1
    return latents * 2**halvings


def build(base: Blueprint, device: str = "meta", leave_out: Sequence[str] = ()) -> Networks:
    """Build every network of a base and attach its adapters; on the meta device they take no memory."""
    with torch.device(device):
        models = {
            name: _built(name, component).eval() for name, component in base.components.items() if name not in leave_out
        }
        adapters = {
            name: Adapter(models["unet"], shape.branches, shape.lora_rank, shape.lora_targets).eval()
            for name, shape in base.adapters.items()
        }
    for adapter in adapters.values():
        adapter.attach(models["unet"])
    return Networks(models, adapters)


def _built(name: str, component: Component) -> Any:
    library = "diffusers" if component.kind in _DIFFUSERS else "transformers"
    library = "imagine.networks.encoders" if component.kind in _OURS else library
    kind = getattr(importlib.import_module(library), component.kind)
    try:
        if library == "transformers":
            return kind(kind.config_class.from_dict(dict(component.config)))
        return kind.from_config(dict(component.config))
    except Exception as error:  # wrong values raise many kinds of errors, and all of them have the same remedy
        reason = str(error).strip().split("\n")[0][:200]
        raise WeightsError(
            f"No network can be built from the config.json of {name} ({reason}): download it again."
        ) from error


def _listed(folder: Path) -> dict[str, str]:
    """Return the components of a pipeline's folder that can be planned for: name -> class."""
    index = _json(folder / INDEX)
    kinds = {*_OURS, *_DIFFUSERS, *_TRANSFORMERS}
    named = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    return {name: kind for name, kind in named.items() if kind in kinds}


def _component(folder: Path, kind: str) -> Component:
    return Component(kind, _json(folder / "config.json"))


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{file} cannot be read: choose the folder of a pipeline, with its config.json files."
        ) from error
    if not isinstance(found, dict):
        raise WeightsError(f"{file} does not describe a network: download it again.")
    return found


def _shape(folder: Path) -> AdapterShape:
    metadata = read_metadata(folder)
    try:
        targets = tuple(json.loads(metadata["lora_targets"])) or LORA_TARGETS
        return AdapterShape(saved_specs(metadata), int(metadata["lora_rank"]), targets)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"The metadata of the adapter in {folder} do not describe its branches and LoRA: save it again."
        ) from error


def _cached(source: str) -> Path:
    """Return the folder of a hub repository in the local cache. Raises ConfigError if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, INDEX)
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        names = ", ".join((*KNOWN_BASES, PORTRAIT))
        raise ConfigError(
            f"There is no base {source!r}: choose a folder, one of {names}, or a hub id that is already downloaded."
        )
    return Path(found).parent


def _text_width(unet: Component) -> int:
    width = unet.config.get("cross_attention_dim", 1280)  # diffusers' default
    return int(width[0] if isinstance(width, (list, tuple)) else width)
