"""What a step of training the adapters takes, from networks on the meta device.

As our trainer does it, and the paper (*Imagine yourself*, section 3.2): the vision encoder, the vision branch with its
projection, the text branches and LoRA train; the base is frozen. Latents and the text encoders' states were made once
and lie on disk, so neither the autoencoder nor a text encoder is there. What trains is kept in float32, with gradient,
optimiser state and average beside it; what is frozen is kept in the precision that a step computes in.

One step is run as it is, forward and backward; its activations and gradients are what the meter counts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imagine.adapter import Adapter
from imagine.bases import VISION, Blueprint, Networks, build
from imagine.cards import with_reserve
from imagine.errors import ConfigError
from imagine.meter import Meter, planned_kernels
from imagine.plan_inference import DTYPES, SENTENCE, Precision, latent_side, unet_inputs
from imagine.records import Conditioning

VISION_ENCODER = "vision_encoder"
FLOAT = 4  # bytes
_BLOCK = 256  # bitsandbytes keeps one float32 a block of its one-byte states


@dataclass(frozen=True)
class Lesson:
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

    def switches(self, batch: int) -> list[str]:
        """The same as settings of a stage of our trainer, or of any that is built on diffusers and accelerate."""
        lines = [f"batch_size: {batch}", f"precision: {self.precision}"]
        lines += [f"accumulation: {self.accumulation}"] if self.accumulation > 1 else []
        lines += ["unet.enable_gradient_checkpointing()", "vision_encoder.tower.set_grad_checkpointing()"] * (
            self.checkpointing
        )
        lines += [f"optimiser: {self.optimiser}"]
        return lines if self.average else [*lines, "ema: 0"]


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

    def __init__(self, base: Blueprint, lesson: Lesson) -> None:
        self.base, self.lesson = base, lesson
        readers = [name for name in base.components if name.startswith("text_encoder") or name.endswith("t5_encoder")]
        self.side = _side(base, lesson.resolution)
        self.networks = build(base, leave_out=["vae", *readers])
        self.parts = choose_parts(self.networks, lesson.parts)
        self._kept: dict[tuple[Precision, bool, int, bool], tuple[int, int, int]] = {}

    def recipes(self, first: Recipe) -> Iterator[Recipe]:
        """`first`, then ever less hungry ones: recomputation, small optimiser states, smaller pieces, no average."""
        yield first
        first = replace(first, checkpointing=True)
        yield first
        first = replace(first, optimiser="adamw8bit")
        yield first
        pieces = [count for count in range(2, self.lesson.batch + 1) if self.lesson.batch % count == 0]
        for count in pieces:
            yield replace(first, accumulation=count)
        yield replace(first, accumulation=self.lesson.batch, average=False)

    def plan(self, recipe: Recipe) -> TrainingPlan:
        """What a step takes under this recipe."""
        piece = self.lesson.batch // recipe.accumulation
        accumulates = recipe.accumulation > 1
        working, learning, flops = self._measured(recipe.precision, recipe.checkpointing, piece, accumulates)
        modules = self.networks.modules()
        trained = {id(p) for parameters in self.parts.values() for p in parameters}
        bytes_of = {id(p): p.numel() * p.element_size() for m in modules.values() for p in m.parameters()}
        moments = 2 * (1 + FLOAT / _BLOCK) if recipe.optimiser == "adamw8bit" else 2 * FLOAT
        gradients = FLOAT * learning
        memory = {
            "frozen weights": sum(size for key, size in bytes_of.items() if key not in trained),
            "trained weights": sum(size for key, size in bytes_of.items() if key in trained),
            "optimiser": int(moments * learning),
            "average": sum(size for key, size in bytes_of.items() if key in trained) * recipe.average,
            # While backward runs, gradients take the place of activations; the optimiser meets gradients alone.
            "activations and gradients": working + gradients if accumulates else max(working, gradients),
        }
        counts = {name: sum(p.numel() for p in parameters) for name, parameters in self.parts.items()}
        frozen = sum(p.numel() for m in modules.values() for p in m.parameters() if id(p) not in trained)
        return TrainingPlan(recipe, counts, frozen, memory, flops * recipe.accumulation)

    def _measured(
        self, precision: Precision, checkpointing: bool, piece: int, accumulates: bool
    ) -> tuple[int, int, int]:
        """Bytes of one forward and backward, how many numbers got a gradient, and the arithmetic."""
        key = (precision, checkpointing, piece, accumulates)
        if key not in self._kept:
            settle(self.networks, self.parts, DTYPES[precision])
            checkpoint(self.networks, checkpointing)
            parameters = [p for part in self.parts.values() for p in part]
            for parameter in parameters:
                parameter.grad = None
            autocast = None if precision == "fp32" else DTYPES[precision]
            if accumulates:  # the gradients of earlier pieces are there already
                with planned_kernels(autocast):
                    backward(self.networks, 1, self.side)
            with planned_kernels(autocast), Meter() as meter:
                backward(self.networks, piece, self.side)
            learning = sum(p.numel() for p in parameters if p.grad is not None)
            self._kept[key] = (meter.peak, learning, meter.flops)
        return self._kept[key]


def choose_parts(networks: Networks, names: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """The parts of these names, all if there are none. Raises ConfigError, listing them, for a name that is unknown."""
    parts: dict[str, list[nn.Parameter]] = {}
    if networks.eyes:
        parts[VISION_ENCODER] = list(networks.models[networks.eyes].parameters())
    for adapter in networks.adapters.values():
        parts |= adapter.parts()
    if unknown := [name for name in names if name not in parts]:
        raise ConfigError(f"There is no part {unknown[0]!r} to train: choose from {', '.join(parts)}.")
    return {name: parts[name] for name in names or parts}


def settle(networks: Networks, parts: Mapping[str, Sequence[nn.Parameter]], frozen: torch.dtype) -> None:
    """Let these parts train, in float32, and freeze everything else in that precision."""
    trained = {id(p) for parameters in parts.values() for p in parameters}
    for module in networks.modules().values():
        for parameter in module.parameters():
            trains = id(parameter) in trained
            parameter.requires_grad_(trains)
            parameter.data = parameter.data.to(torch.float32 if trains else frozen)
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                module.get_buffer(name).data = buffer.data.to(frozen)


def checkpoint(networks: Networks, on: bool) -> None:
    """Compute activations of the denoiser and of the vision encoder anew in the backward pass, or keep them."""
    unet = networks.unet
    unet.train(on)  # diffusers and transformers recompute only while training; without dropout nothing else changes
    (unet.enable_gradient_checkpointing if on else unet.disable_gradient_checkpointing)()
    if networks.eyes:
        eyes: Any = networks.models[networks.eyes]
        eyes.train(on)
        if hasattr(eyes, "tower"):
            eyes.tower.set_grad_checkpointing(on)
        else:
            (eyes.gradient_checkpointing_enable if on else eyes.gradient_checkpointing_disable)()


def backward(networks: Networks, batch: int, side: int) -> None:
    """One step's forward and backward pass on one reference an image; gradients are left on the parameters."""
    inputs = unet_inputs(networks.unet, batch, (side, side))
    conditioning = Conditioning({
        spec.name: adapter.tokens(spec.name, _features(networks, adapter, spec.name, batch))
        for adapter in networks.adapters.values()
        for spec in adapter.branch_specs
    })  # fmt: skip
    guess = networks.unet(
        **inputs, cross_attention_kwargs={"conditioning": conditioning}, return_dict=False,
    )[0]  # fmt: skip
    loss = nn.functional.mse_loss(guess.float(), torch.randn_like(guess, dtype=torch.float32))
    torch.autograd.backward(loss)


def _features(networks: Networks, adapter: Adapter, branch: str, batch: int) -> Tensor:
    """What a branch reads: what the vision encoder sees, which may train, or cached states of a text encoder."""
    spec = next(spec for spec in adapter.branch_specs if spec.name == branch)
    like = next(networks.unet.parameters())
    if branch != VISION or networks.eyes is None:
        shape = (batch, SENTENCE.get(branch, 1), spec.input_width or spec.width)
        return torch.randn(*shape, device=like.device, dtype=like.dtype)
    eyes: Any = networks.models[networks.eyes]
    side = int(eyes.config.image_size)
    crops = torch.rand(batch, 3, side, side, device=like.device, dtype=like.dtype)
    pooled = spec.projection == "linear"
    if hasattr(eyes, "tower"):
        found: Tensor = eyes.embed(crops) if pooled else eyes(crops)
    else:
        seen = eyes(pixel_values=crops, output_hidden_states=True)
        found = seen.image_embeds if pooled else seen.hidden_states[-2]
    return found if spec.projection is None else found[:, None]


def _side(base: Blueprint, resolution: int) -> int:
    only = replace(base, components={name: base.components[name] for name in ("unet", "vae")}, adapters={})
    built = build(only)
    return latent_side(built.models["vae"], built.unet, resolution)
