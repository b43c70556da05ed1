"""`imagine inspect`: describe a file or folder of weights, from its headers alone."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagine.cli.arguments import add_command
from imagine.cli.printing import fact_lines, in_words, size, table_lines

_COMPONENT_COLUMNS = ("class", "tensors", "parameters", "precision", "bytes")


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(commands, "inspect", "describe a file or folder of weights", run)
    command.add_argument("path", type=Path, metavar="FILE_OR_DIR", help="safetensors or .bin file, or a folder")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the file or folder is."""
    from imagine.inspection import inspect

    found = inspect(options.path)
    return {"lines": description(found), **found}


def description(found: Mapping[str, Any]) -> list[str]:
    """Return what `imagine.inspection.inspect` found, as lines: facts, tables, and a sentence for each problem."""
    lines = _facts(found)
    for name in ("defaults", "metadata"):
        if found.get(name):
            lines += ["", f"{name}:", *fact_lines(found[name], "  ")]
    if found.get("components"):
        lines += ["", *_component_table(found["components"])]
    for name, adapter in (found.get("adapters") or {}).items():
        lines += ["", f"{name}:", *_facts(adapter, "  ")]
    if isinstance(found.get("faces"), list) and found["faces"]:
        lines += ["", *face_table(found["faces"])]
    return lines


def _facts(found: Mapping[str, Any], indent: str = "") -> list[str]:
    """Return the simple facts of a file, aligned, then its problems."""
    tables = ("defaults", "metadata", "components", "adapters", "faces", "problems", "bytes")
    facts = {name: value for name, value in found.items() if name not in tables}
    if "bytes" in found:
        facts["size"] = f"{size(found['bytes'])} ({found['bytes']:,} bytes)"
    return [*fact_lines(facts, indent), *(f"{indent}Problem: {each}" for each in found.get("problems", ()))]


def _component_table(components: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = [
        [name, *(size(part[column]) if column == "bytes" else part.get(column) for column in _COMPONENT_COLUMNS)]
        for name, part in components.items()
    ]
    return table_lines(["component", *_COMPONENT_COLUMNS[:-1], "size"], rows)


def face_table(faces: Sequence[Any]) -> list[str]:
    """Return the faces of a persona as a table; boxes are in pixels of the upright photo."""
    rows = []
    for face in faces:
        if not isinstance(face, Mapping):
            return [f"faces: {in_words(faces)}"]
        box = face.get("box") or {}
        place = [_number(box.get(name)) for name in ("left", "top", "width", "height", "score")]
        rows.append([face.get("reference"), *place, _number(face.get("sharpness")), face.get("quality")])
    return table_lines(["photo", "left", "top", "width", "height", "score", "sharpness", "quality"], rows)


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) else "-"
