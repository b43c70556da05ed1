"""Which class stands behind each backend's name; its module is imported when a build uses it.

A build file says `captioner: grammar`, or `captioner: {backend: endpoint, model: NAME}` with the backend's own settings
beside its name. Your own backend is named by its place, "package.module:Class" (contracts.py says what it must do).
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from data_synth.config import Choice
from imagine.errors import ConfigError
from imagine.settings import checked, unknown_name

BACKENDS: Mapping[str, Mapping[str, str]] = {
    "references": {
        "files": "data_synth.references:Files",
        "world": "data_synth.backends.embedded:WorldPeople",
    },
    "captioner": {
        "grammar": "data_synth.backends.embedded:GrammarCaptioner",
        "transformers": "data_synth.backends.captioners:TransformersCaptioner",
        "endpoint": "data_synth.backends.captioners:EndpointCaptioner",
    },
    "rewriter": {
        "grammar": "data_synth.backends.embedded:GrammarRewriter",
        "transformers": "data_synth.backends.rewriters:TransformersRewriter",
        "endpoint": "data_synth.backends.rewriters:EndpointRewriter",
    },
    "generator": {
        "renderer": "data_synth.backends.embedded:Renderer",
        "imagine": "data_synth.backends.own_generator:ImagineGenerator",
        "diffusers": "data_synth.backends.generators:DiffusersGenerator",
    },
    "refiner": {
        "imagine": "data_synth.backends.refiners:ImagineRefiner",
        "inpaint": "data_synth.backends.refiners:InpaintRefiner",
        "ip_adapter": "data_synth.backends.refiners:IPAdapterRefiner",
    },
    "measurer": {
        "truth": "data_synth.backends.embedded:Truth",
        "pictures": "data_synth.backends.measuring:Measurer",
    },
}


CALLS: Mapping[str, Sequence[str]] = {  # what a backend of each kind must have besides what all have (backends.py)
    "references": ("count", "draw"),  # or "collect"
    "captioner": ("caption",),
    "rewriter": ("rewrite",),
    "generator": ("generate",),
    "refiner": ("refine",),
    "measurer": ("measure",),
}


def make_backend(kind: str, choice: Choice) -> Any:
    """The backend of that kind that a build file chose, its settings checked and nothing loaded.

    Raises ConfigError, naming the valid ones, for a name or a setting that there is not, and for a class that lacks
    something that every build asks for.
    """
    place = BACKENDS[kind].get(choice.backend, choice.backend)
    module, colon, name = place.partition(":")
    if not colon:
        raise ConfigError(f"{kind}: {unknown_name('backend', choice.backend, list(BACKENDS[kind]))}.")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{kind}: {place} cannot be imported ({error}): install it, or correct its name.") from error
    if not hasattr(made, "Settings"):
        raise ConfigError(_lacking(kind, place, ["Settings"]))
    backend = made(checked(made.Settings, choice.settings, f"{kind} {choice.backend}"))
    there = dir(backend)  # nothing is asked for: `identity` may read a whole model
    calls = ("collect",) if kind == "references" and "collect" in there else CALLS[kind]
    if missing := [name for name in ("settings", "identity", "load", *calls) if name not in there]:
        raise ConfigError(_lacking(kind, place, missing))
    return backend


def _lacking(kind: str, place: str, missing: Sequence[str]) -> str:
    lacks = " and no ".join(missing)
    return f"{kind}: {place} has no {lacks}: data_synth/backends/contracts.py says what a backend must have."
