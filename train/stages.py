"""A run is its stages in order: build each task, give it what earlier stages trained, train it, note that it is done.

    DIR/run.yaml                    the resolved run
    DIR/STAGE/stage.yaml            the resolved stage
    DIR/STAGE/checkpoints/          to carry on from
    DIR/STAGE/metrics.jsonl         numbers; DIR/STAGE/samples/ pictures
    DIR/STAGE/weights.safetensors   averaged weights of the modules that trained, for later stages
    DIR/STAGE/export/               what the task leaves for use
    DIR/STAGE/done.json             there once the stage saw all its images

The same command again carries on where the run was. A changed setting needs `resume`, so that nobody mixes two runs in
one folder by accident. More `images` for a stage that is done is such a change: it goes on from before its rate fell.
"""

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from imagine.errors import ConfigError
from train import checkpoint
from train.config import Run, Stage, checked, unknown_name
from train.data import key
from train.initial import load_initial
from train.loop import Stopping, train_stage
from train.task import Start, Task

log = logging.getLogger("train")

TASKS: dict[str, str] = {  # name -> "module:Class", imported when a run uses it
    "autoencoder": "train.task_autoencoder:AutoencoderTask",
    "clip": "train.task_clip:ClipTask",
    "recogniser": "train.task_recogniser:RecogniserTask",
    "reader": "train.task_reader:ReaderTask",
    "finder": "train.task_finder:FinderTask",
    "base": "train.task_base:BaseTask",
    "adapter": "train.task_adapter:AdapterTask",
}
# settings that do not change what is learnt
HARMLESS = {"validate_every", "checkpoint_every_seconds", "report_every_seconds", "keep", "prefetch"}


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
    names something unknown, `only` names no stage, or `output` holds another run.
    """
    stages = {name: resolved(name, stage, tasks) for name, stage in run.stages.items()}
    run = Run(data=run.data, stages=stages)
    wanted = wanted_stages(run, only)
    _agree(run, wanted, output, resume)
    output.mkdir(parents=True, exist_ok=True)
    stopping, accelerator = Stopping(max_minutes), Accelerator()
    if accelerator.is_main_process:
        _write_yaml(output / "run.yaml", run.model_dump(mode="json"))
    with stopping.listening():
        for name in wanted:
            if is_done(output / name, run.stages[name]):
                log.info("%s: done.", name)
                _warn_if_stale(name, run.stages[name], output)
            elif stopping.reason or not _run_stage(name, run, output, accelerator, stopping, tasks):
                log.info("Run the same command again to carry on.")
                return False
    return True


def resolved(name: str, stage: Stage, tasks: Mapping[str, Any]) -> Stage:
    """The stage with its task's own settings checked and filled in; ConfigError for anything the task does not know."""
    task = task_class(stage.task, tasks, name)
    for part in stage.train:
        if part not in task.PARTS:
            raise ConfigError(f"stage {name}: {unknown_name('part', part, task.PARTS)}.")
    settings = checked(task.Settings, stage.settings, f"stage {name}, settings").model_dump(mode="json")
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
        _write_yaml(folder / "stage.yaml", _described(run, name))
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
    kind = task_class(stage.task, tasks, name)
    settings = checked(kind.Settings, stage.settings, f"stage {name}, settings")
    earlier = {source: output / source / "export" for source in stage.start_from}
    torch.manual_seed(key(stage.seed, "build"))
    start = Start(name, stage.seed, device, output / name, run.data, stage.initial, earlier)
    task: Task = kind(settings, start)
    if stage.initial is not None:
        log.info("%s: from %s: %s", name, stage.initial, ", ".join(load_initial(task.modules, stage.initial)))
    for source in stage.start_from:
        path = output / source / "weights.safetensors"
        loaded = checkpoint.load_weights(task.modules, checkpoint.read_tensors(path)[0], str(path))
        log.info("%s: from %s: %s", name, source, ", ".join(loaded) or "no module of the same name")
    for module in task.modules.values():
        module.to(device)
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


def _agree(run: Run, wanted: Sequence[str], output: Path, resume: bool) -> None:
    """Refuse a folder that holds something else; with `resume`, say what changed and go on."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; name a folder for the run.")
    if not resume and output.exists() and not (output / "run.yaml").exists() and any(output.iterdir()):
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


def _changes(run: Run, name: str, output: Path) -> list[tuple[str, Any, Any]]:
    """(setting, before, now) for all that differs from what the folder was last trained with."""
    path = output / name / "stage.yaml"
    if not path.exists():
        return []
    before, now = _flat(yaml.safe_load(path.read_text(encoding="utf-8"))), _flat(_described(run, name))
    names = [setting for setting in {**before, **now} if setting not in HARMLESS]
    return [(n, before.get(n), now.get(n)) for n in names if before.get(n) != now.get(n)]


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _described(run: Run, name: str) -> dict[str, Any]:
    return {**run.stages[name].model_dump(mode="json"), "data": run.data}


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
