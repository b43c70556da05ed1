"""Read and validate YAML settings strictly.

Training configs and build files are both read here. Their models define which keys are valid. An error message names
the problem and lists the valid keys.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from imagine.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads 1e-4 as a number, as YAML 1.2 does and as users expect."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_settings(path: Path, kind: str, holds: str) -> dict[str, Any]:
    """Return the mapping in the YAML file at `path`; raise ConfigError if there is none.

    `kind` (of file) and `holds` (its expected content) are used in the error message only.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"The {kind} file {path} cannot be read ({error.strerror}): name a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The {kind} file {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"The {kind} file {path} must hold {holds}.")
    odd = next((key for key in content if not isinstance(key, str)), None)
    if odd is not None:
        raise ConfigError(f"The {kind} file {path} has the key {odd!r}, which is no name: quote it or remove it.")
    return content


def read_value(text: str, override: str) -> Any:
    """Parse the value of `override` as YAML. Raise ConfigError if it is not valid YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override}: the value is not valid YAML; quote it.") from None


def validated(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """Return `values` as a `model`. Raise ConfigError with `where` and the problem, and valid keys for a wrong one."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        # A misspelt key also makes the correct key missing; report the misspelt one.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        problem = unknown_name("key", location[-1], _keys_at(model, location[:-1]))
    elif first["type"] == "missing":
        problem = f"{'.'.join(location)} is missing; add it"
    else:
        reason = first["msg"].removeprefix("Value error, ")
        problem = f"{'.'.join(location)}: {reason} (got {first['input']!r})" if location else reason
    raise ConfigError(f"{where}: {problem}.") from None


def unknown_name(kind: str, name: str, valid: Sequence[str]) -> str:
    """Return an error message for an unknown name, with the closest valid name and all valid names."""
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"there is no {kind} {name!r}{hint}; valid: {listed(valid)}"


def listed(names: Sequence[str]) -> str:
    """Return the names separated by commas, or "none"."""
    return ", ".join(names) if names else "none"


def _keys_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    for part in location:
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return list(model.model_fields)
