"""Registry of diffusers pipeline families that gain a `reference=` argument; `imagine.stock` registers the first.

`ImaginePipeline.from_pretrained` and `from_pipe` look up here the class for a folder or pipeline that is not an
ImaginePipeline. A family registers itself when `imagine` is imported, so that this folder does not import it.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from imagine.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """Pipelines of diffusers to which references are added in the same way.

    title: the name used in error sentences.
    class_names: the pipelines' class names in diffusers.
    adapt: returns the subclass with `reference=` for a stock class; raises ConfigError for an unsupported class.
    """

    title: str
    class_names: tuple[str, ...]
    adapt: Callable[[type], Any]


_families: list[Family] = []


def register_family(family: Family) -> None:
    """Make `ImaginePipeline` accept the pipelines of `family`."""
    _families.append(family)


def class_names() -> tuple[str, ...]:
    """Return the class names of all registered pipelines."""
    return tuple(name for family in _families for name in family.class_names)


def titles() -> str:
    """Return the names of all families, for a sentence."""
    return " or ".join(family.title for family in _families)


def class_by_name(name: str) -> Any:
    """Return the class with `reference=` for the registered diffusers pipeline class called `name`."""
    return class_for(getattr(importlib.import_module("diffusers"), name))


def class_for(stock: type) -> Any:
    """Return the class with `reference=` for the pipeline class `stock`. Raises ConfigError if no family has it."""
    bases = {base.__name__ for base in stock.__mro__}
    for family in _families:
        if bases & set(family.class_names):
            return family.adapt(stock)
    raise ConfigError(
        f"A {stock.__name__} cannot take references; use a pipeline of {titles()}, such as StableDiffusionXLPipeline."
    )
