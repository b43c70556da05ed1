"""The schema of a build file: the backend of each step, what targets should show, and the filters for pairs.

    references: {backend: files, source: photos}   # or `world`
    captioner: endpoint                            # a backend by its name in the registry, with its settings beside it
    generator: {backend: diffusers, model: owner/name}
    filters: {similarity: [0.5, 0.97]}

`key.key=value` on the command line replaces a value. An unknown key raises ConfigError with one sentence.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from data_synth.filters import FilterSettings
from data_synth.targets import TargetSettings
from imagine.errors import ConfigError
from imagine.settings import read_settings, read_value, validated

Model = TypeVar("Model", bound=BaseModel)

_KINDS = ("references", "captioner", "rewriter", "generator", "refiner", "measurer")  # of backends


def _expand_name(value: Any) -> Any:
    """Expand the short form of a backend: its name alone, without settings."""
    return {"backend": value} if isinstance(value, str) else value


class BackendChoice(BaseModel):
    """A backend: its name in the registry or "package.module:Class", and the backend's own settings beside it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    backend: str

    @property
    def settings(self) -> dict[str, Any]:
        """The settings, which the backend's own model validates."""
        return dict(self.model_extra or {})


BackendField = Annotated[BackendChoice, BeforeValidator(_expand_name)]
HomePath = Annotated[Path, AfterValidator(Path.expanduser)]  # a shell does not expand ~ inside a file


class StageResources(BaseModel):
    """The share of a Ray cluster that some steps get."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concurrency: int = Field(default=1, ge=1)  # copies of the steps' models
    num_gpus: float = Field(default=0, ge=0)  # of each copy
    num_cpus: float = Field(default=1, ge=0)


class Cluster(StageResources):
    """How a build with `--backend ray` distributes its steps; results do not depend on it.

    A step named in `steps` runs in its own workers. The other steps run together, in workers with all their models.
    """

    address: str | None = None  # of a running cluster; None: that of RAY_ADDRESS, or a new one on this machine
    window: int = Field(default=64, ge=1)  # chunks handed to Ray Data at a time
    steps: dict[Literal["import", "caption", "rewrite", "generate", "refine", "measure"], StageResources] = Field(
        default_factory=dict
    )

    def resources(self, step: str) -> StageResources | None:
        """Return the resources of `step` alone, or None if it runs together with others."""
        return {str(name): resources for name, resources in self.steps.items()}.get(step)


class BuildConfig(BaseModel):
    """The configuration of a build. The result depends on it and the photos, not on interruptions or executors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = "Synthetic pairs"
    licence: str = "not stated"  # of the pairs; the manifest lists those of photos and models
    seed: int = Field(default=0, ge=0)

    references: BackendField
    captioner: BackendField | None = None  # None: every reference has a caption
    rewriter: BackendField | None = None
    # None: pairs are mined from several photos of one person, without rewriting
    generator: BackendField | None = None
    refiner: BackendField | None = None
    measurer: BackendField

    targets_per_reference: int = Field(default=1, ge=1)
    targets: TargetSettings = TargetSettings()
    # without a generator: the number of other photos of the person that each photo is paired with
    mined_per_photo: int = Field(default=4, ge=1)
    keep_captions: bool = True  # run the captioner only on references without a caption
    attempts: int = Field(default=1, ge=1)  # maximum number of generated candidates per target
    # first: stop at the first attempt with a candidate that passes the filters
    # best: make all attempts and take the most similar candidate that passes
    choose: Literal["first", "best"] = "first"
    # maximum number of refinements, while the candidate is too unlike the reference
    rounds: int = Field(default=0, ge=0)
    filters: FilterSettings = FilterSettings()
    review: Literal["none", "optional", "required"] = "none"  # required: pairs without a decision are held back

    records_per_shard: int = Field(default=1000, ge=1)
    chunk: int = Field(default=32, ge=1)  # references processed together; a model's batch has at most their targets
    workers: int = Field(default=0, ge=0)  # worker processes; 0: everything runs in this process
    ray: Cluster = Cluster()
    work: HomePath | None = None  # a local folder for the store and the review; None: the output folder

    @model_validator(mode="after")
    def _check_combination(self) -> "BuildConfig":
        if self.generator is not None and self.rewriter is None:
            raise ValueError("a generator needs a rewriter: add one, such as grammar")
        if self.generator is None and (self.rewriter or self.refiner):
            raise ValueError("rewriter and refiner need a generator: add one, or remove rewriter and refiner")
        if self.rounds and self.refiner is None:
            raise ValueError(f"{self.rounds} rounds of refinement need a refiner: add one, or set rounds to 0")
        return self

    @property
    def facts(self) -> dict[str, Any]:
        """The values that results depend on, for the manifest; backends describe themselves there."""
        excluded = {"work", "workers", "ray", "chunk", *_KINDS}
        return self.model_dump(mode="json", exclude=excluded)

    @property
    def choices(self) -> dict[str, BackendChoice]:
        """The configured backend of each kind, in the order of the steps."""
        return {kind: choice for kind in _KINDS if (choice := getattr(self, kind)) is not None}


def load_config(path: Path, overrides: Sequence[str] = ()) -> BuildConfig:
    """Load the build file at `path` and apply `key.key=value` overrides. Raises ConfigError if either is wrong."""
    content = read_settings(path, "build", "keys such as `references:` and `generator:`")
    for text in overrides:
        _override(content, text)
    return validated(BuildConfig, content, str(path))


def _override(content: dict[str, Any], text: str) -> None:
    """Put one `key.key=value` into the file's content; expand a backend that is written as its name alone."""
    address, equals, value = text.partition("=")
    keys = address.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"The override {text!r} is not of the form key=value: write for example generator.drift=0.1.")
    node = content
    for key in keys[:-1]:
        inner = node.get(key) or {}
        inner = _expand_name(inner) if node is content and key in _KINDS else inner
        if not isinstance(inner, dict):
            raise ConfigError(f"The override {text!r} is wrong: {key} is a single value and has no keys.")
        node[key] = inner
        node = inner
    new_value = read_value(value, text)
    if len(keys) == 2 and keys[-1] == "backend" and node.get("backend") != new_value:
        node.clear()  # the settings of one backend do not apply to another
    node[keys[-1]] = new_value
