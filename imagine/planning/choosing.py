"""Choose the switches of a call that fit into a memory, and write them as a command and as Python.

Of the choices that fit, the fastest by the estimate wins. Choices within 10 % of it count as equally fast, and of these
the one wins that changes the picture least: whole weights before int8, fp8 and nf4, no tiles before tiles.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from imagine.bases.quantising import BITSANDBYTES, QUANTISATIONS
from imagine.bases.tiling import TILE, compression
from imagine.blueprints.blueprint import PORTRAIT, Blueprint
from imagine.errors import ConfigError
from imagine.pipeline.families import class_names
from imagine.planning.cards import GIB, Speed
from imagine.planning.inference import DTYPES, DrawingOptions, DrawingPlan, DrawingPlanner

EQUAL = 1.1  # times this factor count as equal
USUAL_SPEED = "rtx3090"  # ranks choices where no device is given
_ATTENTION_SLICING = (
    "Attention slicing is not among the choices: attention is fused, so it would save nothing, and it would take the "
    "adapter off."
)


@dataclass(frozen=True)
class Choice:
    """One combination of switches: its plan, how much slower it is than no switch at all, and what became of it."""

    plan: DrawingPlan
    slower: float
    verdict: str


@dataclass(frozen=True)
class Chosen:
    """The plan that was chosen, the choices that were compared with it, and remarks."""

    plan: DrawingPlan
    choices: tuple[Choice, ...]
    remarks: tuple[str, ...]


def choose(
    planner: DrawingPlanner, first: DrawingOptions, limit: int, speed: Speed, what: str, fixed: Collection[str] = ()
) -> Chosen:
    """Return the plan that fits into `limit` bytes with the least slowdown.

    The fields of `first` that `fixed` names do not change. what: the call, for the error sentence. Raises ConfigError,
    with the smallest memory that would fit, if nothing fits.
    """
    plans: list[DrawingPlan] = []
    fitting: list[DrawingPlan] = []
    for at_once in _batches(planner.workload.batch):
        plans += [planner.plan(options) for options in planner.combinations(first, fixed, at_once)]
        fitting = [plan for plan in plans if plan.peak <= limit]
        if fitting:
            break
    if not fitting:
        raise does_not_fit(plans, limit, what, fixed)
    best = min(plan.seconds(speed) for plan in fitting)
    chosen = next(plan for plan in sorted(fitting, key=_change) if plan.seconds(speed) <= best * EQUAL)
    plain = min(plan.seconds(speed) for plan in plans)
    rows = [
        Choice(plan, plan.seconds(speed) / plain, _verdict(plan, chosen, limit, speed)) for plan in _shown(plans, limit)
    ]
    if not any(row.plan is chosen for row in rows):
        rows.append(Choice(chosen, chosen.seconds(speed) / plain, "chosen"))
    return Chosen(chosen, tuple(sorted(rows, key=lambda row: row.slower)), (_ATTENTION_SLICING,))


def _batches(pictures: int) -> list[int | None]:
    """Return how many pictures to draw at a time: all, and fewer for when that does not fit."""
    return [None, *(size for size in (4, 2, 1) if size < pictures)]


def does_not_fit(
    plans: Sequence[Any], limit: int, what: str, fixed: Collection[str] = (), training: bool = False
) -> ConfigError:
    """Return the error for plans that all need more than `limit` bytes: what is missing, and what to do."""
    least = min(plans, key=lambda plan: plan.peak)
    most = least.busiest if isinstance(least, DrawingPlan) else max(least.memory, key=lambda name: least.memory[name])
    given = f" except the given {' and '.join(sorted(fixed))}" if fixed else ""
    return ConfigError(
        f"{what} does not fit into {_gib(limit)}: with every switch{given} it still needs {_gib(least.peak)}, so "
        f"{_gib(least.peak - limit)} are missing, most of it for {most.replace('_', ' ')}; use a card with "
        f"{_card(least.peak)} GB, a lower resolution or a "
        + ("smaller batch, or train fewer parts." if training else "smaller batch.")
    )


def _change(plan: DrawingPlan) -> tuple[int, bool, int]:
    """Return what orders plans by how much they change the picture, and then by pictures at a time."""
    options = plan.options
    return QUANTISATIONS.index(options.quantise), options.tiling, -(options.at_once or 10**6)


def _shown(plans: Sequence[DrawingPlan], limit: int) -> list[DrawingPlan]:
    """Return one plan per storage and offloading: the first that fits, or else the smallest."""
    groups: dict[tuple[str, str], list[DrawingPlan]] = {}
    for plan in plans:
        groups.setdefault((plan.options.quantise, plan.options.offload), []).append(plan)
    return [
        next((plan for plan in group if plan.peak <= limit), min(group, key=lambda plan: plan.peak))
        for group in groups.values()
    ]


def _verdict(plan: DrawingPlan, chosen: DrawingPlan, limit: int, speed: Speed) -> str:
    if plan is chosen:
        return "chosen"
    if plan.peak > limit:
        return "too large"
    if plan.seconds(speed) <= chosen.seconds(speed) * EQUAL:
        return "no faster, and changes more" if _change(plan) > _change(chosen) else "no faster"
    return "slower"


# --- how the switches are written -------------------------------------------------------------------------------------
def shows_people_from_files(base: Blueprint) -> bool:
    """Return whether `imagine generate --base` draws with the planned networks, which takes no text adapters."""
    return base.name != PORTRAIT and "text_adapter" not in base.adapters and base.pipeline in class_names()


def command(base: Blueprint, options: DrawingOptions, pictures: int, steps: int) -> str | None:
    """Return the command line that draws so; None if there is none (`shows_people_from_files`)."""
    if not shows_people_from_files(base):
        return None
    words = [f"imagine generate --base {base.name} --adapter ADAPTER --dtype {_dtype(options)}"]
    words += [f"--quantise {options.quantise}"] if options.quantise != "none" else []
    words += [f"--offload {options.offload}"] if options.offload != "none" else []
    words += ["--tiling"] if options.tiling else []
    words += [f"--num-images {pictures} --batch {options.at_once or pictures}"] if pictures > 1 else []
    return " ".join([*words, f"--steps {steps} --reference PHOTO --prompt TEXT --output FILE.png"])


def python_lines(base: Blueprint, options: DrawingOptions, vae: Any) -> list[str]:
    """Return the switches as lines of Python, for the base with this autoencoder."""
    if shows_people_from_files(base):
        given = [f'"{base.name}"', 'adapter="ADAPTER"', f'dtype="{_dtype(options)}"']
        given += [f'quantise="{options.quantise}"'] if options.quantise != "none" else []
        given += [f'offload="{options.offload}"'] if options.offload != "none" else []
        given += ["tiling=True"] if options.tiling else []
        return [f"pipe = open_base({', '.join(given)})"]
    if base.denoiser_name != "unet":
        return [f"pipe = {base.pipeline}.from_pretrained(..., dtype={DTYPES[options.precision]})"]
    return _diffusers_lines(options, vae)


def _diffusers_lines(options: DrawingOptions, vae: Any) -> list[str]:
    dtype, lines = str(DTYPES[options.precision]), list[str]()
    if options.quantise in BITSANDBYTES:
        lines += [f"kept = quantization_config({options.quantise!r}, ['unet'], {dtype})  # of imagine.bases.quantising"]
        lines += [f"pipe = ImaginePipeline.from_pretrained(..., dtype={dtype}, quantization_config=kept)"]
    else:
        lines += [f"pipe = ImaginePipeline.from_pretrained(..., dtype={dtype})"]
    if options.quantise == "fp8":
        lines.append(f"store_in_float8(pipe, {dtype})  # of imagine.bases.quantising")
    lines += {
        "none": ['pipe.to("cuda")'],
        "model": ["pipe.enable_model_cpu_offload()"],
        "sequential": ["pipe.enable_sequential_cpu_offload()"],
        "group": ['pipe.enable_group_offload("cuda", offload_type="leaf_level")'],
    }[options.offload]
    if options.tiling:
        lines.append("pipe.vae.enable_tiling()")
        if hasattr(vae, "tile_latent_min_size"):
            pixels = TILE * compression(vae)
            lines.append(f"pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = {TILE}, {pixels}")
        lines.append("pipe.vae.enable_slicing()")
    return lines


def _dtype(options: DrawingOptions) -> str:
    return str(DTYPES[options.precision]).removeprefix("torch.")


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _card(size: int) -> int:
    """Return the size of the smallest common card that holds `size` bytes, in GB."""
    return next(
        (gigabytes for gigabytes in (4, 6, 8, 12, 16, 24, 32, 48, 80, 96, 141, 192) if gigabytes * GIB >= size), 288
    )
