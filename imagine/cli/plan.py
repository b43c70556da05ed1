"""`imagine plan`: how much memory, arithmetic and time drawing or training takes, without running it."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from imagine.cli.arguments import add_command, non_negative, positive
from imagine.cli.printing import size, table_lines
from imagine.errors import ConfigError

if TYPE_CHECKING:
    from imagine.blueprints.blueprint import Blueprint
    from imagine.planning.cards import Speed

_MEMORY_OPTIONS = ("precision", "quantise", "offload", "tiling")
_RECIPE_OPTIONS = ("precision", "checkpointing", "optimiser", "accumulation")
_BRANCH_OPTIONS = ("readers", "projection", "lora_rank")
_DRAWING_OPTIONS = (
    "steps", "references", "people", "native", "no_guidance", "quantise", "offload", "tiling", "compare_native",
)  # fmt: skip
_COMPARED_OPTIONS = ("resolution", "projection")  # that matter for --compare-native
_TRAINING_OPTIONS = ("parts", "checkpointing", "optimiser", "accumulation", "no_average")
_COMMON_OPTIONS = ("train", "resolution", "batch", "fit", "precision", "device", "flops", *_BRANCH_OPTIONS)


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(commands, "plan", "estimate the memory, arithmetic and time of drawing or training", run)
    subject = command.add_mutually_exclusive_group(required=True)
    subject.add_argument("--base", metavar="BASE", help="sdxl, flux2-klein-4b or another name of "
                         "`imagine licences`, portrait, a folder, or a downloaded hub id")  # fmt: skip
    subject.add_argument("--check", action="store_true", help="compare plans with small networks that run here")
    command.add_argument("--resolution", type=positive, metavar="PX", help="pixels a side (default: the base's own)")
    command.add_argument("--batch", type=positive, metavar="N", help="pictures of a call, or images a step "
                         "(default: 1)")  # fmt: skip
    command.add_argument("--fit", metavar="SIZE", help="choose the fastest settings that fit into this memory, such as "
                         "12GB; the settings that are given stay")  # fmt: skip
    command.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="precision of the networks "
                         "(default: bf16); --fit does not change it")  # fmt: skip
    command.add_argument("--readers", metavar="NAMES", help="text encoders beside the base's own: t5-xl, t5-xxl or "
                         "ul2, and byt5-small or byt5-base; or none (default: t5-xl,byt5-small on "
                         "U-Nets, none on transformers)")  # fmt: skip
    command.add_argument("--projection", choices=["plus", "full"], help="form of the vision branch's projection: "
                         "IP-Adapter Plus, or the paper's (default: plus)")  # fmt: skip
    command.add_argument("--lora-rank", type=non_negative, metavar="N", help="rank of the LoRA; 0 means none "
                         "(default: 64 on U-Nets, 0 on transformers)")  # fmt: skip
    speed = command.add_mutually_exclusive_group()
    speed.add_argument("--device", metavar="NAME", help="device to plan the time for: a card such as rtx4090 or a100, "
                       "or here (default: five usual cards)")  # fmt: skip
    speed.add_argument("--flops", metavar="SPEED", help="speed that the device reaches, in FLOP a second, such as 300T")
    _add_drawing(command.add_argument_group("for drawing"))
    _add_training(command.add_argument_group("for training"))


def _add_drawing(group: Any) -> None:
    group.add_argument("--steps", type=positive, metavar="N", help="denoising steps (default: 30 on U-Nets, the "
                       "pipeline's own on transformers)")  # fmt: skip
    group.add_argument("--references", type=positive, metavar="N", help="photos for each person (default: 1)")
    group.add_argument("--people", type=positive, metavar="N", help="people in each picture (default: 1)")
    group.add_argument("--native", type=positive, metavar="N", help="native reference images of FLUX.2, "
                       "Qwen-Image-Edit or Kontext, beside the adapter (default: none)")  # fmt: skip
    group.add_argument("--no-guidance", action="store_true", help="one denoiser pass a step, as few-step models need")
    group.add_argument("--quantise", choices=["none", "int8", "fp8", "nf4"], help="storage of the large networks "
                       "(default: none, or what --fit needs)")  # fmt: skip
    group.add_argument("--offload", choices=["none", "model", "sequential", "group"], help="keep networks in "
                       "main memory while they do not run (default: none, or what --fit needs)")  # fmt: skip
    group.add_argument("--tiling", action="store_true", help="decode in tiles, which saves memory at large "
                       "sizes")  # fmt: skip
    group.add_argument("--compare-native", action="store_true", help="compare tokens and arithmetic of photos as "
                       "native references and as references of the adapter")  # fmt: skip


def _add_training(group: Any) -> None:
    group.add_argument("--train", action="store_true", help="plan a training step instead of drawing")
    group.add_argument("--parts", metavar="NAMES", help="parts to train, such as vision_branch,lora (default: all)")
    group.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    group.add_argument("--optimiser", choices=["adamw", "adamw8bit"], help="optimiser; adamw8bit stores its "
                       "state in bytes (default: adamw, or what --fit needs)")  # fmt: skip
    group.add_argument("--accumulation", type=positive, metavar="N", help="parts into which a batch is split (default: "
                       "1, or what --fit needs)")  # fmt: skip
    group.add_argument("--no-average", action="store_true", help="keep no moving average of the weights")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return the plan, or the comparison of --check."""
    from imagine.planning.cards import read_size, speeds

    _check_unused_options(options)
    limit = None if options.fit is None else read_size(options.fit)
    if options.train and options.precision == "fp16":
        raise ConfigError("Training in fp16 needs loss scaling, which our trainer does not have: choose bf16 or fp32.")
    known = speeds(options.device, options.flops, options.precision != "fp32") if options.base else {}
    if options.check:
        from imagine.planning.check import check

        checked = check()
        return {"lines": check_lines(checked), **checked}
    base = _planned_base(options)
    if options.train:
        report = _plan_training(options, base, limit, known)
        return {"lines": training_lines(report), **report}
    if options.compare_native:
        from imagine.planning.inference import default_resolution
        from imagine.planning.native import compare_native

        compared = compare_native(base, options.resolution or default_resolution(base))
        return {"lines": native_lines(compared), **compared}
    report = _plan_drawing(options, base, limit, known)
    return {"lines": drawing_lines(report), **report}


def _plan_training(
    options: argparse.Namespace, base: "Blueprint", limit: int | None, known: "Mapping[str, Speed]"
) -> dict[str, Any]:
    from imagine.planning.inference import default_resolution
    from imagine.planning.planning import plan_training
    from imagine.planning.training import Recipe, TrainingWorkload

    parts = tuple(filter(None, (options.parts or "").split(",")))
    workload = TrainingWorkload(options.resolution or default_resolution(base), options.batch or 1, parts)
    given = {name: getattr(options, name) for name in _given_names(options, _RECIPE_OPTIONS)}
    recipe = Recipe(**given, average=not options.no_average)
    return plan_training(base, workload, recipe, limit, known, [*given, *["average"] * options.no_average])


def _plan_drawing(
    options: argparse.Namespace, base: "Blueprint", limit: int | None, known: "Mapping[str, Speed]"
) -> dict[str, Any]:
    from imagine.planning.denoisers import is_guided, kind_of
    from imagine.planning.inference import DrawingOptions, DrawingWorkload, default_resolution
    from imagine.planning.planning import plan_drawing

    given = {name: getattr(options, name) for name in _given_names(options, ("references", "people", "native"))}
    resolution = options.resolution or default_resolution(base)
    steps = options.steps or base.steps or kind_of(base.denoiser.kind).steps
    guided = is_guided(base) and not options.no_guidance
    workload = DrawingWorkload(resolution, options.batch or 1, steps, **given, guided=guided)
    fixed = _given_names(options, _MEMORY_OPTIONS)
    settings = DrawingOptions(**{name: getattr(options, name) for name in fixed})
    return plan_drawing(base, workload, settings, limit, known, fixed)


def _planned_base(options: argparse.Namespace) -> "Blueprint":
    from imagine.blueprints.published import read_base
    from imagine.planning.networks import add_branches

    base = read_base(options.base)
    if base.adapters and (unused := _given_names(options, _BRANCH_OPTIONS)):
        raise ConfigError(f"{options.base} has adapters already: leave out {_flag_names(unused)}.")
    on_unet = base.denoiser_name == "unet"
    readers = (options.readers or ("t5-xl,byt5-small" if on_unet else "none")).split(",")
    rank = (64 if on_unet else 0) if options.lora_rank is None else options.lora_rank
    return add_branches(base, [n for n in readers if n and n != "none"], options.projection or "plus", rank)


def _check_unused_options(options: argparse.Namespace) -> None:
    """Raise ConfigError for arguments that do not apply to what is planned."""
    if options.check:
        if unused := _given_names(options, (*_COMMON_OPTIONS, *_DRAWING_OPTIONS, *_TRAINING_OPTIONS)):
            raise ConfigError(f"--check takes no other arguments: leave out {_flag_names(unused)}.")
    elif options.compare_native:
        others = {*_COMMON_OPTIONS, *_DRAWING_OPTIONS, *_TRAINING_OPTIONS} - {*_COMPARED_OPTIONS, "compare_native"}
        if unused := _given_names(options, sorted(others)):
            raise ConfigError(f"--compare-native does not depend on {_flag_names(unused)}: leave that out.")
    elif options.train and (unused := _given_names(options, _DRAWING_OPTIONS)):
        raise ConfigError(f"Training does not depend on {_flag_names(unused)}: leave that out, or leave out --train.")
    elif not options.train and (unused := _given_names(options, _TRAINING_OPTIONS)):
        raise ConfigError(f"Drawing does not depend on {_flag_names(unused)}: leave that out, or add --train.")


def _given_names(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    return [name for name in names if getattr(options, name) is not None and getattr(options, name) is not False]


def _flag_names(names: Sequence[str]) -> str:
    return " and ".join(f"--{name.replace('_', '-')}" for name in names)


# --- what is printed --------------------------------------------------------------------------------------------------
def drawing_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the plan of a call as lines: a table of its parts, then totals, times and the code that sets it up."""
    rows = [
        [
            name, _millions(part["parameters"]), size(part["weights"]), size(part["working"]),
            size(part["at_once"]) if "at_once" in part else "", f"{part['flops'] / 1e12:.3g}",
        ]
        for name, part in report["parts"].items()
    ]  # fmt: skip
    return [
        _title(report),
        "",
        *table_lines(["part", "parameters", "weights", "working", "peak", "TFLOP"], rows, "  "),
        "",
        f"Arithmetic: {report['flops_step'] / 1e12:.3g} TFLOP a step, {report['flops'] / 1e12:.3g} TFLOP in all.",
        f"Memory: at most {size(report['peak'])}, while {report['busiest'].replace('_', ' ')} runs. This counts "
        "tensors, and what a card holds beside them.",
        *_choice_lines(report),
        *_time_lines(report, "for all pictures"),
        "",
        *(["On the command line:", f"  {report['command']}", ""] if report["command"] else []),
        "In Python:",
        *(f"  {line}" for line in report["switches"]),
    ]


def _title(report: Mapping[str, Any]) -> str:
    guided = "with guidance" if report["guided"] else "without guidance"
    further = [f"{report['people']} people"] if report["people"] > 1 else []
    further += [f"{report['native']} native references"] if report["native"] else []
    stored = "" if report["quantise"] == "none" else f", stored in {report['quantise']}"
    return ", ".join([
        f"Drawing with {report['base']}: {report['resolution']} px", f"{report['batch']} pictures, "
        f"{report['at_a_time']} at a time" if report["batch"] > 1 else "1 picture",
        f"{report['steps']} steps {guided}", *further, f"{report['precision']}{stored}", f"offload {report['offload']}",
    ])  # fmt: skip


def _choice_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the choices of --fit as a table: what was compared, and why one of them was taken."""
    if not report["choices"]:
        return []
    rows = [
        [
            each["quantise"], each["offload"], "yes" if each["tiling"] else "no",
            "all" if each["at_a_time"] is None else str(each["at_a_time"]), size(each["peak"]),
            f"{each['slower']:.2f}", each["verdict"],
        ]
        for each in report["choices"]
    ]  # fmt: skip
    header = ["quantise", "offload", "tiling", "at a time", "memory", "time", "verdict"]
    return [
        "", f"What was compared for {size(report['limit'])} (time relative to the fastest choice of all):",
        *table_lines(header, rows, "  "), *(f"  {remark}" for remark in report["remarks"]),
    ]  # fmt: skip


def native_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the comparison with native references as a table, which docs/inference.md shows."""
    rows = [
        [
            str(row["photos"]), f"{row['native_tokens']:,}", f"{row['native_flops'] / 1e12:.1f}",
            f"{row['adapter_tokens']:,} + {row['vision_tokens']}", f"{row['adapter_flops'] / 1e12:.1f}",
        ]
        for row in report["rows"]
    ]  # fmt: skip
    header = ["photos", "native: tokens", "native: TFLOP a step", "adapter: tokens", "adapter: TFLOP a step"]
    return [
        f"Photos of a person for {report['base']} at {report['resolution']} px, {report['passes']} passes a step:",
        "",
        *table_lines(header, rows, "  "),
        "",
        "The adapter's second number are its vision tokens, which only its small branches read.",
    ]


def training_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the plan of a training step as lines: tables of parts and memory, then totals, times and settings."""
    counts = [*report["trained"].items(), ("frozen", report["frozen"])]
    return [
        f"Training {report['base']}: {report['batch']} images of {report['resolution']} px a step",
        "",
        *table_lines(["part", "parameters"], [[name, _millions(count)] for name, count in counts], "  "),
        "",
        *table_lines(["memory for", "size"], [[name, size(count)] for name, count in report["memory"].items()], "  "),
        "",
        f"Arithmetic: {report['flops_step'] / 1e12:.3g} TFLOP a step.",
        f"Memory: {size(report['peak'])}. This counts tensors, and what a card holds beside them.",
        *_time_lines(report, "for a step"),
        "",
        "In a stage of a configuration file:",
        *(f"  {line}" for line in report["switches"]),
    ]


def check_lines(report: Mapping[str, Any]) -> list[str]:
    """Return a comparison of planned and measured numbers as a table."""
    rows = [[name, row["planned"], row["measured"], f"{row['off']:.1%}"] for name, row in report["rows"].items()]
    return [
        *table_lines(["quantity", "planned", "measured", "difference"], rows),
        f"Memory agrees within {report['tolerance']:.0%}, everything else exactly.",
    ]


def _time_lines(report: Mapping[str, Any], of: str) -> list[str]:
    if not report["seconds"]:
        return []
    times = [[name, _seconds(each)] for name, each in report["seconds"].items()]
    speeds = "; ".join(dict.fromkeys(report["speeds"].values()))
    return ["", *table_lines(["device", f"time {of}"], times, "  "), f"  Speed: {speeds}."]


def _seconds(seconds: float) -> str:
    if seconds < 0.1:
        return f"{seconds * 1000:.2g} ms"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f} M"
