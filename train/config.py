"""What a run file may say: an ordered list of stages and the data settings they share, checked before anything starts.

    defaults: {precision: auto}            # fields that every stage takes unless it says otherwise
    data: {folder: runs/data}              # shared by the tasks
    trackers: [tensorboard]                # who else is told the numbers; [] for nobody
    stages:
      autoencoder: {task: autoencoder, train: {encoder: 2e-3, decoder: 2e-3}, images: 80_000}
      base: {task: base, start_from: [autoencoder], train: {unet: 1e-3}, images: 100_000, settings: {face_weight: 4.0}}

Progress is counted in images seen, so a stage's learning rate is a pure function of that number (`Stage.rate`).
A name that is not known is refused in one sentence with the valid ones.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from imagine.errors import ConfigError
from imagine.settings import listed, read_settings, read_value, unknown_name, validated

Model = TypeVar("Model", bound=BaseModel)

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _one_or_none(value: Any) -> Any:
    """A list may be written as its only entry, or as nothing."""
    return () if value is None else (value,) if isinstance(value, str) else value


class Stage(BaseModel):
    """One entry of a run file: what trains, from where, how fast and for how many images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str  # a name in train.stages.TASKS
    # earlier stages whose trained modules this one begins with; the last one wins
    start_from: Annotated[tuple[str, ...], BeforeValidator(_one_or_none)] = ()
    initial: Path | None = None  # a folder of weights to begin from; what `start_from` names comes on top of it
    fresh: tuple[str, ...] = ()  # modules that begin anew, whatever those two hold
    train: dict[str, Rate] = Field(min_length=1)  # part -> learning rate; every other part is frozen
    images: int = Field(ge=1)
    batch_size: int = Field(64, ge=1)  # images per optimiser step, over all pieces and processes
    accumulation: int = Field(1, ge=1)  # pieces that a batch is computed in
    warmup_images: int = Field(0, ge=0)
    schedule: Literal["cosine", "constant", "trapezoid"] = "trapezoid"
    decay: float = Field(0.2, ge=0, le=1)  # trapezoid: the last share of the images, over which the rate falls to 0
    weight_decay: float = Field(0.01, ge=0)  # matrices and kernels only; gains, biases and scalars do not decay
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    optimiser: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit keeps its moments in bytes, through bitsandbytes
    muon: tuple[str, ...] = ()  # parts whose matrices are trained with Muon; everything else with AdamW
    clip: float = Field(1.0, ge=0)  # largest gradient norm; 0: never clip
    ema: float = Field(0, ge=0)  # half-life of the weights' average, in images; 0: no average
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: the faster of the two, measured on this device
    channels_last: bool = False
    compile: bool = False
    seed: int = 0
    prefetch: int = Field(0, ge=0)  # batches made ahead in a thread; worth it where the device is not the CPU
    validate_every: int = Field(0, ge=0)  # images; 0: only at the end
    best_by: str = ""  # the validation number that chooses what best.safetensors holds; "": there is none
    best_is: Literal["lowest", "highest"] = "lowest"
    checkpoint_every_seconds: float = Field(300, ge=0)  # 0: after every step
    report_every_seconds: float = Field(10, ge=0)  # 0: after every step
    keep: int = Field(2, ge=1)  # checkpoints kept, beside the one before the rate falls
    settings: dict[str, Any] = Field(default_factory=dict)  # the task's own, checked by its own model

    @model_validator(mode="after")
    def _fits_together(self) -> "Stage":
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} does not divide into {self.accumulation} pieces")
        for part in self.muon:
            if part not in self.train:
                raise ValueError(f"muon: {unknown_name('part in train', part, list(self.train))}")
        if self.optimiser == "adamw8bit" and (self.muon or self.channels_last):
            other = "muon" if self.muon else "channels_last"
            raise ValueError(f"optimiser adamw8bit does not go together with {other}; leave one of them out")
        return self

    @property
    def decay_start(self) -> int:
        """Images seen up to which the learning rate does not depend on `images`."""
        if self.schedule == "constant":
            return self.images
        return int(self.images * (1 - self.decay)) if self.schedule == "trapezoid" else 0

    def rate(self, images_seen: int) -> float:
        """Factor on every learning rate for the step that begins at `images_seen`, 0 to 1, and of nothing else."""
        warm = min(1.0, (images_seen + self.batch_size) / self.warmup_images) if self.warmup_images else 1.0
        if self.schedule == "constant":
            return warm
        if self.schedule == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, images_seen / self.images)))
        falling = self.images - self.decay_start
        return warm * min(1.0, max(0.0, (self.images - images_seen) / falling)) if falling else warm


class Run(BaseModel):
    """A whole run: stages in order, and what they share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: dict[str, Any] = Field(default_factory=dict)
    # told the numbers beside metrics.jsonl
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_one_or_none)] = ("tensorboard",)
    stages: dict[str, Stage] = Field(min_length=1)

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> "Run":
        earlier: list[str] = []
        for name, stage in self.stages.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"stage name {name!r} is not a plain word (letters, digits, - and _)")
            for source in stage.start_from:
                if source not in earlier:
                    raise ValueError(f"stage {name} starts from {source!r}; the stages before it: {listed(earlier)}")
            earlier.append(name)
        return self


def load_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """The run file at `path` with `stage.key=value` overrides put in; ConfigError says what is wrong."""
    content = read_settings(path, "run", "`stages:` and, if wanted, `data:` and `defaults:`")
    known = ["defaults", *Run.model_fields]
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise ConfigError(f"{path}: {unknown_name('key', unknown[0], known)}.")
    stages = content.get("stages")
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise ConfigError(f"{path}: write `stages:` followed by one `name: {{task: ..., ...}}` per stage.")
    for text in overrides:
        _override(content, text)
    defaults = content.get("defaults") or {}
    merged = {str(name): {**defaults, **stage} for name, stage in stages.items()}
    for name, stage in merged.items():
        merged[name] = validated(Stage, stage, f"stage {name}").model_dump()
    shared = {"trackers": content["trackers"]} if "trackers" in content else {}
    return validated(Run, {"data": content.get("data") or {}, "stages": merged, **shared}, str(path))


def _override(content: dict[str, Any], text: str) -> None:
    """Put one `stage.key=value` (or `data.key=value`, `defaults.key=value`, `trackers=...`) into the file's content."""
    address, equals, value = text.partition("=")
    keys = address.split(".")
    if not equals or not all(keys) or (len(keys) < 2 and keys != ["trackers"]):
        raise ConfigError(f"The override {text!r} is not of the form stage.key=value, for example base.images=1000.")
    stages = content["stages"]
    if keys[0] in stages:
        place = stages[keys[0]]
    elif keys[0] in ("data", "defaults"):
        place = content[keys[0]] = content.get(keys[0]) or {}
    elif keys == ["trackers"]:
        place = content
    else:
        raise ConfigError(f"override {text}: {unknown_name('stage', keys[0], [*stages, 'data', 'defaults'])}.")
    for key in keys[1:-1]:
        if not isinstance(place.setdefault(key, {}), dict):
            raise ConfigError(f"override {text}: {key} is a single value and holds no keys.")
        place = place[key]
    place[keys[-1]] = read_value(value, text)
