"""Plan inference with networks on the meta device: parameters, arithmetic and memory of every part of a call.

    text encoders     each of them, for sentences and negative sentences
    vision encoder    for all references
    denoiser steps    with the adapters; the first step also computes the keys and values that the other steps reuse
    autoencoder       decoding

The parts run one after another, so memory depends on the weights that are on the device beside the running part: all
weights; its own and the adapters'; or (sequential) those of one layer. `DrawingPlanner.plan` measures each part once
and caches the result. `DrawingPlanner.combinations` yields the possible switches, the best first.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imagine.adapter.adapter import Adapter, BranchSpec, prepare
from imagine.errors import ConfigError
from imagine.networks.weights import ADAPTERS
from imagine.planning.bases import T5, VISION, Blueprint, Networks, build
from imagine.planning.cards import BUS_BANDWIDTH, with_reserve
from imagine.planning.meter import Meter, parameter_count, planned_kernels, weight_bytes
from imagine.records import Conditioning, Tokens

Offload = Literal["none", "model", "sequential"]
OFFLOADS: tuple[Offload, ...] = ("none", "model", "sequential")  # fastest first
Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEXT_LENGTHS = {T5: 128, "byt5": 32}  # planned tokens for T5 and ByT5; CLIP always gets a full window
TILE = 64  # side of the autoencoder's tiles in latents; diffusers' default would not split a picture of 1024 px


@dataclass(frozen=True)
class DrawingWorkload:
    """The size of a call to plan."""

    resolution: int  # side in pixels
    batch: int = 1  # pictures per call
    steps: int = 30
    references: int = 1  # per picture
    guided: bool = True  # classifier-free guidance

    @property
    def rows(self) -> int:
        """Return the batch size of the denoiser: guidance predicts every picture with and without its sentence."""
        return self.batch * (2 if self.guided else 1)


@dataclass(frozen=True)
class DrawingOptions:
    """The switches of a call that affect its memory."""

    precision: Precision = "bf16"
    offload: Offload = "none"
    tiling: bool = False

    def switches(self, vae: Any, batch: int) -> list[str]:
        """Return the switches as lines of Python, for a pipeline with this autoencoder."""
        dtype = str(DTYPES[self.precision])
        lines = [f"pipe = ImaginePipeline.from_pretrained(..., dtype={dtype})"]
        lines += {
            "none": ['pipe.to("cuda")'],
            "model": ["pipe.enable_model_cpu_offload()"],
            "sequential": ["pipe.enable_sequential_cpu_offload()"],
        }[self.offload]
        if self.tiling:
            lines.append("pipe.vae.enable_tiling()")
            if hasattr(vae, "tile_latent_min_size"):
                pixels = TILE * compression(vae)
                lines.append(f"pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = {TILE}, {pixels}")
            if batch > 1:
                lines.append("pipe.vae.enable_slicing()")
        return lines


@dataclass(frozen=True)
class Part:
    """The measurements of one part of a call."""

    parameters: int  # number of parameters
    weights: int  # bytes of weights
    working: int  # peak bytes of other tensors while it runs
    flops: int
    largest_layer: int  # bytes of weights


@dataclass(frozen=True)
class DrawingPlan:
    """The requirements of a call with one choice of switches."""

    options: DrawingOptions
    parts: Mapping[str, Part]
    flops_step: int  # of the second and every later step
    flops: int  # of the whole call
    at_once: Mapping[str, int]  # bytes of all tensors on the device while each part runs
    moved: int  # bytes of weights that are copied to the device during the call

    @property
    def busiest(self) -> str:
        """Return the part with the most memory."""
        return max(self.at_once, key=lambda name: self.at_once[name])

    @property
    def peak(self) -> int:
        """Return the bytes of memory that a device needs."""
        return with_reserve(self.at_once[self.busiest])

    def seconds(self, speed: float) -> float:
        """Return the seconds of the call at `speed` FLOP per second; copies of weights do not overlap with it."""
        return self.flops / speed + self.moved / BUS_BANDWIDTH


def unet_inputs(unet: nn.Module, rows: int, sides: tuple[int, int], text_length: int = 77) -> dict[str, Any]:
    """Return inputs for any Stable Diffusion denoiser, on its device and in its precision (random, or meta tensors)."""
    config: Any = unet.config
    parameter = next(unet.parameters())

    def random_tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=parameter.device, dtype=parameter.dtype)

    inputs: dict[str, Any] = {
        "sample": random_tensor(rows, config.in_channels, *sides),
        "timestep": torch.full((rows,), 500.0, device=parameter.device),
        "encoder_hidden_states": random_tensor(rows, text_length, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        ids = 6  # SDXL's size and crop conditioning
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": random_tensor(rows, pooled), "time_ids": random_tensor(rows, ids)}
    if config.class_embed_type == "projection":
        inputs["class_labels"] = random_tensor(rows, config.projection_class_embeddings_input_dim)
    return inputs


def branch_tokens(adapter: Adapter, spec: BranchSpec, rows: int, references: int, vision_tokens: int) -> Tokens:
    """Return a branch's tokens: those of a sentence, or of references with `vision_tokens` features each."""
    length = TEXT_LENGTHS.get(spec.name, vision_tokens)
    width = spec.input_width or spec.width
    if spec.name != VISION:
        shape: tuple[int, ...] = (rows, length, width)
    else:
        shape = (rows, references, width) if spec.projection == "linear" else (rows, references, length, width)
        if spec.projection is None:
            shape = (rows, references * length, width)
    return adapter.tokens(spec.name, torch.randn(*shape, device=adapter.device, dtype=adapter.dtype))


def build_conditioning(networks: Networks, rows: int, references: int, vision_tokens: int) -> Conditioning:
    """Return the conditioning that the denoiser attends to beside its own text: one sequence per adapter branch."""
    return Conditioning({
        spec.name: branch_tokens(adapter, spec, rows, references, vision_tokens)
        for adapter in networks.adapters.values()
        for spec in adapter.branch_specs
    })  # fmt: skip


def vision_token_count(vision_encoder: Any) -> int:
    """Return the number of tokens that the vision encoder makes from one reference."""
    return 1 + (int(vision_encoder.config.image_size) // int(vision_encoder.config.patch_size)) ** 2


def encode_text(encoder: Any, rows: int, branch: str) -> Any:
    """Run a text encoder on `rows` sentences of its planned length."""
    length = getattr(encoder.config, "max_position_embeddings", None) or TEXT_LENGTHS[branch]
    return encoder(input_ids=torch.zeros(rows, length, dtype=torch.long, device=next(encoder.parameters()).device))


def encode_crops(vision_encoder: Any, references: int) -> Any:
    """Run a vision encoder, ours or one of transformers, on `references` face crops."""
    side = int(vision_encoder.config.image_size)
    parameter = next(vision_encoder.parameters())
    crops = torch.zeros(references, 3, side, side, device=parameter.device, dtype=parameter.dtype)
    return (
        vision_encoder(crops)
        if hasattr(vision_encoder, "tower")
        else vision_encoder(pixel_values=crops, output_hidden_states=True)
    )


def decode(vae: Any, batch: int, sides: tuple[int, int]) -> Tensor:
    """Run the decoder of an autoencoder on latents with `sides` (height, width)."""
    parameter = next(vae.parameters())
    channels = int(vae.config.latent_channels)
    pictures: Tensor = vae.decode(torch.zeros(batch, channels, *sides, device=parameter.device, dtype=parameter.dtype))[
        0
    ]
    return pictures


class DrawingPlanner:
    """Plan calls of a base, whose networks are on the meta device; each part is measured once and cached."""

    def __init__(self, base: Blueprint, workload: DrawingWorkload) -> None:
        self.base, self.workload = base, workload
        self.networks = build(base)
        self.side = latent_side(self.networks.models["vae"], self.networks.unet, workload.resolution)
        self._cache: dict[tuple[str, Precision, bool], tuple[Part, int]] = {}

    @cached_property
    def parameters(self) -> dict[str, int]:
        return {name: parameter_count(module) for name, module in self.networks.modules().items()}

    def combinations(self, first: DrawingOptions, fixed: Collection[str] = ()) -> Iterator[DrawingOptions]:
        """Yield every choice of switches, fastest first; for each, tiles come last because seams may be visible.

        The fields of `first` that `fixed` names do not change. Precision, unless fixed, is bf16: fp16 needs as much.
        """
        precision = first.precision if "precision" in fixed else "bf16"
        for offload in (first.offload,) if "offload" in fixed else OFFLOADS:
            for tiling in (first.tiling,) if "tiling" in fixed else (False, True):
                yield DrawingOptions(precision, offload, tiling)

    def plan(self, options: DrawingOptions) -> DrawingPlan:
        """Return the requirements of a call with these switches."""
        parts: dict[str, Part] = {}
        second_step_flops = 0
        for name in self._part_names():
            parts[name], flops = self._measured(name, options.precision, options.tiling)
            second_step_flops = flops if name == "unet" else second_step_flops
        for name, module in self.networks.adapters.items():
            weights = self._bytes(module, options.precision)
            parts[name] = Part(self.parameters[name], weights, 0, 0, 0)
        repeats = self.workload.steps - 1
        total = sum(part.flops for part in parts.values()) + repeats * second_step_flops
        at_once = {
            name: self._weights_on_device(parts, name, options.offload) + parts[name].working
            for name in self._part_names()
        }
        return DrawingPlan(options, parts, second_step_flops, total, at_once, self._moved(parts, options.offload))

    def _part_names(self) -> list[str]:
        """Return the parts that run one after another."""
        vision_encoder = [self.networks.vision_encoder] if self.networks.vision_encoder else []
        return [*self.networks.text_encoders(), *vision_encoder, "unet", "vae"]

    def _weights_on_device(self, parts: Mapping[str, Part], at_work: str, offload: Offload) -> int:
        """Return the bytes of weights on the device while part `at_work` runs."""
        if offload == "none":
            return sum(part.weights for part in parts.values())
        adapters = sum(parts[name].weights for name in ADAPTERS if name in parts)
        if offload == "model":
            return adapters + parts[at_work].weights
        vision_encoder = self.networks.vision_encoder  # stays on the device, as `forward` is not its only entry
        vision_weights = parts[vision_encoder].weights if vision_encoder else 0
        return adapters + vision_weights + (0 if at_work == vision_encoder else parts[at_work].largest_layer)

    def _moved(self, parts: Mapping[str, Part], offload: Offload) -> int:
        if offload == "none":
            return 0
        times = self.workload.steps if offload == "sequential" else 1
        return sum(part.weights * (times if name == "unet" else 1) for name, part in parts.items())

    def _bytes(self, module: nn.Module, precision: Precision) -> int:
        return weight_bytes(nn.Module.to(module, DTYPES[precision]))

    def _measured(self, name: str, precision: Precision, tiling: bool) -> tuple[Part, int]:
        """Measure a part; return it and the arithmetic of a repeated run (0 where nothing is repeated)."""
        tiling = tiling and name == "vae"
        key = (name, precision, tiling)
        if key not in self._cache:
            module = self.networks.models[name]
            # diffusers decodes in float32 if the autoencoder overflows in fp16 (force_upcast).
            upcast = name == "vae" and precision == "fp16" and bool(getattr(module.config, "force_upcast", False))
            for other_module in self.networks.modules().values():  # diffusers' own `to` would print a warning
                nn.Module.to(other_module, DTYPES["fp32" if upcast else precision])
            with torch.no_grad(), planned_kernels(), Meter() as meter:
                repeated_flops = self._run_part(name, tiling, meter)
            largest = max((_own_bytes(layer) for layer in module.modules()), default=0)
            weights = weight_bytes(module)
            self._cache[key] = (
                Part(self.parameters[name], weights, meter.peak, meter.flops - repeated_flops, largest),
                repeated_flops,
            )
        return self._cache[key]

    def _run_part(self, name: str, tiling: bool, meter: Meter) -> int:
        """Run a part; return the arithmetic of its second run if it has one, else 0."""
        networks, workload = self.networks, self.workload
        module = networks.models[name]
        if name == "unet":
            return step_twice(networks, workload.rows, (self.side, self.side), workload.references, meter)
        if name == "vae":
            _tile(module, tiling)
            decode(module, workload.batch, (self.side, self.side))
        elif name == networks.vision_encoder:
            encode_crops(module, workload.references * workload.batch)
        else:
            encode_text(module, workload.rows, "byt5" if name in ("byt5_encoder", "text_encoder_3") else T5)
        return 0


def step_twice(
    networks: Networks, rows: int, sides: tuple[int, int], references: int, meter: Meter | None = None
) -> int:
    """Run two steps; return the arithmetic of the second, which reuses the keys and values of the first.

    Return 0 without a meter.
    """
    vision_tokens = vision_token_count(networks.models[networks.vision_encoder]) if networks.vision_encoder else 0
    inputs = unet_inputs(networks.unet, rows, sides)
    conditioning = prepare(networks.unet, build_conditioning(networks, rows, references, vision_tokens))
    options = {"conditioning": conditioning} if conditioning.branches else None
    before = 0
    for _ in range(2):
        before = meter.flops if meter else 0
        networks.unet(**inputs, cross_attention_kwargs=options, return_dict=False)
    return meter.flops - before if meter else 0


def latent_side(vae: Any, unet: Any, resolution: int) -> int:
    """Return the side of the latents for this resolution. Raises ConfigError if the base cannot draw it."""
    factor = step = compression(vae)
    if hasattr(vae, "spatial_compression_ratio"):  # our denoiser needs even latents at every level; others pad
        step *= 2 ** (len(unet.config.block_out_channels) - 1)
    if resolution < step or resolution % step:
        lower = max(step, resolution // step * step)
        raise ConfigError(
            f"A resolution of {resolution} does not fit the base: choose a multiple of {step}, such as {lower}."
        )
    return resolution // factor


def compression(vae: Any) -> int:
    """Return the number of pixels per latent along a side."""
    ratio = getattr(vae, "spatial_compression_ratio", None)
    return int(ratio or 2 ** (len(vae.config.block_out_channels) - 1))


def _tile(vae: Any, tiling: bool) -> None:
    if not tiling:
        vae.disable_tiling()
        vae.disable_slicing()
        return
    vae.enable_tiling()
    vae.enable_slicing()
    if hasattr(vae, "tile_latent_min_size"):  # AutoencoderKL: its enable_tiling takes no sizes
        vae.tile_latent_min_size, vae.tile_sample_min_size = TILE, TILE * compression(vae)


def _own_bytes(layer: nn.Module) -> int:
    """Return the bytes of a layer's own parameters, without those of its children."""
    return sum(tensor.numel() * tensor.element_size() for tensor in layer.parameters(recurse=False))
