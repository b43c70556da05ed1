"""Plan inference with networks on the meta device: parameters, arithmetic and memory of every part of a call.

    text encoders     each of them, for sentences and negative sentences
    vision encoder    for all references
    denoiser steps    with the adapters; the first step also computes the keys and values that the other steps reuse
    autoencoder       decoding

The parts run one after another, so memory depends on the weights that are on the device beside the running part: all
weights; its own and the adapters'; or (sequential and group) those of one layer. `DrawingPlanner.plan` measures each
part once and caches the result. `choosing` compares the possible switches.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imagine.adapter.adapter import Adapter, BranchSpec
from imagine.adapter.adapter import prepare as prepare_unet
from imagine.bases.quantising import OFFLOADS_WITH, QUANTISATIONS, is_quantised
from imagine.bases.tiling import compression, decode_in_tiles
from imagine.blueprints.blueprint import Blueprint
from imagine.errors import ConfigError
from imagine.networks.weights import ADAPTERS
from imagine.planning.cards import BUS_BANDWIDTH, USUAL_BANDWIDTH, Speed, with_reserve
from imagine.planning.denoisers import REFERENCE_SIDE, first_output, kind_of, step_inputs
from imagine.planning.meter import Meter, parameter_count, planned_kernels, weight_bytes
from imagine.planning.networks import BYT5, T5, VISION, Networks, build
from imagine.planning.storage import INT8_SLOWDOWN, Stored, stored
from imagine.records import Conditioning, Tokens
from imagine.transformer_bases.adapter import prepare as prepare_transformer

Offload = Literal["none", "model", "sequential", "group"]
OFFLOADS: tuple[Offload, ...] = ("none", "model", "sequential")  # fastest first; group costs what sequential does
LAYERWISE = ("sequential", "group")  # offloading that keeps one layer on the device
Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEXT_LENGTHS = {T5: 128, BYT5: 32}  # planned tokens for the encoders of our text branches
Sides = tuple[int, int]


@dataclass(frozen=True)
class DrawingWorkload:
    """The size of a call to plan."""

    resolution: int  # side in pixels
    batch: int = 1  # pictures in all
    steps: int = 30
    references: int = 1  # per person
    guided: bool = True  # classifier-free guidance
    people: int = 1  # per picture
    native: int = 0  # native reference images per picture, beside the adapter


@dataclass(frozen=True)
class DrawingOptions:
    """The switches of a call that affect its memory. at_once: pictures drawn at a time; None means all."""

    precision: Precision = "bf16"
    offload: Offload = "none"
    tiling: bool = False
    quantise: str = "none"
    at_once: int | None = None


@dataclass(frozen=True)
class Part:
    """The measurements of one part of a call."""

    parameters: int  # number of parameters
    weights: int  # bytes of weights, as they are stored
    working: int  # peak bytes of other tensors while it runs
    flops: int
    largest_layer: int  # bytes of weights
    traffic: float = 0.0  # bytes that are moved in each pass to unpack stored weights


@dataclass(frozen=True)
class DrawingPlan:
    """The requirements of a call with one choice of switches."""

    options: DrawingOptions
    parts: Mapping[str, Part]
    flops_step: int  # of the second and every later step
    flops: int  # of the whole call
    at_once: Mapping[str, int]  # bytes of all tensors on the device while each part runs
    moved: int  # bytes of weights that are copied to the device during the call
    traffic: float = 0.0  # bytes within the device's memory, to unpack weights
    slowdown: float = 1.0  # of arithmetic, because of the storage of weights

    @property
    def busiest(self) -> str:
        """Return the part with the most memory."""
        return max(self.at_once, key=lambda name: self.at_once[name])

    @property
    def peak(self) -> int:
        """Return the bytes of memory that a device needs."""
        return with_reserve(self.at_once[self.busiest])

    def seconds(self, speed: "float | Speed") -> float:
        """Return the seconds of the call at `speed` (FLOP per second); copies of weights do not overlap with it."""
        known = isinstance(speed, Speed)
        flops, bandwidth = (speed.flops, speed.bandwidth) if known else (speed, USUAL_BANDWIDTH)  # type: ignore[union-attr]
        return self.flops * self.slowdown / flops + self.moved / BUS_BANDWIDTH + self.traffic / bandwidth  # type: ignore[operator]


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


def build_conditioning(
    networks: Networks, rows: int, references: int, vision_tokens: int, people: int = 1
) -> Conditioning:
    """Return the conditioning that the denoiser attends to beside its own text: one sequence per adapter branch.

    Several people stand side by side, each with the same number of references.
    """
    branches = {
        spec.name: branch_tokens(adapter, spec, rows, references * people, vision_tokens)
        for adapter in networks.adapters.values()
        for spec in adapter.branch_specs
    }
    if people == 1 or VISION not in branches:
        return Conditioning(branches)
    device = branches[VISION].values.device
    groups = torch.ones(rows, people, dtype=torch.bool, device=device)
    return Conditioning(branches, groups={VISION: groups}, regions={VISION: _columns(people).to(device)})


def _columns(people: int) -> Tensor:
    """Return regions (1, people, height, width): equal columns from left to right."""
    regions = torch.zeros(1, people, 64, 64)
    for number, columns in enumerate(torch.arange(64).chunk(people)):
        regions[:, number, :, columns] = 1
    return regions


def prepare(networks: Networks, conditioning: Conditioning) -> Conditioning:
    """Prepare a conditioning for the many steps of one picture."""
    made = prepare_unet if networks.denoiser_name == "unet" else prepare_transformer
    return made(networks.denoiser, conditioning)


def vision_token_count(vision_encoder: Any) -> int:
    """Return the number of tokens that the vision encoder makes from one reference."""
    return 1 + (int(vision_encoder.config.image_size) // int(vision_encoder.config.patch_size)) ** 2


def text_length(networks: Networks, name: str) -> int:
    """Return the planned number of tokens of a text encoder."""
    encoder: Any = networks.models[name]
    if type(encoder).__name__.startswith("CLIP"):
        return int(encoder.config.max_position_embeddings)
    if networks.denoiser_name == "unet":
        return TEXT_LENGTHS[BYT5 if name in ("byt5_encoder", "text_encoder_3") else T5]
    return kind_of(type(networks.denoiser).__name__).encoded


def encode_text(encoder: Any, rows: int, length: int) -> Any:
    """Run a text encoder on `rows` sentences of `length` tokens."""
    ids = torch.zeros(rows, length, dtype=torch.long, device=next(encoder.parameters()).device)
    if type(encoder).__name__.startswith(("CLIP", "T5")):
        return encoder(input_ids=ids)
    # The mask that transformers makes of a padded sentence; given as such, its values are not looked at.
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device=ids.device)
    return encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)


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


def decode(vae: Any, batch: int, sides: Sides) -> Tensor:
    """Run the decoder of an autoencoder on latents with `sides` (height, width)."""
    parameter = next(vae.parameters())
    is_video = not hasattr(vae.config, "latent_channels")  # Qwen-Image's autoencoder sees a picture as a short film
    shape = (int(vae.config.z_dim), 1) if is_video else (int(vae.config.latent_channels),)
    latents = torch.zeros(batch, *shape, *sides, device=parameter.device, dtype=parameter.dtype)
    pictures: Tensor = vae.decode(latents)[0]
    return pictures


class DrawingPlanner:
    """Plan calls of a base, whose networks are on the meta device; each part is measured once and cached."""

    def __init__(self, base: Blueprint, workload: DrawingWorkload) -> None:
        self.base, self.workload = base, workload
        self.networks = build(base)
        self.kind = kind_of(base.denoiser.kind)
        if workload.native and not self.kind.native:
            raise ConfigError(f"{base.name} takes no native reference images: leave out --native.")
        self.side = latent_side(self.networks.models["vae"], self.networks.denoiser, workload.resolution)
        self._cache: dict[Any, tuple[Part, int]] = {}

    @property
    def passes(self) -> int:
        """Return how often the denoiser runs in a step."""
        return 2 if self.workload.guided and self.kind.two_passes else 1

    def rows(self, at_once: int) -> int:
        """Return the batch size of the denoiser: most bases predict guided pictures with and without their sentence."""
        return at_once * (2 if self.workload.guided and not self.kind.two_passes else 1)

    @cached_property
    def parameters(self) -> dict[str, int]:
        return {name: parameter_count(module) for name, module in self.networks.modules().items()}

    def combinations(
        self, first: DrawingOptions, fixed: Collection[str] = (), at_once: int | None = None
    ) -> Iterator[DrawingOptions]:
        """Yield every choice of switches that works; those that change the picture least come first.

        The fields of `first` that `fixed` names do not change. Precision, unless fixed, is bf16: fp16 needs as much.
        at_once: pictures drawn at a time; None means all.
        """
        precision = first.precision if "precision" in fixed else "bf16"
        for quantise in (first.quantise,) if "quantise" in fixed else QUANTISATIONS:
            # group offloading costs what sequential does, and is left where that cannot be had
            usual = tuple(each for each in OFFLOADS if each in OFFLOADS_WITH[quantise])
            offloads = (*usual, "group") if quantise == "fp8" else usual
            for offload in (first.offload,) if "offload" in fixed else offloads:
                if offload not in OFFLOADS_WITH[quantise]:
                    continue
                for tiling in (first.tiling,) if "tiling" in fixed else (False, True):
                    yield DrawingOptions(precision, offload, tiling, quantise, at_once)

    def plan(self, options: DrawingOptions) -> DrawingPlan:
        """Return the requirements of a call with these switches."""
        denoiser, size = self.networks.denoiser_name, options.at_once or self.workload.batch
        calls = -(-self.workload.batch // size)
        parts: dict[str, Part] = {}
        second_step_flops = 0
        for name in self._part_names():
            parts[name], flops = self._measured(name, options, size)
            second_step_flops = flops if name == denoiser else second_step_flops
        for name, module in self.networks.adapters.items():
            weights = self._bytes(module, options.precision)
            parts[name] = Part(self.parameters[name], weights, 0, 0, 0)
        repeats = self.workload.steps - 1
        total = sum(part.flops for part in parts.values()) + repeats * second_step_flops
        at_once = {
            name: self._weights_on_device(parts, name, options.offload) + parts[name].working
            for name in self._part_names()
        }
        times = {name: self.workload.steps * self.passes if name == denoiser else 1 for name in parts}
        traffic = calls * sum(part.traffic * times[name] for name, part in parts.items())
        slowdown = INT8_SLOWDOWN if options.quantise == "int8" else 1.0
        moved = calls * self._moved(parts, options.offload, times)
        return DrawingPlan(
            options, parts, second_step_flops, calls * total, at_once, moved, traffic, slowdown,
        )  # fmt: skip

    def _part_names(self) -> list[str]:
        """Return the parts that run one after another."""
        vision_encoder = [self.networks.vision_encoder] if self.networks.vision_encoder else []
        return [*self.networks.text_encoders(), *vision_encoder, self.networks.denoiser_name, "vae"]

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

    def _moved(self, parts: Mapping[str, Part], offload: Offload, times: Mapping[str, int]) -> int:
        if offload == "none":
            return 0
        return sum(part.weights * (times[name] if offload in LAYERWISE else 1) for name, part in parts.items())

    def _bytes(self, module: nn.Module, precision: Precision) -> int:
        return weight_bytes(nn.Module.to(module, DTYPES[precision]))

    def _measured(self, name: str, options: DrawingOptions, size: int) -> tuple[Part, int]:
        """Measure a part; return it and the arithmetic of a repeated run (0 where nothing is repeated)."""
        module: Any = self.networks.models[name]
        quantise = options.quantise if is_quantised(name, type(module).__name__) else "none"
        key = (name, options.precision, options.tiling and name == "vae", quantise, size)
        if key not in self._cache:
            plain, repeated = self._run_measured(name, options, size)
            if quantise != "none":
                kept = stored(module, quantise, self._tokens(name, size))
                plain = replace(
                    plain, weights=kept.bytes, working=plain.working + kept.unpacked, largest_layer=kept.largest,
                    traffic=kept.traffic,
                )  # fmt: skip
            self._cache[key] = (plain, repeated)
        return self._cache[key]

    def _run_measured(self, name: str, options: DrawingOptions, size: int) -> tuple[Part, int]:
        key = (name, options.precision, options.tiling and name == "vae", "none", size)
        if key in self._cache:
            self._cast(name, options.precision)
            return self._cache[key]
        self._cast(name, options.precision)
        module = self.networks.models[name]
        with torch.no_grad(), planned_kernels(), Meter() as meter:
            repeated = self._run_part(name, options.tiling and name == "vae", size, meter)
        held: Stored = stored(module, "none")
        flops = meter.flops - repeated
        if name in self.networks.text_encoders():
            flops *= self.passes
        self._cache[key] = Part(self.parameters[name], held.bytes, meter.peak, flops, held.largest), repeated
        return self._cache[key]

    def _cast(self, name: str, precision: Precision) -> None:
        """Give all networks the precision in which they compute while part `name` runs."""
        module: Any = self.networks.models[name]
        # diffusers decodes in float32 if the autoencoder overflows in fp16 (force_upcast).
        upcast = name == "vae" and precision == "fp16" and bool(getattr(module.config, "force_upcast", False))
        for other_module in self.networks.modules().values():  # diffusers' own `to` would print a warning
            nn.Module.to(other_module, DTYPES["fp32" if upcast else precision])

    def _tokens(self, name: str, size: int) -> int:
        """Return the number of tokens, of all rows, in a part's largest products."""
        if name != self.networks.denoiser_name:
            return self.rows(size) * text_length(self.networks, name)
        latents = self.side**2 + self.workload.native * (REFERENCE_SIDE // self._factor) ** 2
        return self.rows(size) * (latents // self.kind.patch**2 + self.kind.text)

    @property
    def _factor(self) -> int:
        return compression(self.networks.models["vae"])

    def native_sides(self) -> list[Sides]:
        """Return the sizes of the native references in latents: the largest that the pipelines leave them."""
        side = REFERENCE_SIDE // self._factor
        return [(side, side)] * self.workload.native

    def _run_part(self, name: str, tiling: bool, size: int, meter: Meter) -> int:
        """Run a part; return the arithmetic of its second run if it has one, else 0."""
        networks, workload = self.networks, self.workload
        module = networks.models[name]
        if name == networks.denoiser_name:
            return step_twice(
                networks, self.rows(size), (self.side, self.side), workload.references, meter, workload.people,
                self.native_sides(), self.passes,
            )  # fmt: skip
        if name == "vae":
            _tile(module, tiling)
            decode(module, size, (self.side, self.side))
        elif name == networks.vision_encoder:
            encode_crops(module, workload.references * workload.people * size)
        else:
            encode_text(module, self.rows(size), text_length(networks, name))
        return 0


def step_twice(
    networks: Networks, rows: int, sides: Sides, references: int, meter: Meter | None = None, people: int = 1,
    native: Collection[Sides] = (), passes: int = 1,
) -> int:  # fmt: skip
    """Run two steps; return the arithmetic of the second, which reuses the keys and values of the first.

    passes: how often the denoiser runs in a step; only the first shows the person. Return 0 without a meter.
    """
    vision_tokens = vision_token_count(networks.models[networks.vision_encoder]) if networks.vision_encoder else 0
    inputs = step_inputs(networks.denoiser, rows, sides, native=list(native))
    conditioning = prepare(networks, build_conditioning(networks, rows, references, vision_tokens, people))
    shown = conditioning if conditioning.branches else None
    for _ in range(passes - 1):  # without the person; the same in both steps
        first_output(networks.denoiser, inputs)
    bare = meter.flops if meter else 0
    first_output(networks.denoiser, inputs, shown)
    before = meter.flops if meter else 0
    first_output(networks.denoiser, inputs, shown)
    if meter is None:
        return 0
    started = meter.flops - before + bare
    meter.flops += bare
    return started


def latent_side(vae: Any, denoiser: Any, resolution: int) -> int:
    """Return the side of the latents for this resolution. Raises ConfigError if the base cannot draw it."""
    factor = step = compression(vae)
    if type(denoiser).__name__ != "UNet2DConditionModel":
        step *= kind_of(type(denoiser).__name__).patch
    elif hasattr(vae, "spatial_compression_ratio"):  # our denoiser needs even latents at every level; others pad
        step *= 2 ** (len(denoiser.config.block_out_channels) - 1)
    if resolution < step or resolution % step:
        lower = max(step, resolution // step * step)
        raise ConfigError(
            f"A resolution of {resolution} does not fit the base: choose a multiple of {step}, such as {lower}."
        )
    return resolution // factor


def default_resolution(base: Blueprint) -> int:
    """Return the default side of a base's pictures, in pixels."""
    if base.denoiser_name != "unet":
        vae = build(replace(base, components={"vae": base.components["vae"]}, adapters={})).models["vae"]
        sample = base.denoiser.config.get("sample_size")
        return int(sample) * compression(vae) if sample else 1024
    latents = int(base.denoiser.config.get("sample_size") or 64)
    config = base.components["vae"].config
    halvings = len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1
    return latents * 2**halvings


def _tile(vae: Any, tiling: bool) -> None:
    if not tiling:
        vae.disable_tiling()
        vae.disable_slicing()
        return
    decode_in_tiles(vae)
