"""A run is its stages in order: build each task, give it what earlier stages trained, train it, note that it is done.

    DIR/run.yaml                    the resolved run
    DIR/tracking/                   what the trackers write
    DIR/precision.json              what `precision: auto` chose, on which kind of device
    DIR/STAGE/stage.yaml            the resolved stage
    DIR/STAGE/checkpoints/          to carry on from
    DIR/STAGE/metrics.jsonl         numbers; DIR/STAGE/samples/ pictures
    DIR/STAGE/weights.safetensors   averaged weights of the modules that trained, for later stages
    DIR/STAGE/best.safetensors      likewise, at the best validation, if the stage says `best_by`
    DIR/STAGE/export/               what the task leaves for use
    DIR/STAGE/best/                 likewise, with the best weights
    DIR/STAGE/done.json             there once the stage saw all its images

The same command again carries on where the run was. A changed setting needs `resume`, so that nobody mixes two runs in
one folder by accident. More `images` for a stage that is done is such a change: it goes on from before its rate fell.

Of several processes (docs/training.md) the main one writes, and goes first where files are made that all of them read.
"""

import importlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import nn

from imagine.errors import ConfigError, ImagineError
from imagine.settings import unknown_name, validated
from train.config import Run, Stage
from train.data.order import derive_seed
from train.initial_weights import find_weights, load_initial
from train.loop import SETUP_TIMEOUT, broadcast_from_main, on_any_process, train_stage
from train.run import checkpoint, parts, trackers
from train.run.stopping import Stopping
from train.task import Task, TaskContext

log = logging.getLogger("train")

TASKS: dict[str, str] = {  # name -> "module:Class", imported when a run uses it
    "autoencoder": "train.tasks.autoencoder:AutoencoderTask",
    "clip": "train.tasks.clip:ClipTask",
    "recogniser": "train.tasks.recogniser:RecogniserTask",
    "reader": "train.tasks.reader:ReaderTask",
    "finder": "train.tasks.finder:FinderTask",
    "base": "train.tasks.base:BaseTask",
    "likeness": "train.tasks.likeness:LikenessTask",
    "adapter": "train.tasks.adapter:AdapterTask",
    "diffusers_adapter": "train.tasks.diffusers:DiffusersTask",
}
# settings that do not change what is learnt
SETTINGS_THAT_MAY_CHANGE = {
    "validate_every", "checkpoint_every_seconds", "report_every_seconds", "keep", "prefetch", "best_by", "best_is",
}  # fmt: skip
# How a stage's random numbers are keyed; stage.yaml says it, so that a stage keeps the numbers that it began with.
NUMBERING = 2  # by seed and stage; 1: by the seed alone, all stages alike, and sources count each other's images


def run_stages(
    run: Run,
    output: Path,
    *,
    resume: bool = False,
    only: Sequence[str] = (),
    max_minutes: float | None = None,
    tasks: Mapping[str, Any] = TASKS,
) -> bool:
    """Train every stage that is not done, in order; True if all wanted ones are done, False if stopped before.

    `tasks` maps a task's name to its class or to "module:Class". ConfigError before anything is trained if the run
    names something unknown or something that is not there, `only` names no stage, `output` holds another run, or the
    processes do not fit.
    """
    run = run.model_copy(update={"stages": {n: resolved(n, stage, tasks) for n, stage in run.stages.items()}})
    wanted = wanted_stages(run, only)
    stopping, accelerator = Stopping(max_minutes), _accelerator(run, output)
    _check_batch_divides(run, wanted, accelerator.num_processes)
    _check_unchanged(run, wanted, output, resume)
    wrong = broadcast_from_main(
        accelerator, _check_later_stages(run, wanted, output, tasks) if accelerator.is_main_process else ""
    )
    if wrong:
        raise ConfigError(wrong)
    accelerator.wait_for_everyone()  # all have looked at the folder before one of them writes into it
    output.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        _write_yaml(output / "run.yaml", run.model_dump(mode="json"))
    with stopping.handling_signals(), trackers.tracked(accelerator, output):
        finished = _run_in_order(wanted, run, output, accelerator, stopping, tasks)
    accelerator.end_training()
    return finished


def _run_in_order(
    wanted: Sequence[str],
    run: Run,
    output: Path,
    accelerator: Accelerator,
    stopping: Stopping,
    tasks: Mapping[str, Any],
) -> bool:
    for name in wanted:
        if is_done(output / name, run.stages[name]):
            log.info("%s: done.", name)
            _warn_if_stale(name, run.stages[name], output)
            continue
        (stop,) = on_any_process(accelerator, stopping.reason is not None)
        if stop or not _run_stage(name, run, output, accelerator, stopping, tasks):
            log.info("Run the same command again to carry on.")
            return False
    return True


def _accelerator(run: Run, output: Path) -> Accelerator:
    """The processes this one belongs to, as accelerate was told of them, and the trackers that are installed."""
    accelerator = Accelerator(
        mixed_precision="no",  # the stage says in what precision it trains, and in how many pieces
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=trackers.installed(run, output) or None,
        project_dir=output / "tracking",
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=SETUP_TIMEOUT),
            # a batch need not reach every parameter: one without letters does not reach ByT5
            DistributedDataParallelKwargs(find_unused_parameters=True),
        ],
    )
    _check_distributed_type(accelerator)
    if not accelerator.is_main_process:
        log.setLevel(logging.ERROR)  # the main process speaks for all
    for name in trackers.missing(run):
        log.warning("The tracker %s is left out: install it (`pip install %s`), or see metrics.jsonl.", name, name)
    return accelerator


def _check_distributed_type(accelerator: Accelerator) -> None:
    """ConfigError for a way of sharing the work that the loop does not know."""
    engine = accelerator.distributed_type
    if engine in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise ConfigError(f"The trainer does not know {engine.value}: use one of configs/accelerate.")
    if engine == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError(
            "The trainer knows FSDP only in its second version: set fsdp_version: 2 (configs/accelerate)."
        )
    if accelerator.num_processes == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("Several processes were launched, but there is no GPU for them: set ACCELERATE_USE_CPU=true.")


def _check_batch_divides(run: Run, wanted: Sequence[str], processes: int) -> None:
    """ConfigError unless each wanted stage's batch can be cut into equal pieces for all processes."""
    for name in wanted:
        stage = run.stages[name]
        if stage.batch_size % (stage.accumulation * processes):
            raise ConfigError(
                f"stage {name}: batch_size {stage.batch_size} does not divide into {stage.accumulation} pieces on each "
                f"of {processes} processes: change one of the three."
            )


def resolved(name: str, stage: Stage, tasks: Mapping[str, Any]) -> Stage:
    """The stage with its task's own settings checked and filled in; ConfigError for anything the task does not know."""
    task = task_class(stage.task, tasks, name)
    for part in stage.train:
        if part not in task.PARTS:
            raise ConfigError(f"stage {name}: {unknown_name('part', part, task.PARTS)}.")
    settings = validated(task.Settings, stage.settings, f"stage {name}, settings").model_dump(mode="json")
    return stage.model_copy(update={"settings": settings})


def is_done(folder: Path, stage: Stage) -> bool:
    """Whether the stage saw as many images as it now should."""
    done = _read_done(folder)
    return done is not None and done["images"] == stage.images


def _run_stage(
    name: str, run: Run, output: Path, accelerator: Accelerator, stopping: Stopping, tasks: Mapping[str, Any]
) -> bool:
    stage, folder = run.stages[name], output / name
    check_start(name, run, output)
    folder.mkdir(exist_ok=True)
    if accelerator.is_main_process:
        _write_yaml(folder / "stage.yaml", _stage_record(run, name, output))
    with accelerator.main_process_first():  # tasks may write what they build from, such as tokenizers
        task = build(name, run, output, accelerator.device, tasks)
    numbers = train_stage(name, stage, task, folder, accelerator, stopping)
    accelerator.free_memory()
    if numbers is None:
        return False
    sources = {source: _done_images(output / source) for source in stage.start_from}
    if accelerator.is_main_process:
        checkpoint.write_json(folder / "done.json", {"images": stage.images, "from": sources, "validation": numbers})
    accelerator.wait_for_everyone()
    log.info("%s: done.", name)
    return True


def check_start(name: str, run: Run, output: Path) -> None:
    """ConfigError unless every stage that this one starts from is done."""
    for source in run.stages[name].start_from:
        if not is_done(output / source, run.stages[source]):
            raise ConfigError(f"Stage {name} starts from {source}, which is not done: run {source} first.")


def build(name: str, run: Run, output: Path, device: torch.device, tasks: Mapping[str, Any]) -> Task:
    """The task on its device, with every module that an earlier stage in `start_from` trained under the same name."""
    stage = run.stages[name]
    context = task_context(name, run, output, device, output / name)
    return build_with_weights(stage, context, [output / source for source in stage.start_from], tasks)


def build_on_meta(name: str, run: Run, output: Path, folder: Path, tasks: Mapping[str, Any]) -> Task:
    """The task without numbers, on torch's meta device; ConfigError or WeightsError if the run could not build it.

    Not checked by `Task.check` yet. `folder` stands for the stage's own.
    """
    stage = run.stages[name]
    kind = task_class(stage.task, tasks, name)
    settings = validated(kind.Settings, stage.settings, f"stage {name}, settings")
    with torch.device("meta"):
        task: Task = kind(settings, task_context(name, run, output, torch.device("meta"), folder))
    parts.choose(task.parts(), stage.train, name)
    inherits = _inherited_modules(stage, task, name)
    if stage.initial is not None:
        find_weights(inherits, stage.initial)
    return task


def _check_later_stages(run: Run, wanted: Sequence[str], output: Path, tasks: Mapping[str, Any]) -> str:
    """What stages after the first could be told to be wrong only when the others are trained, in a sentence; or "".

    The first one is about to be built anyway.
    """
    todo = [name for name in wanted if not is_done(output / name, run.stages[name])]
    try:
        with tempfile.TemporaryDirectory() as place:
            for name in todo[1:]:
                there = (output / name / "cache").exists()  # tokenizers, which take seconds to make
                build_on_meta(name, run, output, output / name if there else Path(place), tasks).check()
    except ImagineError as error:
        return str(error)
    return ""


def task_context(name: str, run: Run, output: Path, device: torch.device, folder: Path) -> TaskContext:
    """What the stage's task is told, with `folder` as its own."""
    stage = run.stages[name]
    earlier = {source: output / source / "export" for source in stage.start_from}
    current = _numbering(output / name) == NUMBERING
    seed = derive_seed(stage.seed, f"stage {name}") if current else stage.seed
    return TaskContext(name, seed, device, folder, run.data, stage.initial, earlier, tuple(stage.train), current)


def _inherited_modules(stage: Stage, task: Task, name: str) -> dict[str, nn.Module]:
    """The modules that do not begin anew; ConfigError for a name in `fresh` that none of them has."""
    for module in stage.fresh:
        if module not in task.modules:
            raise ConfigError(f"stage {name}, fresh: {unknown_name('module', module, list(task.modules))}.")
    return {module: network for module, network in task.modules.items() if module not in stage.fresh}


def build_with_weights(stage: Stage, context: TaskContext, sources: Sequence[Path], tasks: Mapping[str, Any]) -> Task:
    """The task on its device, from `stage.initial` and then from the weights in the folders of these stages."""
    name = context.name
    kind = task_class(stage.task, tasks, name)
    settings = validated(kind.Settings, stage.settings, f"stage {name}, settings")
    torch.manual_seed(derive_seed(context.seed, "build"))
    task: Task = kind(settings, context)
    for sentence in task.check():
        log.warning("%s: %s", name, sentence)
    inherits = _inherited_modules(stage, task, name)
    if stage.initial is not None:
        log.info("%s: from %s: %s", name, stage.initial, ", ".join(load_initial(inherits, stage.initial)))
    for source in sources:
        path = source / "weights.safetensors"
        loaded = checkpoint.load_weights(inherits, checkpoint.read_tensors(path)[0], str(path))
        log.info("%s: from %s: %s", name, source.name, ", ".join(loaded) or "no module of the same name")
    for network in task.modules.values():
        network.to(context.device)
    return task


def task_class(task: str, tasks: Mapping[str, Any], stage: str) -> Any:
    """The class behind a task's name, imported if need be; ConfigError with the valid names if there is none."""
    if task not in tasks:
        raise ConfigError(f"stage {stage}: {unknown_name('task', task, list(tasks))}.")
    address = tasks[task]
    if not isinstance(address, str):
        return address
    module, _, name = address.partition(":")
    return getattr(importlib.import_module(module), name)


def wanted_stages(run: Run, only: Sequence[str]) -> list[str]:
    """The stages to run, in order: all of them, or those in `only`; ConfigError if it names none of them."""
    for name in only:
        if name not in run.stages:
            raise ConfigError(f"--only: {unknown_name('stage', name, list(run.stages))}.")
    return [name for name in run.stages if not only or name in only]


def _check_unchanged(run: Run, wanted: Sequence[str], output: Path, resume: bool) -> None:
    """Refuse a folder that holds something else; with `resume`, say what changed and go on."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; name a folder for the run.")
    if not resume and not (output / "run.yaml").exists() and _holds_anything(output):
        raise ConfigError(f"{output} is not empty and holds no run; name an empty folder, or add --resume to use it.")
    for name in wanted:
        for setting, was, becomes in _changes(run, name, output):
            if not resume:
                raise ConfigError(
                    f"{output} holds a run whose stage {name} has {setting} {was}, not {becomes}: "
                    "add --resume to carry it on with the new value, or name another folder."
                )
            if is_done(output / name, run.stages[name]):
                log.warning("%s: is done and stays as it is, trained with %s %s.", name, setting, was)
            else:
                log.warning("%s: carries on with %s %s instead of %s.", name, setting, becomes, was)


def _holds_anything(output: Path) -> bool:
    """Whether there is more in the folder than what a run that was killed in its first moments was writing."""
    return output.exists() and any(path.name != ".run.yaml.draft" for path in output.iterdir())


def _changes(run: Run, name: str, output: Path) -> list[tuple[str, Any, Any]]:
    """(setting, before, now) for all that differs from what the folder was last trained with."""
    path = output / name / "stage.yaml"
    if not path.exists():
        return []
    before, now = _flat(_previous_settings(path)), _flat(_stage_record(run, name, output))
    names = [setting for setting in {**before, **now} if setting not in SETTINGS_THAT_MAY_CHANGE]
    return [(n, before.get(n), now.get(n)) for n in names if before.get(n) != now.get(n)]


def _previous_settings(path: Path) -> dict[str, Any]:
    """The stage as it was described then; what could not be said yet was as it is now by default."""
    defaults = Stage.model_validate({"task": "", "train": {"": 0}, "images": 1}).model_dump(mode="json")
    return {**defaults, "numbering": 1, **yaml.safe_load(path.read_text(encoding="utf-8"))}


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _stage_record(run: Run, name: str, output: Path) -> dict[str, Any]:
    numbering = _numbering(output / name)
    return {**run.stages[name].model_dump(mode="json"), "data": run.data, "numbering": numbering}


def _numbering(folder: Path) -> int:
    """How the stage in this folder keys its random numbers: as it began, or the current way if it is yet to begin."""
    path = folder / "stage.yaml"
    return int(_previous_settings(path)["numbering"]) if path.exists() else NUMBERING


def _warn_if_stale(name: str, stage: Stage, output: Path) -> None:
    done = _read_done(output / name) or {"from": {}}
    for source in stage.start_from:
        if done["from"].get(source) != _done_images(output / source):
            log.warning("%s started from an older %s; delete %s to train it again.", name, source, output / name)


def _done_images(folder: Path) -> int | None:
    done = _read_done(folder)
    return None if done is None else int(done["images"])


def _read_done(folder: Path) -> dict[str, Any] | None:
    path = folder / "done.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    with checkpoint.replacing(path) as draft:
        draft.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
