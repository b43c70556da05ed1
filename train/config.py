"""The format of a run file: an ordered list of stages and the data settings they share, checked before anything starts.

    defaults: {precision: auto}            # default values of the stages' settings
    data: {folder: runs/data}              # data settings, shared by all stages
    trackers: [tensorboard]                # experiment trackers beside metrics.jsonl; [] for none
    stages:
      autoencoder: {task: autoencoder, train: {encoder: 2e-3, decoder: 2e-3}, images: 80_000}
      base: {task: base, start_from: [autoencoder], train: {unet: 1e-3}, images: 100_000, settings: {face_weight: 4.0}}

Progress is counted in images seen; a stage's learning rate is a pure function of that number (`Stage.rate`).
An unknown name raises ConfigError with one sentence that lists the valid names.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from imagine.errors import ConfigError
from imagine.settings import listed, read_settings, read_value, unknown_name, validated

Model = TypeVar("Model", bound=BaseModel)

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _one_or_none(value: Any) -> Any:
    """Turn a single string into a list of one entry, and None into an empty list."""
    return () if value is None else (value,) if isinstance(value, str) else value


class Stage(BaseModel):
    """One stage of a run file: its task, its initial weights, the trained parts and how they are trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str  # what is trained: a name in train.stages.TASKS
    # earlier stages whose trained modules are the initial weights; where several trained a module, the last one counts
    start_from: Annotated[tuple[str, ...], BeforeValidator(_one_or_none)] = ()
    initial: Path | None = None  # a folder of initial weights; the modules of `start_from` are loaded after it
    # modules, or patterns of tensors such as unet.conv_in.*, that start from random weights although `initial` or
    # `start_from` holds them
    fresh: tuple[str, ...] = ()
    train: dict[str, Rate] = Field(min_length=1)  # part -> learning rate; every other part is frozen
    images: int = Field(ge=1)  # images to train on, counted with repetitions
    batch_size: int = Field(64, ge=1)  # images per optimiser step, over all micro-batches and processes
    accumulation: int = Field(1, ge=1)  # micro-batches per optimiser step in each process (gradient accumulation)
    warmup_images: int = Field(0, ge=0)  # images over which the learning rate rises linearly from 0; 0: no warm-up
    schedule: Literal["cosine", "constant", "trapezoid"] = "trapezoid"  # shape of the learning rate after the warm-up
    decay: float = Field(0.2, ge=0, le=1)  # trapezoid: the last share of the images, over which the rate falls to 0
    weight_decay: float = Field(0.01, ge=0)  # for matrices and kernels only; gains, biases and scalars do not decay
    betas: tuple[Beta, Beta] = (0.9, 0.99)  # AdamW's decay rates of the first and second moments
    optimiser: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit: moments in 8 bits, through bitsandbytes
    muon: tuple[str, ...] = ()  # parts whose matrices are trained with Muon; everything else is trained with AdamW
    clip: float = Field(1.0, ge=0)  # largest norm of the gradient; 0: no clipping
    ema: float = Field(0, ge=0)  # half-life of the weights' moving average, in images; 0: no average
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: the faster of the two, measured on this device
    channels_last: bool = False  # channels-last memory format for all modules
    # compile all modules with torch.compile; auto: unless that needs a C++ compiler, as on a CPU, and there is none
    compile: bool | Literal["auto"] = False
    seed: int = 0  # seed of the stage's random numbers, combined with the stage's name
    prefetch: int = Field(0, ge=0)  # batches prepared ahead in a thread; useful if the device is not the CPU
    validate_every: int = Field(0, ge=0)  # images between validations; 0: validate only at the end
    best_by: str = ""  # the validation number that selects the weights in best.safetensors; "": no such file
    best_is: Literal["lowest", "highest"] = "lowest"  # which value of `best_by` is the best
    # validation number -> the least value at the end of this stage; without it no later stage starts from this one
    gates: dict[str, float] = Field(default_factory=dict)
    checkpoint_every_seconds: float = Field(300, ge=0)  # time between checkpoints; 0: after every step
    report_every_seconds: float = Field(10, ge=0)  # time between rows of metrics.jsonl; 0: after every step
    keep: int = Field(2, ge=1)  # newest checkpoints to keep; the one before the rate falls is always kept
    settings: dict[str, Any] = Field(default_factory=dict)  # the task's own settings, checked by the task's model

    @model_validator(mode="after")
    def _fits_together(self) -> "Stage":
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {self.accumulation} micro-batches (accumulation); "
                "change one of the two"
            )
        for part in self.muon:
            if part not in self.train:
                raise ValueError(f"muon: {unknown_name('part in train', part, list(self.train))}")
        if self.optimiser == "adamw8bit" and (self.muon or self.channels_last):
            other = "muon" if self.muon else "channels_last"
            raise ValueError(f"optimiser adamw8bit cannot be combined with {other}; leave one of them out")
        return self

    @property
    def decay_start(self) -> int:
        """Number of images seen up to which the learning rate does not depend on `images`."""
        if self.schedule == "constant":
            return self.images
        return int(self.images * (1 - self.decay)) if self.schedule == "trapezoid" else 0

    def rate(self, images_seen: int) -> float:
        """Return the factor (0 to 1) on every learning rate for the step that starts at `images_seen`."""
        warm = min(1.0, (images_seen + self.batch_size) / self.warmup_images) if self.warmup_images else 1.0
        if self.schedule == "constant":
            return warm
        if self.schedule == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, images_seen / self.images)))
        falling = self.images - self.decay_start
        return warm * min(1.0, max(0.0, (self.images - images_seen) / falling)) if falling else warm


class Run(BaseModel):
    """A whole run: the stages in order, and the settings they share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: dict[str, Any] = Field(default_factory=dict)  # data settings: train.data.portraits.DataSettings
    # experiment trackers that receive the numbers and pictures, beside metrics.jsonl
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_one_or_none)] = ("tensorboard",)
    stages: dict[str, Stage] = Field(min_length=1)  # stage name -> stage, trained in this order

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> "Run":
        earlier: list[str] = []
        for name, stage in self.stages.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"stage name {name!r} is not valid; use letters, digits, - and _ only")
            for source in stage.start_from:
                if source not in earlier:
                    raise ValueError(
                        f"stage {name} starts from {source!r}, which is not an earlier stage; "
                        f"the stages before it: {listed(earlier)}"
                    )
            earlier.append(name)
        return self


def load_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Load the run file at `path` and apply the `stage.key=value` overrides; ConfigError says what is wrong."""
    content = read_settings(path, "run", "`stages:` and, if wanted, `data:` and `defaults:`")
    known = ["defaults", *Run.model_fields]
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise ConfigError(f"{path}: {unknown_name('key', unknown[0], known)}.")
    stages = content.get("stages")
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise ConfigError(
            f"{path}: `stages` must map names to settings; write one `name: {{task: ..., ...}}` per stage."
        )
    _check_mappings(content, path)
    for text in overrides:
        _override(content, text)
    _check_mappings(content, path)
    defaults = content.get("defaults") or {}
    merged = {str(name): {**defaults, **stage} for name, stage in stages.items()}
    for name, stage in merged.items():
        merged[name] = validated(Stage, stage, f"stage {name}").model_dump()
    shared = {"trackers": content["trackers"]} if "trackers" in content else {}
    return validated(Run, {"data": content.get("data") or {}, "stages": merged, **shared}, str(path))


def _check_mappings(content: Mapping[str, Any], path: Path) -> None:
    for key in ("defaults", "data"):
        if not isinstance(content.get(key) or {}, dict):
            raise ConfigError(
                f"{path}: `{key}` must map names to values, not be {content[key]!r}; write `{key}: {{}}`."
            )


def _override(content: dict[str, Any], text: str) -> None:
    """Apply one override (`stage.key=value`, `data.key=value`, `defaults.key=value` or `trackers=...`) to `content`."""
    address, equals, value = text.partition("=")
    keys = address.split(".")
    if not equals or not all(keys) or (len(keys) < 2 and keys != ["trackers"]):
        raise ConfigError(f"The override {text!r} is not valid. Write stage.key=value, for example base.images=1000.")
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
            raise ConfigError(f"override {text}: {key} is a single value and has no keys below it; write {key}=value.")
        place = place[key]
    place[keys[-1]] = read_value(value, text)
