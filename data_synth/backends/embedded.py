"""Backends of the portrait world, whose exact ground truth makes the results of a build verifiable.

    WorldPeople       references: one photo per person
    GrammarCaptioner  captioner: the dense captions of those photos, from the world's grammar
    GrammarRewriter   rewriter: dense captions of the same people as the targets should show them
    Renderer          generator: targets that match their specification, of a slightly drifted person
    Truth             measurer: the measures that follow from the renderer's ground truth

Because the renderer reports how far a person drifted, the identity errors of its pairs are known. All results depend on
seeds only, so each item is the same in any batch.
"""

import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from data_synth.backends.contracts import Draft, Failed, Target
from data_synth.backends.local_models import identity_of
from data_synth.backends.measuring import attribute_difference, picture_hash
from data_synth.records import Candidate, Measures, Reference, TargetSpec
from imagine.errors import ConfigError
from imagine.world import Contexts, People, attributes, captions, render, sample_contexts, sample_people
from imagine.world.contexts import attribute_indices
from imagine.world.people import CONTINUOUS, drift
from imagine.world.render import Painters, compiled_painters
from imagine.world.seeds import DEMO, HELD_OUT, JUDGE, TRAIN
from imagine.world.vocabulary import ATTRIBUTES, CLOTHES, FRAMINGS, STYLES

RANGES = {"train": TRAIN, "judge": JUDGE, "held_out": HELD_OUT, "demo": DEMO}
LICENCE = "Apache-2.0"
VERSION = 1
NOT_WORLD_PERSON = "not a person of the portrait world"

_BATCH = 16  # pictures per batch, fixed because compiled painters accept no other number
_STRIDE = 7_368_787  # a prime: spreads the people over the range of seeds and selects each only once
_STRANGER_DISTANCE = 0.373  # root mean square distance between the continuous traits of two people
# Values that clearly count as turned: angles in radians, and gaze as a share.
_TURNS = {"yaw": 0.49, "pitch": 0.3, "roll": 0.26, "gaze": 0.9}
_CLOTHES_WITH_LETTERS = ("t-shirt", "hoodie")
_SKINS = ("fair", "light", "tan", "brown", "dark")


# --- drawing ----------------------------------------------------------------------------------------------------------
def world_groups(skin: float, age: float) -> dict[str, str]:
    """Return the skin-tone and age groups of a person, for a reference's facts, in the words of the world's captions.

    skin and age: traits of imagine.world.People, 0 to 1.
    """
    years = "young" if age < 0.35 else "old" if age > 0.7 else "middle-aged"
    return {"skin tone": _SKINS[min(len(_SKINS) - 1, int(skin * len(_SKINS)))], "age": years}


class _DrawSettings(BaseModel):
    """Settings of all backends that draw pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(default=128, ge=16, le=1024)
    # compile the painters: twice as fast after up to a minute; needs a C++ compiler; results differ in rounding
    compiled: bool = False


def _check_compiler(settings: _DrawSettings) -> None:
    if settings.compiled and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "cl"))):
        raise ConfigError(
            "`compiled` needs a C++ compiler, and none was found. Either install g++ or set `compiled` to false."
        )


def _draw(people: People, contexts: Contexts, settings: _DrawSettings) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each portrait as a PNG file, with its facts."""
    painters = compiled_painters() if settings.compiled else Painters()
    known = attributes(people, contexts)
    for start in range(0, len(people), _BATCH):
        rows = torch.arange(start, start + _BATCH).clamp(max=len(people) - 1)  # repeat the last one to fill the batch
        drawn = render(people[rows], contexts[rows], settings.size, painters)
        pixels = (drawn.images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        for row in range(min(_BATCH, len(people) - start)):
            image = Image.fromarray(pixels[row])
            places = {"box": _rounded(drawn.boxes[row]), "landmarks": _rounded(drawn.landmarks[row])}
            yield (
                _png(image),
                {**places, "attributes": known[start + row], "hash": picture_hash(image), "licence": LICENCE},
            )


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # three times as fast, and the file is a fifth larger
    return file.getvalue()


def _rounded(values: Tensor) -> Any:
    return [_rounded(value) if value.ndim else round(float(value), 2) for value in values]


# --- references -------------------------------------------------------------------------------------------------------
class WorldPeople:
    """References of the portrait world: one photo per person."""

    class Settings(_DrawSettings):
        """The people and their number; with the same seed, the first N people do not depend on `identities`."""

        identities: int = Field(ge=1, exclude=True)
        people: Literal["train", "judge", "held_out", "demo"] = "train"
        seed: int = Field(default=0, ge=0)

    def __init__(self, settings: "WorldPeople.Settings") -> None:
        self.settings = settings
        self._range = RANGES[settings.people]
        if settings.identities > len(self._range):
            raise ConfigError(f"{settings.identities} identities cannot be drawn. Request 1 to {len(self._range):,}.")

    @property
    def identity(self) -> Mapping[str, Any]:
        """The class, the version and the licence."""
        return identity_of(self, VERSION, licence=LICENCE)

    @property
    def count(self) -> int:
        """The number of references."""
        return self.settings.identities

    def load(self) -> None:
        """Raise ConfigError if `compiled` is set and no C++ compiler is found."""
        _check_compiler(self.settings)

    def draw(self, numbers: Sequence[int]) -> list[Reference]:
        """Return the references with these numbers, 0 to count - 1."""
        offset = self.settings.seed * 1_000_003
        identities = [self._range[(offset + number * _STRIDE) % len(self._range)] for number in numbers]
        seeds = [noise_seed(self.settings.seed, identity) for identity in identities]
        people = sample_people(identities)
        contexts = sample_contexts(seeds).replace(style=STYLES.index("photo"))
        drawn = _draw(people, contexts, self.settings)
        return [
            Reference(
                key=f"world{self.settings.seed}-{identity}",
                image=png,
                person=str(identity),
                facts={
                    **facts,
                    "groups": world_groups(float(people.skin[row]), float(people.age[row])),
                    "world": {"identity": identity, "context": seed},
                },
            )
            for row, (identity, seed, (png, facts)) in enumerate(zip(identities, seeds, drawn, strict=True))
        ]


def noise_seed(*parts: int) -> int:
    """Return a 63-bit seed that is derived from several numbers."""
    return int(np.random.SeedSequence([part % 2**64 for part in parts]).generate_state(1, np.uint64)[0] >> 1)


def _world_rows(references: Sequence[Reference]) -> list[int]:
    """Return the rows of the references that WorldPeople drew."""
    return [row for row, reference in enumerate(references) if "world" in reference.facts]


def _people(references: Sequence[Reference]) -> People:
    return sample_people([reference.facts["world"]["identity"] for reference in references])


def _scatter_results(count: int, rows: Sequence[int], results: Sequence[Any]) -> list[Any]:
    """Return a list of `count` items: the results at their rows, and a failure at all other rows."""
    existing = dict(zip(rows, results, strict=True))
    missing = Failed(
        NOT_WORLD_PERSON, "Its reference does not come from `references: world`. Use another backend for this step."
    )
    return [existing.get(row, missing) for row in range(count)]


# --- captions ---------------------------------------------------------------------------------------------------------
class GrammarCaptioner:
    """A captioner for photos from WorldPeople, with the dense captions of the world's grammar."""

    class Settings(BaseModel):
        """There are no settings."""

        model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, settings: "GrammarCaptioner.Settings") -> None:
        self.settings = settings

    @property
    def identity(self) -> Mapping[str, Any]:
        """The class, the version and the licence."""
        return identity_of(self, VERSION, licence=LICENCE)

    def load(self) -> None:
        """Do nothing; there is no model to load."""

    def caption(self, references: Sequence[Reference]) -> list[str | Failed]:
        """Return a caption of each person and everything around them; Failed for a photo of other origin."""
        rows = _world_rows(references)
        world_items = [references[row] for row in rows]
        if not world_items:
            return _scatter_results(len(references), [], [])
        seeds = [reference.facts["world"]["context"] for reference in world_items]
        contexts = sample_contexts(seeds).replace(style=STYLES.index("photo"))
        return _scatter_results(len(references), rows, captions(_people(world_items), contexts, "dense", seeds))


class GrammarRewriter:
    """A rewriter for photos from WorldPeople: dense captions of the targets, from the world's grammar."""

    Settings = GrammarCaptioner.Settings

    def __init__(self, settings: GrammarCaptioner.Settings) -> None:
        self.settings = settings

    @property
    def identity(self) -> Mapping[str, Any]:
        """The class, the version and the licence."""
        return identity_of(self, VERSION, licence=LICENCE)

    def load(self) -> None:
        """Do nothing; there is no model to load."""

    def rewrite(self, targets: Sequence[Target]) -> list[str | Failed]:
        """Return a caption of what the renderer draws for the same aims and seed; Failed for a photo of other origin.

        The captions in the targets are not used.
        """
        rows = _world_rows([target.reference for target in targets])
        world_items = [targets[row] for row in rows]
        if not world_items:
            return _scatter_results(len(targets), [], [])
        seeds = [target.seed for target in world_items]
        contexts = target_contexts([target.aims for target in world_items], seeds)
        people = _people([target.reference for target in world_items])
        return _scatter_results(len(targets), rows, captions(people, contexts, "dense", seeds))


def target_contexts(aims: Sequence[Mapping[str, str]], seeds: Sequence[int]) -> Contexts:
    """Return one context per row, drawn from its seed, with the requested attribute values set.

    Raises ConfigError for an unknown attribute or value.
    """
    contexts = sample_contexts(seeds)
    existing = attribute_indices(contexts)
    columns = {}
    for name in dict.fromkeys(name for row in aims for name in row):
        wanted = torch.tensor([_number(name, row.get(name)) for row in aims])
        values = getattr(contexts, name)
        given = (wanted - 1) * _TURNS[name] if name in _TURNS else wanted
        columns[name] = torch.where((wanted < 0) | (wanted == existing[name]), values, given.to(values.dtype))
    return _without_impossible(contexts.replace(**columns))


def _number(name: str, value: str | None) -> int:
    """Return the index of a value in the vocabulary; -1 for None."""
    if name not in ATTRIBUTES or value not in (None, *ATTRIBUTES[name]):
        valid = ", ".join(ATTRIBUTES.get(name, ATTRIBUTES))
        raise ConfigError(f"targets: the portrait world has no {name} {value!r}. Choose from {valid}.")
    return -1 if value is None else ATTRIBUTES[name].index(value)


def _without_impossible(contexts: Contexts) -> Contexts:
    """Remove letters on clothes that cannot have any, and letters and held objects that a close-up cuts off."""
    plain = torch.zeros(len(contexts), dtype=torch.bool)
    for word in _CLOTHES_WITH_LETTERS:
        plain |= contexts.clothes == CLOTHES.index(word)
    near = contexts.framing == FRAMINGS.index("close-up")
    letters = torch.where((plain & ~near).unsqueeze(1), contexts.letters, 0)
    return contexts.replace(letters=letters, held=torch.where(near, 0, contexts.held))


# --- the renderer -----------------------------------------------------------------------------------------------------
class Renderer:
    """A generator that draws exactly the requested attributes, of a person whose traits have drifted.

    Drift is the identity error of synthetic pairs; here it is a setting.
    """

    class Settings(_DrawSettings):
        """How far people drift, and how often another person is drawn."""

        # standard deviation of the change of each continuous trait, on its scale of 0 to 1
        drift: float = Field(default=0.06, ge=0, le=1)
        strangers: float = Field(default=0.0, ge=0, le=1)  # share of pictures that show another person, to test filters

    def __init__(self, settings: "Renderer.Settings") -> None:
        self.settings = settings

    @property
    def identity(self) -> Mapping[str, Any]:
        """The class, the version and the licence."""
        return identity_of(self, VERSION, licence=LICENCE)

    def load(self) -> None:
        """Raise ConfigError if `compiled` is set and no C++ compiler is found."""
        _check_compiler(self.settings)

    def generate(self, work: Sequence[tuple[Reference, TargetSpec, int]]) -> list[Candidate | Failed]:
        """Return one candidate for each (reference, target specification, attempt); Failed for other people."""
        rows = _world_rows([reference for reference, _, _ in work])
        world_items = [work[row] for row in rows]
        if not world_items:
            return _scatter_results(len(work), [], [])
        seeds = [spec.seed for _, spec, _ in world_items]
        contexts = target_contexts([spec.aims for _, spec, _ in world_items], seeds)
        exact = _people([reference for reference, _, _ in world_items])
        people = self._drifted(exact, [noise_seed(spec.seed, attempt) for _, spec, attempt in world_items])
        written = captions(people, contexts, "rewritten", seeds)
        likeness = _likeness(exact, people)
        made = [
            Candidate(
                f"{spec.key}-{attempt}-0",
                spec.key,
                png,
                attempt,
                facts={**facts, "similarity": likeness[row], "captions": {"rewritten": written[row]}},
            )
            for row, ((_, spec, attempt), (png, facts)) in enumerate(
                zip(world_items, _draw(people, contexts, self.settings), strict=True)
            )
        ]
        return _scatter_results(len(work), rows, made)

    def _drifted(self, people: People, seeds: Sequence[int]) -> People:
        if self.settings.strangers:
            swap = torch.tensor([seed % 10_000 < 10_000 * self.settings.strangers for seed in seeds])
            others = sample_people([TRAIN[seed % len(TRAIN)] for seed in seeds])
            columns = {name: torch.where(swap, getattr(others, name), getattr(people, name)) for name in vars(people)}
            people = people.replace(**columns)
        return drift(people, seeds, self.settings.drift) if self.settings.drift else people


def _likeness(one: People, two: People) -> list[float]:
    """Return each pair's similarity of traits: 1 for equal traits, 0 at the typical distance of strangers."""
    distance = torch.stack([getattr(one, name) - getattr(two, name) for name in CONTINUOUS]).square().mean(0).sqrt()
    return [round(float(value), 4) for value in (1 - distance / _STRANGER_DISTANCE).clamp(min=-1)]


class Truth:
    """A measurer for the renderer's pictures that uses the renderer's ground truth: exact and without computation."""

    Settings = GrammarCaptioner.Settings

    def __init__(self, settings: GrammarCaptioner.Settings) -> None:
        self.settings = settings

    @property
    def identity(self) -> Mapping[str, Any]:
        """The class, the version and the licence."""
        return identity_of(self, VERSION, licence=LICENCE)

    def load(self) -> None:
        """Do nothing; there is no model to load."""

    def measure(self, drafts: Sequence[Draft]) -> list[Measures | Failed]:
        """Return similarity by traits and difference by attributes; quality, sharpness and text are not measured."""
        return [_truth(draft) for draft in drafts]


def _truth(draft: Draft) -> Measures | Failed:
    facts = draft.candidate.facts
    if "similarity" not in facts:
        return Failed(
            "no ground truth", "Only the renderer's pictures have a ground truth. Use `measurer: pictures` instead."
        )
    known, visible = draft.reference.facts.get("attributes", {}), facts["attributes"]
    difference = attribute_difference(known, visible)
    return Measures(1, facts["similarity"], difference, picture_hash=facts["hash"], attributes=visible)
