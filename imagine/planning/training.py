"""What a step of training the adapters takes, from networks on the meta device.

As our trainer does it, and the paper (*Imagine yourself*, section 3.2): the vision encoder, the vision branch with its
projection, the text branches and LoRA train; the base is frozen. Latents and the text encoders' states were made once
and lie on disk, so neither the autoencoder nor a text encoder is there. What trains is kept in float32, with gradient,
optimiser state and average beside it. The frozen denoiser is kept in the precision that a step computes in; whatever
else is frozen stays in float32, as our trainer leaves it.

One step is run as it is, forward and backward; its activations and gradients are what the meter counts.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imagine.adapter.adapter import Adapter
from imagine.errors import ConfigError
from imagine.planning.bases import VISION, Blueprint, Networks, build
from imagine.planning.cards import with_reserve
from imagine.planning.inference import DTYPES, TEXT_LENGTHS, Precision, latent_side, unet_inputs
from imagine.planning.meter import Meter, planned_kernels
from imagine.records import Conditioning

VISION_ENCODER = "vision_encoder"
FLOAT = 4  # bytes
_BLOCK = 256  # bitsandbytes keeps one float32 a block of its one-byte states
_HALF_LIFE = 1000  # steps, of the average that a plan proposes; how long it is takes no memory


@dataclass(frozen=True)
class TrainingWorkload:
    """What is to be trained: pixels a side, images a step, and the parts; () is all of them."""

    resolution: int
    batch: int = 1
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """The settings of a run that change how much memory it takes."""

    precision: Precision = "bf16"
    checkpointing: bool = False
    optimiser: Literal["adamw", "adamw8bit"] = "adamw"
    accumulation: int = 1
    average: bool = True


@dataclass(frozen=True)
class TrainingPlan:
    """What a step takes under one recipe."""

    recipe: Recipe
    trained: Mapping[str, int]  # part -> numbers that train
    frozen: int  # numbers that do not
    memory: Mapping[str, int]  # bytes by what they hold
    flops: int  # of one optimiser step, recomputation included

    @property
    def peak(self) -> int:
        """Bytes that a device needs."""
        return with_reserve(sum(self.memory.values()))

    def seconds(self, speed: float) -> float:
        """Seconds for a step at so many FLOP a second."""
        return self.flops / speed


class Training:
    """A base's networks without numbers, a step of them measured."""

    def __init__(self, base: Blueprint, workload: TrainingWorkload) -> None:
        self.base, self.workload = base, workload
        text_encoders = [
            name for name in base.components if name.startswith("text_encoder") or name.endswith("t5_encoder")
        ]
        self.networks = build(base, leave_out=["vae", *text_encoders])
        self.side = _side(base, self.networks.unet, workload.resolution)
        # Stock bases are for the task diffusers_adapter, which has settings for them; our own world's task has none.
        self.stock = base.components["vae"].kind == "AutoencoderKL"
        self.parts = choose_parts(self.networks, workload.parts)
        self._cache: dict[tuple[Precision, bool, int, bool], tuple[int, int, int]] = {}

    def recipes(self, first: Recipe, fixed: Collection[str] = ()) -> Iterator[Recipe]:
        """`first`, then ever less hungry ones: recomputation, small optimiser states, smaller pieces, no average.

        What `fixed` names of `first` stays as it is there. A precision that is not kept is bf16.
        """
        now = first if "precision" in fixed else replace(first, precision="bf16")
        yield now
        batch = self.workload.batch
        divisors = [count for count in range(now.accumulation + 1, batch + 1) if batch % count == 0]
        steps: list[tuple[str, Any]] = [("checkpointing", True)] if self.stock else []
        steps += [("optimiser", "adamw8bit"), *(("accumulation", count) for count in divisors), ("average", False)]
        for name, value in steps:
            if name not in fixed and getattr(now, name) != value:
                now = replace(now, **{name: value})
                yield now

    def switches(self, recipe: Recipe) -> list[str]:
        """The same as lines of a stage of our trainer's config; whatever it is not told there it would do otherwise."""
        batch, shape = self.workload.batch, self.base.adapters.get("adapter")
        settings: dict[str, Any] = {}
        if self.stock:
            settings = {"resolution": self.workload.resolution, "base_precision": recipe.precision}
            settings["gradient_checkpointing"] = str(recipe.checkpointing).lower()
        if shape:
            settings["lora_rank"] = shape.lora_rank
        for spec in shape.branches if shape and self.stock else ():
            if spec.projection in ("full", "plus"):  # the trainer's forms
                settings["projection"] = spec.projection
        lines = [f"batch_size: {batch}", f"accumulation: {recipe.accumulation}", f"precision: {recipe.precision}"]
        lines += [f"optimiser: {recipe.optimiser}", f"ema: {_HALF_LIFE * batch if recipe.average else 0}"]
        return [*lines, "settings:", *(f"  {name}: {value}" for name, value in settings.items())]

    def plan(self, recipe: Recipe) -> TrainingPlan:
        """What a step takes under this recipe. Raises ConfigError if the trainer would not follow it."""
        if self.workload.batch % recipe.accumulation:
            raise ConfigError(
                f"A batch of {self.workload.batch} does not divide into {recipe.accumulation} pieces: choose a divisor."
            )
        if recipe.checkpointing and not self.stock:
            raise ConfigError(f"Our trainer recomputes no activations of {self.base.name}: leave --checkpointing out.")
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
            # While backward runs, gradients take the place of activations; the optimiser meets gradients alone.
            "activations and gradients": working + gradients if accumulates else max(working, gradients),
        }
        counts = {name: sum(p.numel() for p in parameters) for name, parameters in self.parts.items()}
        frozen = sum(p.numel() for m in modules.values() for p in m.parameters() if id(p) not in trained)
        return TrainingPlan(recipe, counts, frozen, memory, flops * recipe.accumulation)

    def _measured(
        self, precision: Precision, checkpointing: bool, micro_batch: int, accumulates: bool
    ) -> tuple[int, int, int]:
        """Bytes of one forward and backward, how many numbers got a gradient, and the arithmetic."""
        key = (precision, checkpointing, micro_batch, accumulates)
        if key not in self._cache:
            set_trainable(self.networks, self.parts, DTYPES[precision] if self.stock else torch.float32)
            checkpoint(self.networks, checkpointing)
            with_gradient: dict[int, int] = {}
            hooks = []
            for parameter in {id(p): p for part in self.parts.values() for p in part}.values():
                # The gradients of earlier pieces are there already; one that none will be added to is not counted.
                parameter.grad = torch.zeros_like(parameter) if accumulates else None
                hooks.append(
                    parameter.register_post_accumulate_grad_hook(lambda p: with_gradient.update({id(p): p.numel()}))
                )
            with planned_kernels(None if precision == "fp32" else DTYPES[precision]), Meter() as meter:
                backward(self.networks, micro_batch, self.side)
            for hook in hooks:
                hook.remove()
            self._cache[key] = (meter.peak, sum(with_gradient.values()), meter.flops)
        return self._cache[key]


def choose_parts(networks: Networks, names: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """The parts of these names, all if there are none. Raises ConfigError, listing them, for a name that is unknown."""
    parts: dict[str, list[nn.Parameter]] = {}
    if networks.vision_encoder:
        parts[VISION_ENCODER] = list(networks.models[networks.vision_encoder].parameters())
    for adapter in networks.adapters.values():
        parts |= adapter.parts()
    if unknown := [name for name in names if name not in parts]:
        raise ConfigError(f"There is no part {unknown[0]!r} to train: choose from {', '.join(parts)}.")
    return {name: parts[name] for name in names or parts}


def set_trainable(networks: Networks, parts: Mapping[str, Sequence[nn.Parameter]], frozen: torch.dtype) -> None:
    """Let these parts train, in float32, and freeze everything else: the denoiser in that precision, others in float32.

    That is how our trainer does it: a frozen vision encoder or branch is what it was loaded as.
    """
    trained = {id(p) for parameters in parts.values() for p in parameters}
    for name, module in networks.modules().items():
        dtype = frozen if name == "unet" else torch.float32
        for parameter in module.parameters():
            trains = id(parameter) in trained
            parameter.requires_grad_(trains)
            parameter.data = parameter.data.to(torch.float32 if trains else dtype)
        for key, buffer in module.named_buffers():
            if buffer.is_floating_point():
                module.get_buffer(key).data = buffer.data.to(dtype)


def checkpoint(networks: Networks, on: bool) -> None:
    """Compute activations of the denoiser and of the vision encoder anew in the backward pass, or keep them."""
    unet = networks.unet
    unet.train(on)  # diffusers and transformers recompute only while training; without dropout nothing else changes
    (unet.enable_gradient_checkpointing if on else unet.disable_gradient_checkpointing)()
    if networks.vision_encoder:
        vision_encoder: Any = networks.models[networks.vision_encoder]
        vision_encoder.train(on)
        if hasattr(vision_encoder, "tower"):
            vision_encoder.tower.set_grad_checkpointing(on)
        else:
            (vision_encoder.gradient_checkpointing_enable if on else vision_encoder.gradient_checkpointing_disable)()


def backward(networks: Networks, batch: int, side: int) -> None:
    """One step's forward and backward pass on one reference an image; gradients are left on the parameters."""
    inputs = unet_inputs(networks.unet, batch, (side, side))
    conditioning = Conditioning({
        spec.name: adapter.tokens(spec.name, _features(networks, adapter, spec.name, batch))
        for adapter in networks.adapters.values()
        for spec in adapter.branch_specs
    })  # fmt: skip
    predicted = networks.unet(
        **inputs, cross_attention_kwargs={"conditioning": conditioning}, return_dict=False,
    )[0]  # fmt: skip
    loss = nn.functional.mse_loss(predicted.float(), torch.randn_like(predicted, dtype=torch.float32))
    torch.autograd.backward(loss)


def _features(networks: Networks, adapter: Adapter, branch: str, batch: int) -> Tensor:
    """What a branch reads: what the vision encoder sees, which may train, or cached states of a text encoder."""
    spec = next(spec for spec in adapter.branch_specs if spec.name == branch)
    like = next(networks.unet.parameters())
    if branch != VISION or networks.vision_encoder is None:
        shape = (batch, TEXT_LENGTHS.get(branch, 1), spec.input_width or spec.width)
        return torch.randn(*shape, device=like.device, dtype=like.dtype)
    vision_encoder: Any = networks.models[networks.vision_encoder]
    side = int(vision_encoder.config.image_size)
    crops = torch.rand(batch, 3, side, side, device=like.device, dtype=like.dtype)
    pooled = spec.projection == "linear"
    if hasattr(vision_encoder, "tower"):
        found: Tensor = vision_encoder.embed(crops) if pooled else vision_encoder(crops)
    else:
        seen = vision_encoder(pixel_values=crops, output_hidden_states=True)
        found = seen.image_embeds if pooled else seen.hidden_states[-2]
    return found if spec.projection is None else found[:, None]


def _side(base: Blueprint, unet: Any, resolution: int) -> int:
    vae_only = build(replace(base, components={"vae": base.components["vae"]}, adapters={}))
    return latent_side(vae_only.models["vae"], unet, resolution)
