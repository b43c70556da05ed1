"""Run the stages of a run in order: build each task, load the weights of earlier stages, train it, and mark it as done.

    DIR/run.yaml                    the resolved run
    DIR/tracking/                   files of the trackers
    DIR/precision.json              the precision that `precision: auto` chose for each type of device
    DIR/STAGE/stage.yaml            the resolved stage
    DIR/STAGE/checkpoints/          the newest checkpoints
    DIR/STAGE/metrics.jsonl         training and validation numbers
    DIR/STAGE/samples/              validation pictures
    DIR/STAGE/weights.safetensors   averaged weights of the trained modules, for later stages
    DIR/STAGE/best.safetensors      averaged weights at the best validation, if the stage sets `best_by`
    DIR/STAGE/export/               the task's export
    DIR/STAGE/best/                 the task's export with the best weights
    DIR/STAGE/done.json             exists once the stage has seen all its images

The same command resumes a stopped run. A changed setting needs `resume`, so that two runs are not mixed in one folder
by accident. More `images` for a finished stage is such a change: it resumes from before its learning rate fell.

With several processes (docs/training.md), the main process writes all files, and goes first where all processes read
files that one has to make.
"""

import importlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
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
from pydantic_core import to_jsonable_python
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

TASKS: dict[str, str] = {  # task name -> "module:Class", imported when a run uses it
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
# Settings that may change without `resume`, because they do not change the trained weights.
SETTINGS_THAT_MAY_CHANGE = {
    "validate_every", "checkpoint_every_seconds", "report_every_seconds", "keep", "prefetch", "best_by", "best_is",
    "gates",
}  # fmt: skip
# The scheme of a stage's random numbers. It is stored in stage.yaml, so that a resumed stage keeps its scheme.
NUMBERING = 2  # keyed by seed and stage; 1: by the seed alone for all stages, and all sources share one image count


def run_stages(
    run: Run,
    output: Path,
    *,
    resume: bool = False,
    only: Sequence[str] = (),
    max_minutes: float | None = None,
    max_training_seconds: float | None = None,
    tasks: Mapping[str, Any] = TASKS,
) -> bool:
    """Train every stage that is not done, in order. Return True if all wanted stages are done, False if stopped before.

    `max_training_seconds` stops the first stage that has trained for so long. `tasks` maps a task's name to its class
    or to "module:Class". Raises ConfigError before anything is trained if the run contains an unknown name or a missing
    file, `only` an unknown stage, `output` another run, or if the batch sizes do not divide among the processes.
    """
    run = run.model_copy(update={"stages": {n: resolved(n, stage, tasks) for n, stage in run.stages.items()}})
    wanted = wanted_stages(run, only)
    stopping, accelerator = Stopping(max_minutes, max_training_seconds), _accelerator(run, output)
    _check_batch_divides(run, wanted, accelerator.num_processes)
    _check_unchanged(run, wanted, output, resume, tasks)
    wrong = broadcast_from_main(
        accelerator, _check_later_stages(run, wanted, output, tasks) if accelerator.is_main_process else ""
    )
    if wrong:
        raise ConfigError(wrong)
    accelerator.wait_for_everyone()  # every process has checked the folder before one writes to it
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
            log.info("%s: already done.", name)
            _warn_if_stale(name, run.stages[name], output)
            continue
        (stop,) = on_any_process(accelerator, stopping.reason is not None)
        if stop or not _run_stage(name, run, output, accelerator, stopping, tasks):
            log.info("Run the same command again to resume.")
            return False
    return True


def _accelerator(run: Run, output: Path) -> Accelerator:
    """Create the Accelerator of this run, with its process group and the installed trackers."""
    accelerator = Accelerator(
        mixed_precision="no",  # precision and accumulation are settings of each stage
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=trackers.installed(run, output) or None,
        project_dir=output / "tracking",
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=SETUP_TIMEOUT),
            # A batch may leave parameters without a gradient, such as ByT5's in a batch without letters.
            DistributedDataParallelKwargs(find_unused_parameters=True),
        ],
    )
    # A process that leaves with an error while others still connect would make them fail with an error of their own.
    accelerator.wait_for_everyone()
    _check_distributed_type(accelerator)
    if not accelerator.is_main_process:
        log.setLevel(logging.ERROR)  # only the main process logs progress
    for name in trackers.missing(run):
        log.warning(
            "The tracker %s is not installed and receives no data. Install it with `pip install %s`, or use "
            "metrics.jsonl.", name, name,
        )  # fmt: skip
    return accelerator


def _check_distributed_type(accelerator: Accelerator) -> None:
    """Raise ConfigError for a kind of distributed training that the loop does not support."""
    engine = accelerator.distributed_type
    if engine in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise ConfigError(f"The trainer does not support {engine.value}; use a config of configs/accelerate.")
    if engine == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("The trainer supports only version 2 of FSDP; set fsdp_version: 2 (see configs/accelerate).")
    if accelerator.num_processes == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("Several processes were launched, but no GPU was found; set ACCELERATE_USE_CPU=true.")


def _check_batch_divides(run: Run, wanted: Sequence[str], processes: int) -> None:
    """Raise ConfigError unless the batch of each wanted stage divides into equal micro-batches on all processes."""
    for name in wanted:
        stage = run.stages[name]
        if stage.batch_size % (stage.accumulation * processes):
            raise ConfigError(
                f"stage {name}: batch_size {stage.batch_size} does not divide into {stage.accumulation} micro-batches "
                f"(accumulation) on each of {processes} processes; change one of the three."
            )


def resolved(name: str, stage: Stage, tasks: Mapping[str, Any]) -> Stage:
    """Return the stage with its task's settings checked and the defaults filled in; ConfigError for unknown names."""
    task = task_class(stage.task, tasks, name)
    for part in stage.train:
        if part not in task.PARTS:
            raise ConfigError(f"stage {name}: {unknown_name('part', part, task.PARTS)}.")
    settings = validated(task.Settings, stage.settings, f"stage {name}, settings").model_dump(mode="json")
    return stage.model_copy(update={"settings": settings})


def is_done(folder: Path, stage: Stage) -> bool:
    """Return whether the stage has seen the number of images that it is now set to."""
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
    with accelerator.main_process_first():  # tasks may write files while they are built, such as tokenizers
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
    for sentence in missed_gates(name, stage, folder):
        log.warning("%s", sentence)
    return True


def missed_gates(name: str, stage: Stage, folder: Path) -> list[str]:
    """Return one sentence for each gate that the finished stage in `folder` missed.

    Raises ConfigError if a gate is not a number of its validation.
    """
    done, missed = _read_done(folder), []
    numbers = {} if done is None else done["validation"]
    for gate, least in stage.gates.items():
        if done is not None and gate not in numbers:
            raise ConfigError(f"stage {name}, gates: {unknown_name('validation number', gate, list(numbers))}.")
        if done is not None and numbers[gate] < least:
            missed.append(
                f"Stage {name} reached {gate} {numbers[gate]:.3g}, below its gate of {least:g}: raise its images and "
                "train it further, or lower the gate."
            )
    return missed


def check_start(name: str, run: Run, output: Path) -> None:
    """Raise ConfigError unless every stage that this one starts from is done."""
    for source in run.stages[name].start_from:
        if not is_done(output / source, run.stages[source]):
            raise ConfigError(f"Stage {name} starts from {source}, which is not done; train {source} first.")
        if missed := missed_gates(source, run.stages[source], output / source):
            raise ConfigError(f"Stage {name} starts from {source}. {missed[0]}")


def build(name: str, run: Run, output: Path, device: torch.device, tasks: Mapping[str, Any]) -> Task:
    """Build the task on its device and load every module that a stage in `start_from` trained under the same name."""
    stage = run.stages[name]
    context = task_context(name, run, output, device, output / name)
    return build_with_weights(stage, context, [output / source for source in stage.start_from], tasks)


def build_on_meta(name: str, run: Run, output: Path, folder: Path, tasks: Mapping[str, Any]) -> Task:
    """Build the task without weights, on torch's meta device, with `folder` as the stage's folder.

    Raises ConfigError or WeightsError if the run could not build it. `Task.check` is not called.
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
    """Return the first mistake in the stages after the first unfinished one, as a sentence, or "".

    Otherwise the run would fail only after the stages before are trained. The first one is built next anyway.
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
    """Return the context of the stage's task, with `folder` as the stage's folder."""
    stage = run.stages[name]
    earlier = {source: output / source / "export" for source in stage.start_from}
    current = _numbering(output / name) == NUMBERING
    seed = derive_seed(stage.seed, f"stage {name}") if current else stage.seed
    return TaskContext(name, seed, device, folder, run.data, stage.initial, earlier, tuple(stage.train), current)


def _inherited_modules(stage: Stage, task: Task, name: str) -> dict[str, nn.Module]:
    """Return the modules that load earlier weights (all but `fresh`); ConfigError for an unknown name in `fresh`."""
    for pattern in stage.fresh:
        module, _, inside = pattern.partition(".")
        if module not in task.modules:
            raise ConfigError(f"stage {name}, fresh: {unknown_name('module', module, list(task.modules))}.")
        if inside and not any(fnmatchcase(path, inside) for path in task.modules[module].state_dict()):
            raise ConfigError(f"stage {name}, fresh: no tensor of the module {module} matches {inside}; correct it.")
    return {module: network for module, network in task.modules.items() if module not in stage.fresh}


def build_with_weights(stage: Stage, context: TaskContext, sources: Sequence[Path], tasks: Mapping[str, Any]) -> Task:
    """Build the task on its device; load `stage.initial`, then the weights in the stage folders `sources`."""
    name = context.name
    kind = task_class(stage.task, tasks, name)
    settings = validated(kind.Settings, stage.settings, f"stage {name}, settings")
    torch.manual_seed(derive_seed(context.seed, "build"))
    task: Task = kind(settings, context)
    for sentence in task.check():
        log.warning("%s: %s", name, sentence)
    inherits = _inherited_modules(stage, task, name)
    if stage.initial is not None:
        log.info(
            "%s: loaded from %s: %s", name, stage.initial, ", ".join(load_initial(inherits, stage.initial, stage.fresh))
        )
    for source in sources:
        path = source / "weights.safetensors"
        loaded = checkpoint.load_weights(inherits, checkpoint.read_tensors(path)[0], str(path), stage.fresh)
        log.info("%s: loaded from %s: %s", name, source.name, ", ".join(loaded) or "no module of the same name")
    for network in task.modules.values():
        network.to(context.device)
    return task


def task_class(task: str, tasks: Mapping[str, Any], stage: str) -> Any:
    """Return the class of a task, imported if necessary; ConfigError with the valid names for an unknown one."""
    if task not in tasks:
        raise ConfigError(f"stage {stage}: {unknown_name('task', task, list(tasks))}.")
    address = tasks[task]
    if not isinstance(address, str):
        return address
    module, _, name = address.partition(":")
    return getattr(importlib.import_module(module), name)


def wanted_stages(run: Run, only: Sequence[str]) -> list[str]:
    """Return the names of the stages to run, in order: all, or those in `only`; ConfigError for an unknown name."""
    for name in only:
        if name not in run.stages:
            raise ConfigError(f"--only: {unknown_name('stage', name, list(run.stages))}.")
    return [name for name in run.stages if not only or name in only]


def _check_unchanged(run: Run, wanted: Sequence[str], output: Path, resume: bool, tasks: Mapping[str, Any]) -> None:
    """Raise ConfigError if `output` holds something else or another run; with `resume`, log the changed settings."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"The output {output} is a file; name a folder for the run.")
    if not resume and not (output / "run.yaml").exists() and _holds_anything(output):
        raise ConfigError(f"{output} is not empty and holds no run; name another folder, or add --resume to use it.")
    for name in wanted:
        for setting, was, becomes in _changes(run, name, output, tasks):
            if not resume:
                raise ConfigError(
                    f"{output} holds a run whose stage {name} has {setting} {was}, not {becomes}; "
                    "add --resume to resume it with the new value, or name another folder."
                )
            if is_done(output / name, run.stages[name]):
                log.warning("%s: already done with %s %s, and not trained again.", name, setting, was)
            else:
                log.warning("%s: resuming with %s %s instead of %s.", name, setting, becomes, was)


def _holds_anything(output: Path) -> bool:
    """Return whether the folder holds more than the draft of run.yaml, which a run killed at its start may leave."""
    return output.exists() and any(path.name != ".run.yaml.draft" for path in output.iterdir())


def _changes(run: Run, name: str, output: Path, tasks: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (setting, before, now) for every setting that changed since the stage was last trained in this folder."""
    path = output / name / "stage.yaml"
    if not path.exists():
        return []
    previous = _previous_settings(path)
    previous["settings"] = {**_default_settings(run.stages[name], name, tasks), **previous["settings"]}
    before, now = _flat(previous), _flat(_stage_record(run, name, output))
    names = [setting for setting in {**before, **now} if setting.split(".")[0] not in SETTINGS_THAT_MAY_CHANGE]
    return [(n, before.get(n), now.get(n)) for n in names if before.get(n) != now.get(n)]


def _previous_settings(path: Path) -> dict[str, Any]:
    """Return the settings in stage.yaml; settings that did not exist when it was written get their defaults."""
    defaults = Stage.model_validate({"task": "", "train": {"": 0}, "images": 1}).model_dump(mode="json")
    return {**defaults, "numbering": 1, **yaml.safe_load(path.read_text(encoding="utf-8"))}


def _default_settings(stage: Stage, name: str, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of the task's settings, which a stage had before a setting existed."""
    fields = task_class(stage.task, tasks, name).Settings.model_fields
    defaults = {key: each.get_default(call_default_factory=True) for key, each in fields.items()}
    return {key: to_jsonable_python(value) for key, value in defaults.items() if not fields[key].is_required()}


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _stage_record(run: Run, name: str, output: Path) -> dict[str, Any]:
    numbering = _numbering(output / name)
    return {**run.stages[name].model_dump(mode="json"), "data": run.data, "numbering": numbering}


def _numbering(folder: Path) -> int:
    """Return the NUMBERING that the stage in this folder started with, or the current one for a new stage."""
    path = folder / "stage.yaml"
    return int(_previous_settings(path)["numbering"]) if path.exists() else NUMBERING


def _warn_if_stale(name: str, stage: Stage, output: Path) -> None:
    done = _read_done(output / name) or {"from": {}}
    for source in stage.start_from:
        if done["from"].get(source) != _done_images(output / source):
            log.warning(
                "%s started from an older version of stage %s; delete %s to train it again.",
                name, source, output / name,
            )  # fmt: skip


def _done_images(folder: Path) -> int | None:
    done = _read_done(folder)
    return None if done is None else int(done["images"])


def _read_done(folder: Path) -> dict[str, Any] | None:
    path = folder / "done.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    with checkpoint.replacing(path) as draft:
        draft.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
