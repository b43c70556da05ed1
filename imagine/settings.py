"""Settings that people write in YAML, read strictly: what is wrong is one sentence that names what is valid.

Run files and build files both come through here; what may stand in them is their own models' matter.
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
    """YAML in which 1e-4 is a number, as people expect and as YAML 1.2 says."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_settings(path: Path, kind: str, holds: str) -> dict[str, Any]:
    """The mapping in the YAML file at `path`; `kind` and what it `holds` are for the ConfigError's sentence."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"The {kind} file {path} cannot be read ({error.strerror}): name a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The {kind} file {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"The {kind} file {path} must hold {holds}.")
    return content


def read_value(text: str, override: str) -> Any:
    """The value that an `override` gives, as YAML understands it; ConfigError if it does not."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override}: the value is not valid YAML; quote it.") from None


def validated(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """`values` as a `model`; what is wrong becomes one ConfigError sentence with `where` and the valid keys."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        # A misspelt key also leaves the right one missing: the misspelling is what to tell.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        problem = unknown_name("key", location[-1], _keys_at(model, location[:-1]))
    elif first["type"] == "missing":
        problem = f"{'.'.join(location)} is missing"
    else:
        reason = first["msg"].removeprefix("Value error, ")
        problem = f"{'.'.join(location)}: {reason} (got {first['input']!r})" if location else reason
    raise ConfigError(f"{where}: {problem}.") from None


def unknown_name(kind: str, name: str, valid: Sequence[str]) -> str:
    """The sentence for a name that matches nothing, with the nearest one and all valid ones."""
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"there is no {kind} {name!r}{hint}; valid: {listed(valid)}"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return ", ".join(names) if names else "none"


def _keys_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    for part in location:
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return list(model.model_fields)
