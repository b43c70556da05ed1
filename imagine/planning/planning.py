"""`imagine plan`: estimate what inference or training needs, before a download and before a card runs out of memory.

    networks    the networks of a base, built without numbers
    denoisers   how each kind of denoiser is called
    inference   a call, part by part
    choosing    the switches of a call that fit into a memory
    training    a step, forward and backward
    native      native reference images beside the adapter's references
    storage     weights in eight or four bits
    meter       counts bytes and arithmetic
    cards       speeds and sizes of devices
    check       plans of small networks beside measurements

A plan is a dict of plain numbers and words, which `imagine.cli.plan` prints.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from imagine.bases.quantising import check_combination
from imagine.blueprints.blueprint import Blueprint
from imagine.planning.cards import CARDS, MEMORY_BANDWIDTH, UTILISATION, Speed
from imagine.planning.choosing import USUAL_SPEED, Chosen, choose, command, does_not_fit, python_lines
from imagine.planning.inference import DrawingOptions, DrawingPlan, DrawingPlanner, DrawingWorkload
from imagine.planning.training import Recipe, TrainingPlan, TrainingPlanner, TrainingWorkload


def plan_drawing(
    base: Blueprint,
    workload: DrawingWorkload,
    options: DrawingOptions,
    limit: int | None,
    speeds: Mapping[str, Speed],
    fixed: Collection[str] = (),
) -> dict[str, Any]:
    """Return the plan of a call with these switches, or under a `limit` in bytes with the fastest ones that fit.

    The fields of `options` that `fixed` names do not change under a limit. Raises ConfigError, with the smallest memory
    that would fit, if no switches fit.
    """
    drawing = DrawingPlanner(base, workload)
    if limit is None:
        check_combination(options.quantise, options.offload)
        chosen = Chosen(drawing.plan(options), (), ())
    else:
        speed = next(iter(speeds.values())) if len(speeds) == 1 else usual_speed()
        chosen = choose(drawing, options, limit, speed, _describe(base, workload), fixed)
    plan, vae = chosen.plan, drawing.networks.models["vae"]
    return {
        "base": base.name, "resolution": workload.resolution, "batch": workload.batch, "steps": workload.steps,
        "references": workload.references, "people": workload.people, "native": workload.native,
        "guided": workload.guided, "precision": plan.options.precision, "quantise": plan.options.quantise,
        "offload": plan.options.offload, "tiling": plan.options.tiling,
        "at_a_time": plan.options.at_once or workload.batch,
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
        "seconds": {name: plan.seconds(speed) for name, speed in speeds.items()},
        "speeds": {name: speed.how for name, speed in speeds.items()},
        "choices": [_choice(each.plan, each.slower, each.verdict) for each in chosen.choices],
        "remarks": list(chosen.remarks),
        "switches": python_lines(base, plan.options, vae),
        "command": command(base, plan.options, workload.batch, workload.steps),
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
        "seconds": {name: plan.seconds(speed) for name, speed in speeds.items()},
        "speeds": {name: speed.how for name, speed in speeds.items()},
        "switches": training.switches(plan.recipe),
    }  # fmt: skip


def fitting(plans: Iterable[TrainingPlan], limit: int, what: str, fixed: Collection[str] = ()) -> TrainingPlan:
    """Return the first plan that needs at most `limit` bytes. Raises ConfigError, with the smallest need, if none does.

    `what` and `fixed` (the settings that were given) are for the error sentence only.
    """
    tried: list[TrainingPlan] = []
    for plan in plans:
        if plan.peak <= limit:
            return plan
        tried.append(plan)
    raise does_not_fit(tried, limit, what, fixed, training=True)


def usual_speed() -> Speed:
    """Return the speed by which choices are ranked if no device is given."""
    return Speed(CARDS[USUAL_SPEED] * UTILISATION, "", MEMORY_BANDWIDTH[USUAL_SPEED])


def _choice(plan: DrawingPlan, slower: float, verdict: str) -> dict[str, Any]:
    options = plan.options
    return {
        "quantise": options.quantise, "offload": options.offload, "tiling": options.tiling,
        "at_a_time": options.at_once, "peak": plan.peak, "slower": slower, "verdict": verdict,
    }  # fmt: skip


def _describe(base: Blueprint, workload: DrawingWorkload | TrainingWorkload) -> str:
    return f"{base.name} at {workload.resolution} px in batches of {workload.batch}"
