"""Which class stands behind each backend's name; its module is imported when a build uses it.

A build file says `captioner: grammar`, or `captioner: {backend: endpoint, model: NAME}` with the backend's own settings
beside its name. Your own backend is named by its place, "package.module:Class" (backends.py says what it must do).
"""

import importlib
from collections.abc import Mapping
from typing import Any

from data_synth.config import Choice
from imagine.errors import ConfigError
from imagine.settings import checked, unknown_name

BACKENDS: Mapping[str, Mapping[str, str]] = {
    "references": {
        "files": "data_synth.references:Files",
        "world": "data_synth.embedded:WorldPeople",
    },
    "captioner": {
        "grammar": "data_synth.embedded:GrammarCaptioner",
        "transformers": "data_synth.captioners:TransformersCaptioner",
        "endpoint": "data_synth.captioners:EndpointCaptioner",
    },
    "rewriter": {
        "grammar": "data_synth.embedded:GrammarRewriter",
        "transformers": "data_synth.rewriters:TransformersRewriter",
        "endpoint": "data_synth.rewriters:EndpointRewriter",
    },
    "generator": {
        "renderer": "data_synth.embedded:Renderer",
        "imagine": "data_synth.own_generator:ImagineGenerator",
        "diffusers": "data_synth.generators:DiffusersGenerator",
    },
    "refiner": {
        "imagine": "data_synth.refiners:ImagineRefiner",
        "inpaint": "data_synth.refiners:InpaintRefiner",
        "ip_adapter": "data_synth.refiners:IPAdapterRefiner",
    },
    "measurer": {
        "truth": "data_synth.embedded:Truth",
        "pictures": "data_synth.measuring:Measurer",
    },
}


def make_backend(kind: str, choice: Choice) -> Any:
    """The backend of that kind that a build file chose, its settings checked and nothing loaded.

    Raises ConfigError, naming the valid ones, for a name or a setting that there is not.
    """
    place = BACKENDS[kind].get(choice.backend, choice.backend)
    module, colon, name = place.partition(":")
    if not colon:
        raise ConfigError(f"{kind}: {unknown_name('backend', choice.backend, list(BACKENDS[kind]))}.")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{kind}: {place} cannot be imported ({error}): install it, or correct its name.") from error
    return made(checked(made.Settings, choice.settings, f"{kind} {choice.backend}"))
