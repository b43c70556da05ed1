"""Train and judge the arms of an ablation: `python -m train.ablation configs/ablation/arms.yaml --output
runs/ablation`.

Each arm changes one thing in a recipe, and is trained with several seeds, assembled to weights, and judged on held-out
people. A command that was stopped carries on: finished stages, pictures and judged arms are not computed again.

    DIR/shared/STAGE                 the stages that all arms share
    DIR/ARM-SEED/                    the arm's run, its weights/ and its evaluation/
    DIR/ablation.json, ablation.md   the table: differences to the full recipe, with intervals, beside the paper's

Intervals are 95 %, from a bootstrap over people: the differences are taken per person first, so that easy and difficult
people do not widen them. Exit codes as for `python -m train`.
"""

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from imagine.errors import ConfigError, ImagineError
from imagine.paths import folder_to_fill
from imagine.settings import read_settings, unknown_name, validated
from train.config import Run, load_run
from train.run.checkpoint import replacing, write_json
from train.run.console import configure_logging

log = logging.getLogger("train")
DONE, WRONG, STOPPED = 0, 2, 3
FULL = "full"
MEASURES = {"prompt": "prompt", "identity": "sim_gt"}  # the paper's question -> the judge's metric of each picture
SHOWN = ("prompt", "sim_gt", "copy_paste", "rank1")
_RESAMPLES = 2_000


Arms = TypeVar("Arms", bound="Ablation")


class Arm(BaseModel):
    """What an arm changes, and the paper's difference to its full recipe in points, where it has the arm.

    A name in `set` that begins with a stage of the recipe changes that stage, `data.` the data, and any other name all
    stages of the arm.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    stages: tuple[str, ...] | None = None  # None: the ablation's
    set: dict[str, Any] = Field(default_factory=dict)
    paper: dict[str, float] = Field(default_factory=dict)


class Ablation(BaseModel):
    """An ablation: the recipe, its stages, the seeds, the arms, and how they are judged."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    recipe: Path
    shared: tuple[str, ...] = ()
    stages: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1)
    identities: Annotated[int, Field(ge=2)] = 51
    prompts: Annotated[int, Field(ge=1)] = 13
    options: dict[str, Any] = Field(default_factory=dict)  # of every call that draws
    set: dict[str, Any] = Field(default_factory=dict)  # what all arms change in the recipe, `full` included
    arms: dict[str, Arm]

    @model_validator(mode="after")
    def _has_full(self) -> "Ablation":
        if FULL not in self.arms or self.arms[FULL].set:
            raise ValueError(f"the arms must include {FULL}, which changes nothing")
        return self

    def own_stages(self, arm: str) -> tuple[str, ...]:
        """Return the stages that this arm trains itself."""
        return self.arms[arm].stages or self.stages


def load_ablation(path: Path) -> Ablation:
    """Load the arms' file; ConfigError says what is wrong. The recipe is named relative to the file."""
    return load_arms(path, Ablation)


def load_arms(path: Path, kind: type[Arms]) -> Arms:
    """Load a file of arms, as `load_ablation` does."""
    content = read_settings(path, "ablation", "`recipe:`, `stages:` and `arms:`")
    found = validated(kind, content, str(path))
    return found.model_copy(update={"recipe": path.parent / found.recipe})


def arm_run(ablation: Ablation, name: str, seed: int, overrides: Sequence[str] = ()) -> Run:
    """Return the run of an arm: the shared stages, and its own with its changes and the seed."""
    arm, stages = ablation.arms[name], ablation.own_stages(name)
    known = load_run(ablation.recipe).stages
    for stage in (*ablation.shared, *stages):
        if stage not in known:
            raise ConfigError(f"arm {name}: {unknown_name('stage', stage, list(known))}.")
    lines = []
    for key, value in {**ablation.set, **arm.set}.items():
        text = yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()
        everywhere = key.split(".")[0] not in ("data", *known)
        places = [f"{stage}." for stage in stages] if everywhere else [""]
        lines += [f"{place}{key}={text}" for place in places]
    lines += [f"{stage}.seed={seed}" for stage in stages]
    run = load_run(ablation.recipe, [*lines, *overrides])
    chosen = {stage: run.stages[stage] for stage in (*ablation.shared, *stages)}
    return run.model_copy(update={"stages": chosen})


def run_ablation(
    ablation: Ablation,
    output: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    max_minutes: float | None = None,
    tasks: Mapping[str, Any] | None = None,
) -> bool:
    """Train, assemble and judge these arms, and write the table; return False if it was stopped before the end."""
    import time

    from train.stages import TASKS, run_stages

    chosen = TASKS if tasks is None else tasks
    ends = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def trained(run: Run, folder: Path, only: Sequence[str]) -> bool:
        left = None if ends is None else max(0.0, (ends - time.monotonic()) / 60)
        return run_stages(run, folder, only=only, max_minutes=left, tasks=chosen)

    if ablation.shared and not trained(arm_run(ablation, FULL, 0, overrides), output / "shared", ablation.shared):
        return False
    todo = [(name, seed) for seed in seeds for name in arms]
    for number, (name, seed) in enumerate(todo, 1):
        log.info("arm %d of %d: %s, seed %d", number, len(todo), name, seed)
        run, folder = arm_run(ablation, name, seed, overrides), output / f"{name}-{seed}"
        link_shared(ablation, name, run, output / "shared", folder)
        own = ablation.own_stages(name)
        if not trained(run, folder, own):
            return False
        judge_arm(ablation, run, folder, own[-1])
        write_table(ablation, output)
    return True


def link_shared(ablation: Ablation, arm: str, run: Run, shared: Path, folder: Path) -> None:
    """Give an arm's run the shared stages that it does not train itself, as links to their files."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "run.yaml").exists():  # a folder with stages but no run is refused
        with replacing(folder / "run.yaml") as draft:
            draft.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    for stage in ablation.shared:
        if stage in ablation.own_stages(arm):
            continue
        place = folder / stage
        if not place.exists():
            draft_folder = folder / f".{stage}.draft"
            shutil.rmtree(draft_folder, ignore_errors=True)
            shutil.copytree(shared / stage, draft_folder, copy_function=_link_or_copy)
            os.replace(draft_folder, place)


def _link_or_copy(source: str, place: str) -> None:
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)


def judge_arm(ablation: Ablation, run: Run, folder: Path, stage: str, judge: Path | None = None) -> None:
    """Assemble the arm's weights and judge them on held-out people, unless that is done.

    The judge is that of the weights in the folder `judge` or, without it, of the stage's initial weights.
    """
    if (folder / "evaluation" / "report.json").exists():
        return
    from imagine.evaluation import evaluate
    from imagine.evaluation.judge import Judge
    from imagine.pipeline.pipeline import ImaginePipeline
    from train.assemble import assemble

    initial = run.stages[stage].initial
    judge = judge or initial
    if judge is None:
        raise ConfigError(
            f"Stage {stage} of the ablation's recipe has no initial weights, whose judge is needed: set its "
            "`initial` to a folder of weights with a judge."
        )
    assemble(folder, folder / "weights", initial=initial, stage=stage)
    pipe: Any = ImaginePipeline.from_pretrained(folder / "weights")
    settings = run.stages[stage].settings
    absent = [branch for branch in ("clip", "t5", "byt5") if settings.get(f"drop_{branch}") == 1]
    evaluate.run(
        WithoutBranches(pipe, absent) if absent else pipe, folder / "evaluation", "portraits", ablation.identities,
        ablation.prompts, judge=Judge.from_pretrained(judge / "judge"), rows=("full",), options=ablation.options,
        progress=_progress,
    )  # fmt: skip


def _progress(stage: str, done: int, total: int) -> None:
    if total and (done == total or done % 64 == 0):
        log.info("%s: %d of %d", stage, done, total)


class WithoutBranches:
    """A pipeline whose named text encoders read an empty sentence, as they did while the adapter was trained."""

    def __init__(self, pipeline: Any, absent: Sequence[str]) -> None:
        self.pipeline, self.absent = pipeline, list(absent)
        self.adapter, self.components = pipeline.adapter, pipeline.components
        self.config = {**pipeline.config, "default_absent": list(absent)}
        self.enroll = pipeline.enroll
        self.set_progress_bar_config = pipeline.set_progress_bar_config

    def __call__(self, prompts: Sequence[str], **options: Any) -> Any:
        """Draw as the pipeline does."""
        from imagine.records import take

        clip, branches = self.pipeline.encode_prompt(list(prompts))
        empty_clip, empty = self.pipeline.encode_prompt("")
        first = [0] * len(prompts)
        if "clip" in self.absent:
            clip = take(empty_clip, first)
        read = {name: take(empty[name], first) if name in self.absent else each for name, each in branches.items()}
        return self.pipeline(prompt_embeds=(clip, read), **options)


# --- the table --------------------------------------------------------------------------------------------------------
def people_scores(folder: Path) -> dict[str, list[float]]:
    """Return the mean score per person of a judged arm, by metric, from its pictures.jsonl."""
    sums: dict[str, dict[int, list[float]]] = {}
    for line in (folder / "evaluation" / "pictures.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["row"] == FULL:
            for name in SHOWN:
                if isinstance(row.get(name), (int, float)):
                    sums.setdefault(name, {}).setdefault(int(row["identity"]), []).append(float(row[name]))
    return {name: [sum(values) / len(values) for _, values in sorted(people.items())] for name, people in sums.items()}


def difference(arm: Sequence[Sequence[float]], full: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the mean difference of two arms over people, and its 95 % interval; each is (seeds, people)."""
    import torch

    gap = torch.tensor(arm).mean(0) - torch.tensor(full).mean(0)
    draws = torch.randint(len(gap), (_RESAMPLES, len(gap)), generator=torch.Generator().manual_seed(0))
    means = gap[draws].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return {"value": float(gap.mean()), "low": low, "high": high}


def table(ablation: Ablation, output: Path) -> list[dict[str, Any]]:
    """Return one row per judged arm: its means, and its differences to the full recipe."""
    judged = {name: list(_judged(output, name, ablation.seeds)) for name in ablation.arms}
    full, rows = judged[FULL], []
    for name, runs in judged.items():
        if not runs:
            continue
        row: dict[str, Any] = {"arm": name, "seeds": len(runs), "paper": ablation.arms[name].paper}
        for metric in SHOWN:
            values = [each[metric] for each in runs if metric in each]
            others = [each[metric] for each in full if metric in each]
            if values:
                row[metric] = {"mean": sum(map(sum, values)) / sum(map(len, values))}
            if values and others and name != FULL:
                row[metric] |= difference(values, others)
        row["signs"] = _signs(row)
        rows.append(row)
    return rows


def _judged(output: Path, name: str, seeds: Sequence[int]) -> Iterator[dict[str, list[float]]]:
    for seed in seeds:
        if (output / f"{name}-{seed}" / "evaluation" / "report.json").exists():
            yield people_scores(output / f"{name}-{seed}")


def _signs(row: Mapping[str, Any]) -> dict[str, str]:
    """Return for each of the paper's questions whether our difference has its sign, or its interval holds zero."""
    found = {}
    for question, paper in row["paper"].items():
        ours = row.get(MEASURES.get(question, ""), {})
        if "value" not in ours:
            continue
        clear = ours["low"] > 0 or ours["high"] < 0
        agrees = (ours["value"] > 0) == (paper > 0)
        found[question] = "not clear" if not clear else "agrees" if agrees else "differs"
    return found


def write_table(ablation: Ablation, output: Path) -> None:
    """Write ablation.json and ablation.md."""
    rows = table(ablation, output)
    write_json(output / "ablation.json", {"rows": rows})
    lines = [
        "| arm | seeds | prompt | likeness (SimGT) | copy-paste | paper: prompt, identity | signs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        paper = ", ".join(f"{row['paper'][name]:+.1f}" for name in MEASURES if name in row["paper"])
        signs = ", ".join(f"{name} {value}" for name, value in row["signs"].items())
        cells = [
            row["arm"],
            str(row["seeds"]),
            *(_cell(row.get(name)) for name in SHOWN[:3]),
            paper or "-",
            signs or "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    with replacing(output / "ablation.md") as draft:
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(value: Mapping[str, float] | None) -> str:
    if value is None:
        return "-"
    if "value" not in value:
        return f"{value['mean']:.3f}"
    return f"{value['mean']:.3f} ({value['value']:+.3f}, {value['low']:+.3f} to {value['high']:+.3f})"


# --- the command ------------------------------------------------------------------------------------------------------
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = command_line(
        "python -m train.ablation",
        "Train and judge the arms of an ablation. The same command carries on with one that was stopped.",
    ).parse_intermixed_args(arguments)
    return run_command(options, Ablation, _describe, run_ablation)


def command_line(command: str, description: str) -> argparse.ArgumentParser:
    """Return the command line of a program that trains and judges arms."""
    made = argparse.ArgumentParser(prog=command, description=description)
    example = f"configs/{command.rpartition('.')[2]}/arms.yaml"
    made.add_argument("config", type=Path, metavar="ARMS.yaml", help=f"the arms, such as {example}")
    made.add_argument("overrides", nargs="*", metavar="stage.key=value", help="replace a value of the recipe")
    made.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder of the results")
    made.add_argument("--arms", default="", metavar="ARM[,ARM]", help="train and judge only these arms")
    made.add_argument("--seeds", default="", metavar="N[,N]", help="use these seeds instead of the file's")
    made.add_argument("--dry-run", action="store_true", help="print what would be trained and judged")
    made.add_argument("--max-minutes", type=float, metavar="M", help="stop training cleanly after M minutes")
    return made


def run_command(
    options: argparse.Namespace,
    kind: type[Arms],
    describe: Callable[[Arms, Sequence[str], Sequence[int], Sequence[str]], None],
    run: Callable[[Arms, Path, Sequence[str], Sequence[int], Sequence[str], float | None], bool],
) -> int:
    """Do what a command line of `command_line` asks for and return the exit code; wrong input is one sentence.

    `describe` prints what `--dry-run` asks for. `run` trains and judges, and returns False if it was stopped.
    """
    configure_logging()
    try:
        loaded = load_arms(options.config, kind)
        arms = [name for name in options.arms.split(",") if name] or list(loaded.arms)
        for name in arms:
            if name not in loaded.arms:
                raise ConfigError(f"--arms: {unknown_name('arm', name, list(loaded.arms))}.")
        seeds = _seeds(options.seeds) or list(loaded.seeds)
        if options.dry_run:
            describe(loaded, arms, seeds, options.overrides)
            return DONE
        finished = run(loaded, folder_to_fill(options.output), arms, seeds, options.overrides, options.max_minutes)
    except ImagineError as error:
        sys.stderr.write(f"{error}\n")
        return WRONG
    return DONE if finished else STOPPED


def _seeds(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",") if each]
    except ValueError:
        raise ConfigError(f"--seeds {text} must be whole numbers, separated by commas.") from None


def _describe(ablation: Ablation, arms: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]) -> None:
    total = 0
    for name in arms:
        run = arm_run(ablation, name, seeds[0], overrides)
        own = {stage: run.stages[stage].images for stage in ablation.own_stages(name)}
        total += sum(own.values()) * len(seeds)
        sys.stdout.write(f"{name:24} {sum(own.values()):>8,} images in {len(own)} stages x {len(seeds)} seeds\n")
    shared = sum(load_run(ablation.recipe, overrides).stages[stage].images for stage in ablation.shared)
    pictures = len(arms) * len(seeds) * ablation.identities * ablation.prompts
    sys.stdout.write(f"shared stages: {shared:,} images; arms: {total:,} images; pictures to judge: {pictures:,}\n")


if __name__ == "__main__":
    sys.exit(main())
