"""What a build file may say: which backends do which step, what targets should show, and what makes a pair good enough.

    references: {backend: files, source: photos}   # or `world`
    captioner: endpoint                            # each backend by its name (registry.py), its settings beside it
    generator: {backend: diffusers, model: owner/name}
    filters: {similarity: [0.5, 0.97]}

`key.key=value` on the command line replaces a value. A name that is not known is refused in one sentence.
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
    """A backend without settings may be written as its name alone."""
    return {"backend": value} if isinstance(value, str) else value


class BackendChoice(BaseModel):
    """One backend: its name in the registry, or "package.module:Class", and beside it the backend's own settings."""

    model_config = ConfigDict(frozen=True, extra="allow")

    backend: str

    @property
    def settings(self) -> dict[str, Any]:
        """What the backend's own model checks."""
        return dict(self.model_extra or {})


BackendField = Annotated[BackendChoice, BeforeValidator(_expand_name)]
HomePath = Annotated[Path, AfterValidator(Path.expanduser)]  # no shell has seen the ~ in a file


class StageResources(BaseModel):
    """What of a Ray cluster some steps get."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concurrency: int = Field(default=1, ge=1)  # copies of their models
    num_gpus: float = Field(default=0, ge=0)  # of each copy
    num_cpus: float = Field(default=1, ge=0)


class Cluster(StageResources):
    """How steps are spread when a build runs with `--backend ray`; results do not depend on it.

    Steps that are named in `steps` have copies of their own; the others run together, in copies that hold all of them.
    """

    address: str | None = None  # of a running cluster; None: the one that RAY_ADDRESS names, or one on this machine
    window: int = Field(default=64, ge=1)  # chunks handed to Ray Data at a time
    steps: dict[Literal["import", "caption", "rewrite", "generate", "refine", "measure"], StageResources] = Field(
        default_factory=dict
    )

    def resources(self, step: str) -> StageResources | None:
        """What `step` has for itself; None if it runs together with others."""
        return {str(name): resources for name, resources in self.steps.items()}.get(step)


class BuildConfig(BaseModel):
    """A whole build. What it makes follows from this and from the photos, whatever is killed or spread on the way."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = "Synthetic pairs"
    licence: str = "not stated"  # of the pairs; those of photos and models are in the manifest
    seed: int = Field(default=0, ge=0)

    references: BackendField
    captioner: BackendField | None = None  # None: every reference brings its caption
    rewriter: BackendField | None = None
    generator: BackendField | None = (
        None  # None: pairs are mined from several photos of one person, and nothing is rewritten
    )
    refiner: BackendField | None = None
    measurer: BackendField

    targets_per_reference: int = Field(default=1, ge=1)
    targets: TargetSettings = TargetSettings()
    mined_per_photo: int = Field(
        default=4, ge=1
    )  # without a generator: how many photos of the person each is paired with
    keep_captions: bool = True  # the captioner is asked only where a reference brings no caption
    attempts: int = Field(default=1, ge=1)  # candidates for a target: as many are made at most
    # first: another candidate only while none passes the filters; best: all attempts, and the most similar that passes
    choose: Literal["first", "best"] = "first"
    rounds: int = Field(default=0, ge=0)  # refinements of a candidate, while it is too unlike the reference
    filters: FilterSettings = FilterSettings()
    review: Literal["none", "optional", "required"] = "none"  # required: pairs that nobody decided on are held back

    records_per_shard: int = Field(default=1000, ge=1)
    chunk: int = Field(default=32, ge=1)  # references worked on together; models see batches of at most their targets
    workers: int = Field(default=0, ge=0)  # processes beside this one; 0: everything happens in this one
    ray: Cluster = Cluster()
    work: HomePath | None = None  # a local folder for the store and the review; None: the output folder

    @model_validator(mode="after")
    def _check_combination(self) -> "BuildConfig":
        if self.generator is not None and self.rewriter is None:
            raise ValueError("a generator needs a rewriter: name one, such as grammar")
        if self.generator is None and (self.rewriter or self.refiner):
            raise ValueError("without a generator nothing is rewritten or refined: leave rewriter and refiner out")
        if self.rounds and self.refiner is None:
            raise ValueError(f"{self.rounds} rounds of refinement need a refiner: name one, or set rounds to 0")
        return self

    @property
    def facts(self) -> dict[str, Any]:
        """What results depend on, for a manifest; backends say it of themselves."""
        excluded = {"work", "workers", "ray", "chunk", *_KINDS}
        return self.model_dump(mode="json", exclude=excluded)

    @property
    def choices(self) -> dict[str, BackendChoice]:
        """The chosen backend of each kind, in the order of the work."""
        return {kind: choice for kind in _KINDS if (choice := getattr(self, kind)) is not None}


def load_config(path: Path, overrides: Sequence[str] = ()) -> BuildConfig:
    """The build file at `path` with `key.key=value` overrides put in; ConfigError says what is wrong."""
    content = read_settings(path, "build", "keys such as `references:` and `generator:`")
    for text in overrides:
        _override(content, text)
    return validated(BuildConfig, content, str(path))


def _override(content: dict[str, Any], text: str) -> None:
    """Put one `key.key=value` into the file's content; a backend written as its name alone is opened up for it."""
    address, equals, value = text.partition("=")
    keys = address.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"The override {text!r} is not of the form key=value, for example generator.drift=0.1.")
    node = content
    for key in keys[:-1]:
        inner = node.get(key) or {}
        inner = _expand_name(inner) if node is content and key in _KINDS else inner
        if not isinstance(inner, dict):
            raise ConfigError(f"override {text}: {key} is a single value and holds no keys.")
        node[key] = inner
        node = inner
    new_value = read_value(value, text)
    if len(keys) == 2 and keys[-1] == "backend" and node.get("backend") != new_value:
        node.clear()  # one backend's settings say nothing to another
    node[keys[-1]] = new_value
