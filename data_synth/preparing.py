"""Before a build: its backends checked, its photos imported, and all that its results follow from written down."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_synth.backends.registry import make_backend
from data_synth.config import BackendChoice, BuildConfig
from data_synth.importing import NO_FACE, mined_drafts
from data_synth.records import Reference, Rejection
from data_synth.references import collect, people_of
from data_synth.steps import STEP_CALLS, Recipe
from data_synth.store import Store
from imagine.errors import ConfigError


@dataclass(frozen=True)
class Prepared:
    """A build that can begin."""

    recipe: Recipe
    photos: int  # found by the import
    rejections: Sequence[Rejection]  # of the import
    models: Mapping[str, Mapping[str, Any]]  # by kind: backend, identity, settings


def prepare(config: BuildConfig, store: Store, report: Callable[[int], None] = lambda done: None) -> Prepared:
    """Check what can be checked before anything is loaded, and import the photos; `report` is told how many.

    Raises ImagineError for settings that do not fit, and if there is nothing to make pairs of.
    """
    backends = {kind: make_backend(kind, choice) for kind, choice in config.choices.items()}
    models = {kind: _describe(config.choices[kind], backend) for kind, backend in backends.items()}
    identities = {step: _hash(models[kind]) for step, (kind, _) in STEP_CALLS.items() if kind in models}
    source, rejections = backends["references"], list[Rejection]()
    if hasattr(source, "collect"):
        count, rejections = collect(source, identities["import"], store, report)
    else:
        count = int(source.count)
    mined = _mined(config, identities["import"], count, store) if config.generator is None else ()
    recipe = Recipe(config, identities, count, mined)
    if not recipe.total:
        what = "no two photos of one person" if count else "no photo that can be used"
        most = Counter(one.reason for one in rejections).most_common(3)
        reasons = f" ({', '.join(f'{reason}: {number}' for reason, number in most)})" if most else ""
        advice = _advice(source.settings, [reason for reason, _ in most], count)
        raise ConfigError(f"There is {what} to make pairs of{reasons}: {advice}.")
    return Prepared(recipe, count + len(rejections), rejections, models)


def _advice(settings: Any, reasons: Sequence[str], count: int) -> str:
    """What may be wrong with references of which nothing, or nobody twice, is left."""
    if NO_FACE in reasons[:1] and getattr(settings, "recogniser", "") == "judge":
        return "the judge sees faces of the portrait world only; for photographs set recogniser: insightface"
    if count and getattr(settings, "kind", "people") != "people":
        return "if each person has a folder of photos, set kind: people; records say it as identity"
    return "check the references"


def _describe(choice: BackendChoice, backend: Any) -> dict[str, Any]:
    """What a backend's results follow from."""
    settings = backend.settings.model_dump(mode="json")
    return {"backend": choice.backend, "identity": dict(backend.identity), "settings": settings}


def _hash(model: Mapping[str, Any]) -> str:
    """By which name a class is called says nothing of its results."""
    parts = [model["identity"], model["settings"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()


def _mined(config: BuildConfig, identity: str, count: int, store: Store) -> tuple[tuple[int, int, int], ...]:
    """Which photos of a person are paired: reference, its turn, target."""
    if store.read_note(f"import {identity}") is None:
        raise ConfigError("Pairs can be mined from photos only: take `references: files`, or name a generator.")
    places: dict[str, int] = {}
    without_images = []
    for number, reference in people_of(identity, count, store):
        places[reference.key] = number
        without_images.append(Reference(reference.key, b"", reference.person))
    drafts = mined_drafts(without_images, config.mined_per_photo)
    return tuple(
        (places[draft.reference.key], int(draft.spec.key.rpartition("-")[2]), places[draft.candidate.facts["photo"]])
        for draft in drafts
    )
