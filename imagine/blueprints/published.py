"""The table of public bases and encoders (published.yaml), and `read_base`, which finds a base by any of its names."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from imagine.blueprints.blueprint import PORTRAIT, Blueprint, Component, cached_folder, portrait_folder, read_folder
from imagine.errors import ConfigError
from imagine.licences import licence_of
from imagine.paths import PACKAGE

FILE = PACKAGE / "blueprints" / "published.yaml"


@functools.cache
def _table() -> Mapping[str, Any]:
    found: Mapping[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return found


def base_names() -> tuple[str, ...]:
    """Return the short names of the public bases whose networks are in the table."""
    return tuple(_table()["bases"])


def published_base(name: str) -> Blueprint:
    """Return a public base by its short name."""
    entry = _table()["bases"][name]
    components = {part: _component(each) for part, each in entry["components"].items()}
    return Blueprint(
        name, components, pipeline=entry["pipeline"], steps=entry.get("steps"), guided=entry.get("guided")
    )  # fmt: skip


def text_encoder_names() -> tuple[str, ...]:
    """Return the names of the text encoders that may stand beside a base's own."""
    return tuple(_table()["text_encoders"])


def published_text_encoder(name: str) -> Component:
    """Return a text encoder beside CLIP by its name; the ByT5 ones read the letters. Raises ConfigError."""
    if name not in _table()["text_encoders"]:
        raise ConfigError(f"There is no text encoder {name!r}: choose from {', '.join(text_encoder_names())}.")
    return _component(_table()["text_encoders"][name])


def published_vision_encoder(name: str = "vit-h") -> Component:
    """Return a vision encoder by its name."""
    return _component(_table()["vision_encoders"][name])


def read_base(source: str) -> Blueprint:
    """Return the base `source`: a name in the table, "portrait", a folder, or a hub id.

    A hub id of the table is known without its files; any other must be in the local cache. Downloads nothing. Raises
    ConfigError for an unknown base, and WeightsError if its folder cannot be planned for.
    """
    if source in base_names():
        return published_base(source)
    folder = portrait_folder() if source == PORTRAIT else Path(source).expanduser()
    if not folder.is_dir():
        known = licence_of(source)
        if known is not None and known.hub[:1] == (source,) and known.name in base_names():
            return published_base(known.name)
        folder = cached_folder(source, ", ".join((*base_names(), PORTRAIT)))
    return read_folder(source, folder)


def _component(entry: Mapping[str, Any]) -> Component:
    return Component(entry["kind"], entry.get("config", {}))
