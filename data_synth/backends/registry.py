"""Map the name of each backend to its class, and construct the backends that a build file selects.

The module of a backend is imported only when a build uses it. A build file contains `captioner: grammar`, or
`captioner: {backend: endpoint, model: NAME}` with the backend's settings beside its name. A backend of your own is
named by its import path, "package.module:Class" (contracts.py documents its interface).
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from data_synth.config import BackendChoice
from imagine.errors import ConfigError
from imagine.settings import unknown_name, validated

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


# The required members of each kind, besides those of every backend (contracts.py).
CALLS: Mapping[str, Sequence[str]] = {
    "references": ("count", "draw"),  # or "collect"
    "captioner": ("caption",),
    "rewriter": ("rewrite",),
    "generator": ("generate",),
    "refiner": ("refine",),
    "measurer": ("measure",),
}


def make_backend(kind: str, choice: BackendChoice) -> Any:
    """Return the backend that a build file selects for a step; its settings are checked and no model is loaded.

    Raises ConfigError, with the valid values, for an unknown name or setting, and for a class without a required
    member.
    """
    class_path = BACKENDS[kind].get(choice.backend, choice.backend)
    module, colon, name = class_path.partition(":")
    if not colon:
        raise ConfigError(f"{kind}: {unknown_name('backend', choice.backend, list(BACKENDS[kind]))}.")
    try:
        backend_class = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{kind}: {class_path} cannot be imported ({error}). Install the package, or correct the name."
        ) from error
    if not hasattr(backend_class, "Settings"):
        raise ConfigError(_missing_message(kind, class_path, ["Settings"]))
    backend = backend_class(validated(backend_class.Settings, choice.settings, f"{kind} {choice.backend}"))
    members = dir(backend)  # hasattr would compute `identity`, which may read a whole model
    calls = ("collect",) if kind == "references" and "collect" in members else CALLS[kind]
    if missing := [name for name in ("settings", "identity", "load", *calls) if name not in members]:
        raise ConfigError(_missing_message(kind, class_path, missing))
    return backend


def _missing_message(kind: str, class_path: str, missing: Sequence[str]) -> str:
    lacks = " and no ".join(missing)
    return f"{kind}: {class_path} has no {lacks}: data_synth/backends/contracts.py documents what to add."
