"""Plan a training step of the adapters with networks on the meta device.

The plan follows our trainer and the paper (*Imagine yourself*, section 3.2): the vision encoder, the vision branch with
its projection, the text branches (of U-Nets) and LoRA train; the base is frozen. Latents and the text encoders' states
are cached on disk, so neither the autoencoder nor a text encoder is in memory. Trained parameters are in float32, with
gradient, optimiser state and weight average. The frozen denoiser has the precision that a step computes in; all other
frozen networks are in float32, as in our trainer.

The plan runs one complete step, forward and backward, and the meter counts its activations and gradients.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imagine.adapter.adapter import Adapter
from imagine.blueprints.blueprint import Blueprint
from imagine.errors import ConfigError
from imagine.planning.cards import Speed, with_reserve
from imagine.planning.denoisers import first_output, step_inputs
from imagine.planning.inference import DTYPES, TEXT_LENGTHS, Precision, latent_side
from imagine.planning.meter import Meter, planned_kernels
from imagine.planning.networks import LORA_PART, VISION, Networks, build, is_text_encoder, lora_parameters
from imagine.records import Conditioning

VISION_ENCODER = "vision_encoder"
FLOAT = 4  # bytes
_BLOCK = 256  # bitsandbytes stores one float32 per block of this many one-byte states
_HALF_LIFE = 1000  # steps; half-life of the weight average in a printed plan, which does not affect memory


@dataclass(frozen=True)
class TrainingWorkload:
    """The size of a training step to plan."""

    resolution: int  # side in pixels
    batch: int = 1  # images per step
    parts: tuple[str, ...] = ()  # the parts to train; () means all
    text: int | None = None  # tokens of the base's own text; None: as many as its pipeline gives


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run that affect its memory."""

    precision: Precision = "bf16"
    checkpointing: bool = False
    optimiser: Literal["adamw", "adamw8bit"] = "adamw"
    accumulation: int = 1
    average: bool = True  # of the trained weights


@dataclass(frozen=True)
class TrainingPlan:
    """The requirements of a step with one recipe."""

    recipe: Recipe
    trained: Mapping[str, int]  # part -> number of trained parameters
    frozen: int  # number of frozen parameters
    memory: Mapping[str, int]  # kind of tensors -> bytes
    flops: int  # of one optimiser step, recomputation included

    @property
    def peak(self) -> int:
        """Return the bytes of memory that a device needs."""
        return with_reserve(sum(self.memory.values()))

    def seconds(self, speed: "float | Speed") -> float:
        """Return the seconds of a step at `speed` FLOP per second."""
        return self.flops / (speed.flops if isinstance(speed, Speed) else speed)


class TrainingPlanner:
    """Plan training steps of a base, whose networks are on the meta device."""

    def __init__(self, base: Blueprint, workload: TrainingWorkload) -> None:
        self.base, self.workload = base, workload
        text_encoders = [name for name in base.components if is_text_encoder(name)]
        self.networks = build(base, leave_out=["vae", *text_encoders])
        self.side = _side(base, self.networks.denoiser, workload.resolution)
        # Only the tasks of public bases have settings for checkpointing and the frozen precision.
        self.stock = base.denoiser_name != "unet" or base.components["vae"].kind == "AutoencoderKL"
        self.parts = choose_parts(self.networks, workload.parts)
        self._cache: dict[tuple[Precision, bool, int, bool], tuple[int, int, int]] = {}

    def recipes(self, first: Recipe, fixed: Collection[str] = ()) -> Iterator[Recipe]:
        """Yield `first`, then recipes with less and less memory.

        The order is recomputation, 8-bit optimiser states, smaller micro-batches, no average. The fields of `first`
        that `fixed` names do not change. The precision, unless fixed, is bf16.
        """
        recipe = first if "precision" in fixed else replace(first, precision="bf16")
        yield recipe
        batch = self.workload.batch
        divisors = [count for count in range(recipe.accumulation + 1, batch + 1) if batch % count == 0]
        steps: list[tuple[str, Any]] = [("checkpointing", True)] if self.stock else []
        steps += [("optimiser", "adamw8bit"), *(("accumulation", count) for count in divisors), ("average", False)]
        for name, value in steps:
            if name not in fixed and getattr(recipe, name) != value:
                recipe = replace(recipe, **{name: value})
                yield recipe

    def switches(self, recipe: Recipe) -> list[str]:
        """Return the recipe as lines of a stage in our trainer's config; the defaults of a stage are different."""
        batch, shape = self.workload.batch, self.base.adapters.get("adapter")
        settings: dict[str, Any] = {}
        if self.stock:
            settings = {"resolution": self.workload.resolution, "base_precision": recipe.precision}
            settings["gradient_checkpointing"] = str(recipe.checkpointing).lower()
        if shape:
            settings["lora_rank"] = shape.lora_rank
        for spec in shape.branches if shape and self.stock else ():
            if spec.projection in ("full", "plus"):  # the projections that the trainer has
                settings["projection"] = spec.projection
        lines = [f"batch_size: {batch}", f"accumulation: {recipe.accumulation}", f"precision: {recipe.precision}"]
        lines += [f"optimiser: {recipe.optimiser}", f"ema: {_HALF_LIFE * batch if recipe.average else 0}"]
        return [*lines, "settings:", *(f"  {name}: {value}" for name, value in settings.items())]

    def plan(self, recipe: Recipe) -> TrainingPlan:
        """Return the requirements of a step with this recipe. Raises ConfigError if our trainer does not support it."""
        if self.workload.batch % recipe.accumulation:
            raise ConfigError(
                f"A batch of {self.workload.batch} cannot be split into {recipe.accumulation} equal micro-batches: "
                "choose a divisor."
            )
        if recipe.checkpointing and not self.stock:
            raise ConfigError(f"Our trainer cannot recompute activations of {self.base.name}: remove --checkpointing.")
        micro_batch = self.workload.batch // recipe.accumulation
        accumulates = recipe.accumulation > 1
        working, trained_count, flops = self._measured(recipe.precision, recipe.checkpointing, micro_batch, accumulates)
        modules = self.networks.modules()
        trained = {id(p) for parameters in self.parts.values() for p in parameters}
        bytes_of = {id(p): p.numel() * p.element_size() for m in modules.values() for p in m.parameters()}
        optimiser_state = 2 * (1 + FLOAT / _BLOCK) if recipe.optimiser == "adamw8bit" else 2 * FLOAT
        gradients = FLOAT * trained_count
        memory = {
            "frozen weights": sum(size for key, size in bytes_of.items() if key not in trained),
            "trained weights": sum(size for key, size in bytes_of.items() if key in trained),
            "optimiser": int(optimiser_state * trained_count),
            "average": sum(size for key, size in bytes_of.items() if key in trained) * recipe.average,
            # During the backward pass gradients replace activations; in the optimiser's step only gradients are left.
            "activations and gradients": working + gradients if accumulates else max(working, gradients),
        }
        counts = {name: sum(p.numel() for p in parameters) for name, parameters in self.parts.items()}
        frozen = sum(p.numel() for m in modules.values() for p in m.parameters() if id(p) not in trained)
        return TrainingPlan(recipe, counts, frozen, memory, flops * recipe.accumulation)

    def _measured(
        self, precision: Precision, checkpointing: bool, micro_batch: int, accumulates: bool
    ) -> tuple[int, int, int]:
        """Return the bytes of a forward and backward pass, the number of values with a gradient, and the arithmetic."""
        key = (precision, checkpointing, micro_batch, accumulates)
        if key not in self._cache:
            set_trainable(self.networks, self.parts, DTYPES[precision] if self.stock else torch.float32)
            checkpoint(self.networks, checkpointing)
            with_gradient: dict[int, int] = {}
            hooks = []
            for parameter in {id(p): p for part in self.parts.values() for p in part}.values():
                # With accumulation, gradients exist from earlier micro-batches; only those that get an update count.
                parameter.grad = torch.zeros_like(parameter) if accumulates else None
                hooks.append(
                    parameter.register_post_accumulate_grad_hook(lambda p: with_gradient.update({id(p): p.numel()}))
                )
            with planned_kernels(None if precision == "fp32" else DTYPES[precision]), Meter() as meter:
                backward(self.networks, micro_batch, self.side, self.workload.text)
            for hook in hooks:
                hook.remove()
            self._cache[key] = (meter.peak, sum(with_gradient.values()), meter.flops)
        return self._cache[key]


def choose_parts(networks: Networks, names: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """Return the named parts, or all parts if `names` is empty. Raises ConfigError for an unknown part."""
    parts: dict[str, list[nn.Parameter]] = {}
    if networks.vision_encoder:
        parts[VISION_ENCODER] = list(networks.models[networks.vision_encoder].parameters())
    for adapter in networks.adapters.values():
        parts |= adapter.parts()
    if networks.denoiser_name != "unet" and (low_rank := lora_parameters(networks.denoiser)):
        parts[LORA_PART] = low_rank
    if unknown := [name for name in names if name not in parts]:
        raise ConfigError(f"There is no part {unknown[0]!r} to train: choose from {', '.join(parts)}.")
    return {name: parts[name] for name in names or parts}


def set_trainable(networks: Networks, parts: Mapping[str, Sequence[nn.Parameter]], frozen: torch.dtype) -> None:
    """Make these parts trainable, in float32, and freeze the rest: the denoiser in `frozen`, other networks in float32.

    This is what our trainer does: a frozen vision encoder or branch keeps the precision that it was loaded in.
    """
    trained = {id(p) for parameters in parts.values() for p in parameters}
    for name, module in networks.modules().items():
        dtype = frozen if name == networks.denoiser_name else torch.float32
        for parameter in module.parameters():
            trains = id(parameter) in trained
            parameter.requires_grad_(trains)
            parameter.data = parameter.data.to(torch.float32 if trains else dtype)
        for key, buffer in module.named_buffers():
            if buffer.is_floating_point():
                module.get_buffer(key).data = buffer.data.to(dtype)


def checkpoint(networks: Networks, on: bool) -> None:
    """Switch gradient checkpointing of the denoiser and of the vision encoder on or off."""
    denoiser = networks.denoiser
    # diffusers and transformers recompute in training mode only; without dropout the mode has no other effect
    denoiser.train(on)
    (denoiser.enable_gradient_checkpointing if on else denoiser.disable_gradient_checkpointing)()
    if networks.vision_encoder:
        vision_encoder: Any = networks.models[networks.vision_encoder]
        vision_encoder.train(on)
        if hasattr(vision_encoder, "tower"):
            vision_encoder.tower.set_grad_checkpointing(on)
        else:
            (vision_encoder.gradient_checkpointing_enable if on else vision_encoder.gradient_checkpointing_disable)()


def backward(networks: Networks, batch: int, side: int, text: int | None = None) -> None:
    """Run the forward and backward pass of a step with one reference per image; the parameters keep the gradients.

    text: tokens of the base's own text; None: as many as its pipeline gives.
    """
    inputs = step_inputs(networks.denoiser, batch, (side, side), text)
    conditioning = Conditioning({
        spec.name: adapter.tokens(spec.name, _features(networks, adapter, spec.name, batch))
        for adapter in networks.adapters.values()
        for spec in adapter.branch_specs
    })  # fmt: skip
    predicted = first_output(networks.denoiser, inputs, conditioning)
    loss = nn.functional.mse_loss(predicted.float(), torch.randn_like(predicted, dtype=torch.float32))
    torch.autograd.backward(loss)


def _features(networks: Networks, adapter: Adapter, branch: str, batch: int) -> Tensor:
    """Return a branch's input: features of the vision encoder, which may train, or cached states of a text encoder."""
    spec = next(spec for spec in adapter.branch_specs if spec.name == branch)
    parameter = next(networks.denoiser.parameters())
    if branch != VISION or networks.vision_encoder is None:
        shape = (batch, TEXT_LENGTHS.get(branch, 1), spec.input_width or spec.width)
        return torch.randn(*shape, device=parameter.device, dtype=parameter.dtype)
    vision_encoder: Any = networks.models[networks.vision_encoder]
    side = int(vision_encoder.config.image_size)
    crops = torch.rand(batch, 3, side, side, device=parameter.device, dtype=parameter.dtype)
    pooled = spec.projection == "linear"
    if hasattr(vision_encoder, "tower"):
        tokens: Tensor = vision_encoder.embed(crops) if pooled else vision_encoder(crops)
    else:
        seen = vision_encoder(pixel_values=crops, output_hidden_states=True)
        tokens = seen.image_embeds if pooled else seen.hidden_states[-2]
    return tokens if spec.projection is None else tokens[:, None]


def _side(base: Blueprint, denoiser: Any, resolution: int) -> int:
    vae_only = build(replace(base, components={"vae": base.components["vae"]}, adapters={}))
    return latent_side(vae_only.models["vae"], denoiser, resolution)
