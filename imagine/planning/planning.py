"""`imagine plan`: estimate what inference or training needs, before a download and before a card runs out of memory.

    bases       the networks of a base
    inference   a call, part by part
    training    a step, forward and backward
    meter       counts bytes and arithmetic
    cards       speeds and sizes of devices

A plan is a dict of plain numbers and words, which `imagine.cli.plan` prints. `check` measures small networks on this
machine's CPU and compares them with the plans of the same networks without numbers.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from imagine.adapter.adapter import BranchSpec
from imagine.errors import ConfigError
from imagine.planning.bases import AdapterShape, Blueprint, Component, Networks, build
from imagine.planning.cards import GIB, Speed
from imagine.planning.inference import (
    DrawingOptions,
    DrawingPlan,
    DrawingPlanner,
    DrawingWorkload,
    compression,
    decode,
    step_twice,
)
from imagine.planning.meter import Meter, parameter_count, planned_kernels, profiled_peak
from imagine.planning.training import (
    Recipe,
    TrainingPlan,
    TrainingPlanner,
    TrainingWorkload,
    backward,
    checkpoint,
    choose_parts,
    set_trainable,
)

Plan = TypeVar("Plan", DrawingPlan, TrainingPlan)
TOLERANCE = 0.15  # the largest relative difference between planned and measured memory


def plan_drawing(
    base: Blueprint,
    workload: DrawingWorkload,
    options: DrawingOptions,
    limit: int | None,
    speeds: Mapping[str, Speed],
    fixed: Collection[str] = (),
) -> dict[str, Any]:
    """Return the plan of a call with these switches, or under a `limit` in bytes with the fastest ones that fit.

    The fields of `options` that `fixed` names ("precision", "offload", "tiling") do not change under a limit. Raises
    ConfigError, with the smallest memory that would fit, if no switches fit.
    """
    drawing = DrawingPlanner(base, workload)
    if limit is None:
        plan = drawing.plan(options)
    else:
        plan = fitting(map(drawing.plan, drawing.combinations(options, fixed)), limit, _describe(base, workload), fixed)
    vae = drawing.networks.models["vae"]
    return {
        "base": base.name, "resolution": workload.resolution, "batch": workload.batch, "steps": workload.steps,
        "references": workload.references, "guided": workload.guided, "precision": plan.options.precision,
        "offload": plan.options.offload, "tiling": plan.options.tiling,
        "parts": {
            name: {
                "parameters": part.parameters, "weights": part.weights, "working": part.working, "flops": part.flops,
                **({"at_once": plan.at_once[name]} if name in plan.at_once else {}),
            }
            for name, part in plan.parts.items()
        },
        "parameters": sum(part.parameters for part in plan.parts.values()),
        "flops_step": plan.flops_step, "flops": plan.flops,
        "peak": plan.peak, "busiest": plan.busiest, "limit": limit,
        "seconds": {name: plan.seconds(speed.flops) for name, speed in speeds.items()},
        "speeds": {name: speed.how for name, speed in speeds.items()},
        "switches": plan.options.switches(vae, workload.batch),
    }  # fmt: skip


def plan_training(
    base: Blueprint,
    workload: TrainingWorkload,
    recipe: Recipe,
    limit: int | None,
    speeds: Mapping[str, Speed],
    fixed: Collection[str] = (),
) -> dict[str, Any]:
    """Return the plan of a training step with this recipe, or under a `limit` in bytes with the fastest one that fits.

    The fields of `recipe` that `fixed` names do not change under a limit. Raises ConfigError, with the smallest memory
    that would fit, if no recipe fits.
    """
    training = TrainingPlanner(base, workload)
    if limit is None:
        plan = training.plan(recipe)
    else:
        what = f"Training {_describe(base, workload)}"
        plan = fitting(map(training.plan, training.recipes(recipe, fixed)), limit, what, fixed)
    return {
        "base": base.name, "resolution": workload.resolution, "batch": workload.batch, "trained": dict(plan.trained),
        "frozen": plan.frozen, "precision": plan.recipe.precision, "checkpointing": plan.recipe.checkpointing,
        "optimiser": plan.recipe.optimiser, "accumulation": plan.recipe.accumulation, "average": plan.recipe.average,
        "memory": dict(plan.memory), "peak": plan.peak, "limit": limit, "flops_step": plan.flops,
        "seconds": {name: plan.seconds(speed.flops) for name, speed in speeds.items()},
        "speeds": {name: speed.how for name, speed in speeds.items()},
        "switches": training.switches(plan.recipe),
    }  # fmt: skip


def fitting(plans: Iterable[Plan], limit: int, what: str, fixed: Collection[str] = ()) -> Plan:
    """Return the first plan that needs at most `limit` bytes. Raises ConfigError, with the smallest need, if none does.

    `what` and `fixed` (the switches that were given) are for the error sentence only.
    """
    tried: list[Plan] = []
    for plan in plans:
        if plan.peak <= limit:
            return plan
        tried.append(plan)
    least = min(tried, key=lambda plan: plan.peak)
    most = least.busiest if isinstance(least, DrawingPlan) else max(least.memory, key=lambda name: least.memory[name])
    raise ConfigError(
        f"{what} does not fit into {_gib(limit)}: with every switch{_except(fixed)} it still needs {_gib(least.peak)}, "
        f"most of it for {most.replace('_', ' ')}; use a card with {_card(least.peak)} GB, a lower resolution or a "
        + ("smaller batch." if isinstance(least, DrawingPlan) else "smaller batch, or train fewer parts.")
    )


def _except(fixed: Collection[str]) -> str:
    return f" except the given {' and '.join(sorted(fixed))}" if fixed else ""


def _describe(base: Blueprint, workload: DrawingWorkload | TrainingWorkload) -> str:
    return f"{base.name} at {workload.resolution} px in batches of {workload.batch}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _card(size: int) -> int:
    """Return the size of the smallest common card that holds `size` bytes, in GB."""
    return next(
        (gigabytes for gigabytes in (4, 6, 8, 12, 16, 24, 32, 48, 80, 96, 141, 192) if gigabytes * GIB >= size), 288
    )


# --- the check --------------------------------------------------------------------------------------------------------


def small_base() -> Blueprint:
    """Return a base like SDXL with two levels and our branches, small enough to be measured in a second or two."""
    unet = {
        "sample_size": 32, "block_out_channels": [64, 128], "layers_per_block": 1, "attention_head_dim": [2, 4],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "cross_attention_dim": 64,
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 2],
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 128,
    }  # fmt: skip
    vae = {
        "block_out_channels": [32, 64, 64], "down_block_types": ["DownEncoderBlock2D"] * 3, "layers_per_block": 1,
        "up_block_types": ["UpDecoderBlock2D"] * 3, "latent_channels": 4, "sample_size": 128,
    }  # fmt: skip
    vision_encoder = {"image_size": 64, "patch_size": 8, "width": 64, "layers": 3, "heads": 2, "embed_width": 32}
    text = AdapterShape((BranchSpec("t5", 48), BranchSpec("byt5", 32)))
    vision = BranchSpec("vision", 64, projection="full", input_width=64)
    return Blueprint(
        "a small base",
        {
            "unet": Component("UNet2DConditionModel", unet),
            "vae": Component("AutoencoderKL", vae),
            "vision_encoder": Component("VisionEncoder", vision_encoder),
        },
        {"text_adapter": text, "adapter": AdapterShape((vision,), lora_rank=4)},
    )


def check(batch: int = 2, resolution: int = 128) -> dict[str, Any]:
    """Compare plans of small networks with the same networks that run on this machine's CPU, in float32.

    Parameters and arithmetic (by torch's FlopCounterMode on real tensors) must be equal. The memory of steps, decoding
    and training (by the events of the allocator) must agree within `TOLERANCE`. Raises RuntimeError if they do not,
    because that is a bug of the planner.
    """
    base = small_base()
    planned, real = build(base), build(base, "cpu")
    counts = [sum(map(parameter_count, each.modules().values())) for each in (planned, real)]
    rows = {"parameters": _row(*counts)}
    _check_rows(rows)
    side = resolution // compression(real.models["vae"])
    for name, work in _checks(batch, side).items():
        compared = {f"{name}, {key}": row for key, row in _compare(name, work, planned, real).items()}
        _check_rows(compared)
        rows |= compared
    return {"tolerance": TOLERANCE, "rows": rows}


def _row(planned: int, measured: int) -> dict[str, Any]:
    return {"planned": planned, "measured": measured, "off": abs(planned - measured) / max(measured, 1)}


def _check_rows(rows: Mapping[str, Mapping[str, Any]]) -> None:
    for name, row in rows.items():
        if row["off"] > (TOLERANCE if name.endswith("memory") else 0):
            raise RuntimeError(f"{name}: planned {row['planned']}, measured {row['measured']}")


Work = Callable[[Networks], Any]


def _checks(batch: int, side: int) -> dict[str, Work]:
    sides = (side, side)

    @torch.no_grad()
    def steps(networks: Networks) -> None:
        step_twice(networks, batch, sides, 1)

    @torch.no_grad()
    def decoding(networks: Networks) -> None:
        decode(networks.models["vae"], batch, sides)

    def training(networks: Networks) -> None:
        backward(networks, batch, side)

    return {"drawing": steps, "decoding": decoding, "training": training, "training, recomputed": training}


def _compare(name: str, work: Work, planned: Networks, real: Networks) -> dict[str, dict[str, Any]]:
    """Return the planned and the measured arithmetic and memory of one kind of work."""
    for networks in (planned, real):
        if name.startswith("training"):
            set_trainable(networks, choose_parts(networks, ()), torch.float32)
            checkpoint(networks, name.endswith("recomputed"))
    with planned_kernels(), Meter() as meter:
        work(planned)
    with FlopCounterMode(display=False) as counter:
        work(real)
    _clear_gradients(planned, real)
    peak = profiled_peak(lambda: work(real))
    _clear_gradients(real)
    return {"FLOP": _row(meter.flops, int(counter.get_total_flops())), "memory": _row(meter.peak, peak)}


def _clear_gradients(*networks: Networks) -> None:
    for each in networks:
        for module in each.modules().values():
            for parameter in module.parameters():
                parameter.grad = None
