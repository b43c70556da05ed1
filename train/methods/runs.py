"""Run a method: read its config, train it through the trainer's stages, and report what a person costs.

The run's folder is that of any training run (docs/training.md): a killed run carries on with the same command, and ends
with the weights of an uninterrupted one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from imagine.errors import ConfigError
from imagine.paths import PACKAGE
from imagine.settings import unknown_name
from train.config import Run, load_run
from train.methods.registry import METHODS, TUNED
from train.run.checkpoint import write_json
from train.stages import build_on_meta, resolved, run_stages, task_class

RESULT = "result.json"


def config_of(method: str, given: Path | None) -> Path:
    """Return the config of a method: the given one, or configs/methods/METHOD.yaml of the checkout."""
    if given is not None:
        return given
    if method not in METHODS:
        raise ConfigError(f"{unknown_name('method', method, list(METHODS))}.")
    path = PACKAGE.parent / "configs" / "methods" / f"{method}.yaml"
    if not path.is_file():
        raise ConfigError(f"There is no {path}, as this is no checkout of imagine: name a config with --config.")
    return path


def load_method_run(
    method: str, config: Path | None, overrides: Sequence[str], data: dict[str, Any] | None = None
) -> Run:
    """Load a method's config, with the `data` of this call; ConfigError unless it has one stage, of this method."""
    path = config_of(method, config)
    names = list(load_run(path).stages)
    full = [text if text.split("=")[0].split(".")[0] in (*names, "data", "defaults", "trackers") else
            f"{names[0]}.{text}" for text in overrides]  # fmt: skip
    run = load_run(path, full)
    if len(run.stages) != 1:
        raise ConfigError(f"{path} has {len(run.stages)} stages: the config of a method has one.")
    ((name, stage),) = run.stages.items()
    if stage.task != method:
        raise ConfigError(f"{path} is for the method {stage.task}, not for {method}: name another config.")
    if data:
        run = run.model_copy(update={"data": {**run.data, **data}})
    return run.model_copy(update={"stages": {name: resolved(name, stage, METHODS)}})


def subject_data(base: str | None, photos: Sequence[Sequence[Path]], folder: Path | None) -> dict[str, Any]:
    """Return the `data` section of a run that learns these subjects."""
    data: dict[str, Any] = {"photos": [[str(Path(path).absolute()) for path in some] for some in photos]}
    if base is not None:
        data["base"] = base
    if folder is not None:
        data["folder"] = str(folder)
    return data


def train_method(
    run: Run, output: Path, resume: bool = False, max_minutes: float | None = None
) -> dict[str, Any] | None:
    """Train, and return the result (also in result.json); None if the run was stopped before its end."""
    if not run_stages(run, output, resume=resume, max_minutes=max_minutes, tasks=METHODS):
        return None
    found = result(run, output)
    write_json(output / RESULT, found)
    return found


def result(run: Run, output: Path) -> dict[str, Any]:
    """Return what a finished run cost and reached."""
    ((name, stage),) = run.stages.items()
    folder = output / name
    card = json.loads((folder / "export" / "concept.json").read_text(encoding="utf-8"))
    done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    training = max((row["seconds"] for row in rows if "seconds" in row), default=0.0)
    preparing = card.get("seconds", {})
    return {
        "method": stage.task, "base": card["base"], "images": stage.images,
        "seconds_per_person": round(training + float(preparing.get("photos", 0.0)), 2),
        "seconds_shared": preparing.get("prior", 0.0),  # pictures of the class, once per base and noun
        "bytes_per_person": card["bytes"], "tokens": card.get("tokens", []), "noun": card.get("noun", ""),
        "export": str(folder / "export"), "validation": done["validation"],
    }  # fmt: skip


def describe(run: Run, output: Path) -> list[str]:
    """Return what a run would do, in lines; nothing is trained, and no weights of a public base are read."""
    import tempfile

    from train.run import parts

    ((name, stage),) = run.stages.items()
    with tempfile.TemporaryDirectory() as place:
        task: Any = build_on_meta(name, run, output, Path(place), METHODS)
        warnings = task.check()
    sizes = parts.sizes(parts.choose(task.parts(), stage.train, name))
    lines = [
        f"method      {stage.task}",
        f"base        {task.base.name} ({task.base.folder})",
        f"images      {stage.images:,} in batches of {stage.batch_size}",
        *(f"trains      {part}: {count:,} values at {stage.train[part]:g}" for part, count in sizes.items()),
        f"stores      {4 * sum(sizes.values()):,} bytes{' per person' if stage.task in TUNED else ' for all people'}",
    ]
    if stage.task in TUNED:
        naming, settings = task.naming, task.settings
        lines.append(f"subjects    {', '.join(naming.name(number) for number in range(len(naming.tokens)))}")
        if settings.prior and settings.prior_photos is None:
            lines.append(f"draws       {settings.prior_images} pictures of the class, once for all people")
    return [*lines, *(f"note        {sentence}" for sentence in warnings)]


def open_learnt(folder: Path, base: str | None = None, device: torch.device | None = None) -> Any:
    """Load what a method learnt, from the folder of its stage or of its run, ready to draw.

    Raises ConfigError if it holds nothing that a method learnt.
    """
    import yaml

    from train.methods.task import read_card
    from train.task import TaskContext

    stage_folder = _stage_folder(folder)
    export = stage_folder / "export"
    card = read_card(export)
    described = yaml.safe_load((stage_folder / "stage.yaml").read_text(encoding="utf-8"))
    kind = task_class(card["method"], METHODS, stage_folder.name)
    data = {**described["data"], **({} if base is None else {"base": base})}
    settings = {**described["settings"]}
    if card.get("tokens") and settings.get("token") is None and len(card["tokens"]) == 1:
        settings["token"] = card["tokens"][0]
    from train.config import Stage

    stage = Stage.model_validate({key: value for key, value in described.items() if key in Stage.model_fields})
    context = TaskContext(
        stage_folder.name, stage.seed, device or torch.device("cpu"), stage_folder, data, trains=tuple(stage.train)
    )
    task = kind(kind.Settings.model_validate(settings), context)
    task.load(export)
    return task


def _stage_folder(folder: Path) -> Path:
    """Return the stage's folder of a run folder, an export, or a stage's folder itself."""
    if folder.name == "export":
        return folder.parent
    if (folder / "export").is_dir():
        return folder
    inside = sorted(path.parent for path in folder.glob("*/export"))
    if len(inside) != 1:
        raise ConfigError(f"{folder} holds no finished run of a method: name the folder of one.")
    return inside[0]
