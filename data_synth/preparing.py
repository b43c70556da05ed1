"""Prepare a build: check its backends, import its photos, and collect everything that its results depend on."""

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
    """A build that is ready to run."""

    recipe: Recipe
    photos: int  # found by the import
    rejections: Sequence[Rejection]  # of the import
    models: Mapping[str, Mapping[str, Any]]  # by kind: backend, identity, settings


def prepare(config: BuildConfig, store: Store, report: Callable[[int], None] = lambda done: None) -> Prepared:
    """Check the configuration before any model is loaded, and import the photos.

    report: receives the number of photos imported so far. Raises ImagineError for wrong settings, and if the references
    allow no pair.
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
    """Return advice for a build without a usable photo, or without two photos of one person."""
    if NO_FACE in reasons[:1] and getattr(settings, "recogniser", "") == "judge":
        return "the judge recognises faces of the portrait world only; for photographs set recogniser: insightface"
    if count and getattr(settings, "kind", "people") != "people":
        return "if each person has a folder of photos, set kind: people; records name the person in `identity`"
    return "check the references"


def _describe(choice: BackendChoice, backend: Any) -> dict[str, Any]:
    """Return everything that a backend's results depend on."""
    settings = backend.settings.model_dump(mode="json")
    return {"backend": choice.backend, "identity": dict(backend.identity), "settings": settings}


def _hash(model: Mapping[str, Any]) -> str:
    """Hash what a backend's results depend on; its name in the build file does not matter."""
    parts = [model["identity"], model["settings"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()


def _mined(config: BuildConfig, identity: str, count: int, store: Store) -> tuple[tuple[int, int, int], ...]:
    """Return the mined pairs as (number of the reference, turn, number of the target photo)."""
    if store.read_note(f"import {identity}") is None:
        raise ConfigError("Pairs can be mined from photos only: set `references: files`, or add a generator.")
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
