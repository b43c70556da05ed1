"""Read the networks of a base, and the adapters on its denoiser, from a folder or from the table of public bases.

No weights are needed: a network is its class and the contents of its config.json. Those who want to compute build the
real classes from it, on torch's meta device if only shapes matter (`imagine.planning`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imagine.adapter.adapter import LORA_TARGETS, BranchSpec, read_metadata, saved_specs
from imagine.errors import ConfigError, WeightsError
from imagine.networks.weights import ADAPTERS, INDEX, default_folder

PORTRAIT = "portrait"  # the shipped weights
DENOISERS = ("unet", "transformer")  # component names of the denoiser
OURS = ("VisionEncoder",)
DIFFUSERS = (
    "UNet2DConditionModel", "AutoencoderKL", "AutoencoderDC", "AutoencoderKLFlux2", "AutoencoderKLQwenImage",
    "Flux2Transformer2DModel", "ZImageTransformer2DModel", "QwenImageTransformer2DModel", "FluxTransformer2DModel",
    "SD3Transformer2DModel", "SanaTransformer2DModel", "PixArtTransformer2DModel",
)  # fmt: skip
TRANSFORMERS = (
    "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "CLIPVisionModelWithProjection", "Qwen3Model",
    "Qwen3ForCausalLM", "Qwen2_5_VLForConditionalGeneration", "Mistral3ForConditionalGeneration", "Gemma2Model",
    "Gemma2ForCausalLM",
)  # fmt: skip


@dataclass(frozen=True)
class Component:
    """One network: the name of its class and the contents of its config.json."""

    kind: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class AdapterShape:
    """The arguments that an adapter is built from; `heads` and `every` are those of adapters on transformers.

    lora_targets: where the LoRA acts. On a transformer, the default of U-Nets stands for all projections of its
    attention.
    """

    branches: tuple[BranchSpec, ...]
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = LORA_TARGETS
    heads: int | None = None
    every: int = 1


@dataclass(frozen=True)
class Blueprint:
    """The networks of a base, and the adapters on its denoiser.

    pipeline: the class in diffusers that draws with it; "" if it is not known. steps, guided: what its publisher
    recommends; None where the pipeline's default holds.
    """

    name: str
    components: Mapping[str, Component]
    adapters: Mapping[str, AdapterShape] = field(default_factory=dict)
    pipeline: str = ""
    steps: int | None = None
    guided: bool | None = None

    @property
    def denoiser_name(self) -> str:
        """Return the component name of the denoiser. Raises WeightsError if there is none."""
        for name in DENOISERS:
            if name in self.components:
                return name
        raise WeightsError(f"{self.name} has no denoiser that can be planned for: choose a folder of a diffusers base.")

    @property
    def denoiser(self) -> Component:
        """Return the denoiser."""
        return self.components[self.denoiser_name]


def read_folder(name: str, folder: Path) -> Blueprint:
    """Return the base in a folder as diffusers or imagine save it. Raises WeightsError if it cannot be planned for."""
    index = _json(folder / INDEX)
    components = {name: Component(kind, _json(folder / name / "config.json")) for name, kind in _listed(index).items()}
    if not any(name in components for name in DENOISERS) or "vae" not in components:
        missing = "vae" if any(name in components for name in DENOISERS) else " or ".join(DENOISERS)
        raise WeightsError(
            f"{folder} has no {missing} that can be planned for: choose a folder of Stable Diffusion or of a diffusion "
            "transformer that imagine knows."
        )
    adapters = {each: _shape(folder / each) for each in ADAPTERS if (folder / each).is_dir()}
    guided = False if index.get("is_distilled") is True else None
    return Blueprint(name, components, adapters, str(index.get("_class_name", "")), guided=guided)


def portrait_folder() -> Path:
    """Return the folder of the shipped weights."""
    return default_folder()


def cached_folder(source: str, known: str) -> Path:
    """Return the folder of a hub repository in the local cache. Raises ConfigError if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, INDEX)
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise ConfigError(
            f"There is no base {source!r}: choose a folder, one of {known}, or a hub id that is already downloaded."
        )
    return Path(found).parent


def _listed(index: Mapping[str, Any]) -> dict[str, str]:
    """Return the components of a pipeline's index that can be planned for: name -> class."""
    kinds = {*OURS, *DIFFUSERS, *TRANSFORMERS}
    named = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    return {name: kind for name, kind in named.items() if kind in kinds}


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
        if "branch_heads" in metadata:  # of a transformer, without LoRA of our own
            heads, every = int(metadata["branch_heads"]), int(metadata["every"])
            return AdapterShape(saved_specs(metadata), heads=heads, every=every)
        targets = tuple(json.loads(metadata["lora_targets"])) or LORA_TARGETS
        return AdapterShape(saved_specs(metadata), int(metadata["lora_rank"]), targets)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"The metadata of the adapter in {folder} do not describe its branches and LoRA: save it again."
        ) from error
