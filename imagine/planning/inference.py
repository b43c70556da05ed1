"""What drawing takes, from networks on the meta device: parameters, arithmetic and memory of every part of a call.

    reading    each text encoder, for sentences and negative ones
    seeing     the vision encoder, for all references
    steps      the denoiser with its adapters; the first step also makes the keys and values that the others reuse
    decoding   the autoencoder

The parts take turns, so that memory depends on which weights lie beside the part at work: all of them, its own and the
adapters', or (sequential) those of one layer. `Drawing.plan` measures each part once and keeps what it found;
`Drawing.combinations` are what a plan may be made of, the best first.
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
OFFLOADS: tuple[Offload, ...] = ("none", "model", "sequential")  # the fastest first
Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEXT_LENGTHS = {T5: 128, "byt5": 32}  # tokens that T5 and ByT5 are planned with; CLIP always reads a whole window
TILE = 64  # side of the autoencoder's tiles in latents; diffusers' own would leave a picture of 1024 px whole


@dataclass(frozen=True)
class DrawingWorkload:
    """What is to be drawn: pictures at once, pixels a side, steps, references in each, and whether guided by text."""

    resolution: int
    batch: int = 1
    steps: int = 30
    references: int = 1
    guided: bool = True

    @property
    def rows(self) -> int:
        """Batch items of the denoiser: with guidance every picture is predicted with and without its sentence."""
        return self.batch * (2 if self.guided else 1)


@dataclass(frozen=True)
class DrawingOptions:
    """The switches of a call that change how much memory it takes."""

    precision: Precision = "bf16"
    offload: Offload = "none"
    tiling: bool = False

    def switches(self, vae: Any, batch: int) -> list[str]:
        """The same as lines of Python, for a pipeline with this autoencoder."""
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
    """One part of a call: numbers in its weights, bytes of them, bytes made while it works, and its arithmetic."""

    parameters: int
    weights: int
    working: int
    flops: int
    largest_layer: int


@dataclass(frozen=True)
class DrawingPlan:
    """What a call takes under one choice of switches."""

    options: DrawingOptions
    parts: Mapping[str, Part]
    flops_step: int  # of the second step and all later ones
    flops: int  # of the whole call
    at_once: Mapping[str, int]  # bytes of tensors while each part works
    moved: int  # bytes of weights that cross the bus to the device while drawing

    @property
    def busiest(self) -> str:
        return max(self.at_once, key=lambda name: self.at_once[name])

    @property
    def peak(self) -> int:
        """Bytes that a device needs."""
        return with_reserve(self.at_once[self.busiest])

    def seconds(self, speed: float) -> float:
        """Seconds for the call at so many FLOP a second; weights cross the bus meanwhile without overlap."""
        return self.flops / speed + self.moved / BUS_BANDWIDTH


def unet_inputs(unet: nn.Module, rows: int, sides: tuple[int, int], text_length: int = 77) -> dict[str, Any]:
    """Inputs of any Stable Diffusion denoiser, random or without numbers, on its device and in its precision."""
    config: Any = unet.config
    like = next(unet.parameters())

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, device=like.device, dtype=like.dtype)

    inputs: dict[str, Any] = {
        "sample": some(rows, config.in_channels, *sides),
        "timestep": torch.full((rows,), 500.0, device=like.device),
        "encoder_hidden_states": some(rows, text_length, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        ids = 6  # sizes and crop, as SDXL hears them
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": some(rows, pooled), "time_ids": some(rows, ids)}
    if config.class_embed_type == "projection":
        inputs["class_labels"] = some(rows, config.projection_class_embeddings_input_dim)
    return inputs


def branch_tokens(adapter: Adapter, spec: BranchSpec, rows: int, references: int, vision_tokens: int) -> Tokens:
    """A branch's tokens: a sentence's, or those of references, each `vision_tokens` features of the vision encoder."""
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
    """What the denoiser attends to beside its own text: a sequence for every branch of every adapter."""
    return Conditioning({
        spec.name: branch_tokens(adapter, spec, rows, references, vision_tokens)
        for adapter in networks.adapters.values()
        for spec in adapter.branch_specs
    })  # fmt: skip


def vision_token_count(vision_encoder: Any) -> int:
    """How many tokens the vision encoder makes of one reference."""
    return 1 + (int(vision_encoder.config.image_size) // int(vision_encoder.config.patch_size)) ** 2


def encode_text(encoder: Any, rows: int, branch: str) -> Any:
    """Run a text encoder on sentences of the length that it is planned with."""
    length = getattr(encoder.config, "max_position_embeddings", None) or TEXT_LENGTHS[branch]
    return encoder(input_ids=torch.zeros(rows, length, dtype=torch.long, device=next(encoder.parameters()).device))


def encode_crops(vision_encoder: Any, references: int) -> Any:
    """Run a vision encoder, ours or transformers', on so many references."""
    side = int(vision_encoder.config.image_size)
    like = next(vision_encoder.parameters())
    crops = torch.zeros(references, 3, side, side, device=like.device, dtype=like.dtype)
    return (
        vision_encoder(crops)
        if hasattr(vision_encoder, "tower")
        else vision_encoder(pixel_values=crops, output_hidden_states=True)
    )


def decode(vae: Any, batch: int, sides: tuple[int, int]) -> Tensor:
    """Run an autoencoder's decoder on latents."""
    like = next(vae.parameters())
    channels = int(vae.config.latent_channels)
    pictures: Tensor = vae.decode(torch.zeros(batch, channels, *sides, device=like.device, dtype=like.dtype))[0]
    return pictures


class Drawing:
    """A base's networks without numbers, measured part by part; what was measured once is kept."""

    def __init__(self, base: Blueprint, workload: DrawingWorkload) -> None:
        self.base, self.workload = base, workload
        self.networks = build(base)
        self.side = latent_side(self.networks.models["vae"], self.networks.unet, workload.resolution)
        self._cache: dict[tuple[str, Precision, bool], tuple[Part, int]] = {}

    @cached_property
    def parameters(self) -> dict[str, int]:
        return {name: parameter_count(module) for name, module in self.networks.modules().items()}

    def combinations(self, first: DrawingOptions, fixed: Collection[str] = ()) -> Iterator[DrawingOptions]:
        """Every choice of switches, the fastest first; tiles, whose seams may show, after doing without.

        What `fixed` names of `first` stays as it is there. A precision that is not kept is bf16: fp16 takes no less.
        """
        precision = first.precision if "precision" in fixed else "bf16"
        for offload in (first.offload,) if "offload" in fixed else OFFLOADS:
            for tiling in (first.tiling,) if "tiling" in fixed else (False, True):
                yield DrawingOptions(precision, offload, tiling)

    def plan(self, options: DrawingOptions) -> DrawingPlan:
        """What a call takes under these switches."""
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
        """The parts that take turns."""
        vision_encoder = [self.networks.vision_encoder] if self.networks.vision_encoder else []
        return [*self.networks.text_encoders(), *vision_encoder, "unet", "vae"]

    def _weights_on_device(self, parts: Mapping[str, Part], at_work: str, offload: Offload) -> int:
        """Bytes of weights on the device while a part works."""
        if offload == "none":
            return sum(part.weights for part in parts.values())
        adapters = sum(parts[name].weights for name in ADAPTERS if name in parts)
        if offload == "model":
            return adapters + parts[at_work].weights
        vision_encoder = self.networks.vision_encoder  # it stays, since it is not run through `forward` alone
        staying = parts[vision_encoder].weights if vision_encoder else 0
        return adapters + staying + (0 if at_work == vision_encoder else parts[at_work].largest_layer)

    def _moved(self, parts: Mapping[str, Part], offload: Offload) -> int:
        if offload == "none":
            return 0
        times = self.workload.steps if offload == "sequential" else 1
        return sum(part.weights * (times if name == "unet" else 1) for name, part in parts.items())

    def _bytes(self, module: nn.Module, precision: Precision) -> int:
        return weight_bytes(nn.Module.to(module, DTYPES[precision]))

    def _measured(self, name: str, precision: Precision, tiling: bool) -> tuple[Part, int]:
        """A part measured, and the arithmetic of doing it again."""
        tiling = tiling and name == "vae"
        key = (name, precision, tiling)
        if key not in self._cache:
            module = self.networks.models[name]
            # diffusers decodes in float32 where an autoencoder is known to overflow in fp16.
            upcast = name == "vae" and precision == "fp16" and bool(getattr(module.config, "force_upcast", False))
            for each in self.networks.modules().values():  # diffusers' own `to` would warn of what is meant
                nn.Module.to(each, DTYPES["fp32" if upcast else precision])
            with torch.no_grad(), planned_kernels(), Meter() as meter:
                again = self._run_part(name, tiling, meter)
            largest = max((_own_bytes(layer) for layer in module.modules()), default=0)
            weights = weight_bytes(module)
            self._cache[key] = (Part(self.parameters[name], weights, meter.peak, meter.flops - again, largest), again)
        return self._cache[key]

    def _run_part(self, name: str, tiling: bool, meter: Meter) -> int:
        """Let a part work; returns the arithmetic of a second time, where there is one."""
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
    """Take two steps of one picture; returns the arithmetic of the second, which finds keys and values made.

    Without a meter around it that is not known, and 0.
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
    """Latents a side of pictures of this resolution. Raises ConfigError if it is no multiple of what the base needs."""
    factor = step = compression(vae)
    if hasattr(vae, "spatial_compression_ratio"):  # ours, whose denoiser halves latents evenly; others pad what is odd
        step *= 2 ** (len(unet.config.block_out_channels) - 1)
    if resolution < step or resolution % step:
        lower = max(step, resolution // step * step)
        raise ConfigError(f"A resolution of {resolution} does not fit: take a multiple of {step}, such as {lower}.")
    return resolution // factor


def compression(vae: Any) -> int:
    """How many pixels one latent stands for along a side."""
    ratio = getattr(vae, "spatial_compression_ratio", None)
    return int(ratio or 2 ** (len(vae.config.block_out_channels) - 1))


def _tile(vae: Any, tiling: bool) -> None:
    if not tiling:
        vae.disable_tiling()
        vae.disable_slicing()
        return
    vae.enable_tiling()
    vae.enable_slicing()
    if hasattr(vae, "tile_latent_min_size"):  # AutoencoderKL, whose enable_tiling takes no sizes
        vae.tile_latent_min_size, vae.tile_sample_min_size = TILE, TILE * compression(vae)


def _own_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's own parameters, without its children's."""
    return sum(tensor.numel() * tensor.element_size() for tensor in layer.parameters(recurse=False))
