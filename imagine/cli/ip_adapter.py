"""`imagine import-ip-adapter` and `imagine export-ip-adapter`: between our folders and standard IP-Adapter files."""

import argparse
from pathlib import Path
from typing import Any

from imagine.cli.arguments import add_command
from imagine.cli.printing import fact_lines
from imagine.paths import as_path, writable_file, writable_folder


def add_commands(commands: Any) -> None:
    """Add both commands to the parser."""
    _add_import(commands)
    _add_export(commands)


def _add_import(commands: Any) -> None:
    command = add_command(
        commands, "import-ip-adapter", "convert a standard IP-Adapter file to an adapter folder", import_file
    )
    command.add_argument("source", metavar="SRC", help="file, folder, or hub id that was downloaded before")
    command.add_argument("--base", required=True, metavar="BASE", help="model that it was made for: sdxl, sd15, or a "
                         "folder")  # fmt: skip
    command.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    command.add_argument("--subfolder", metavar="NAME", help="folder of the file within SRC")
    command.add_argument("--weight-name", metavar="FILE", help="name of the file, if SRC holds several")
    command.add_argument("--image-encoder", metavar="DIR", help="its image encoder (default: the folder image_encoder "
                         "beside the file)")  # fmt: skip


def _add_export(commands: Any) -> None:
    command = add_command(
        commands, "export-ip-adapter", "convert an adapter to a standard IP-Adapter file", export_file
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="folder of weights, or of an imported IP-Adapter")
    command.add_argument("--output", required=True, type=Path, metavar="FILE", help="file to write: .safetensors; the "
                         "image encoder and the LoRA are written beside it")  # fmt: skip
    command.add_argument("--base", metavar="BASE", help="model that it was made for, if DIR does not say: sdxl, sd15, "
                         "or a folder")  # fmt: skip


def import_file(options: argparse.Namespace) -> dict[str, Any]:
    """Write the adapter folder and return what it holds."""
    output = writable_folder(options.output)
    from imagine.ip_adapter.folders import import_folder

    found = import_folder(
        options.source, options.base, output, options.subfolder, options.weight_name, options.image_encoder
    )
    facts = {name: value for name, value in found.items() if name not in ("used", "notes", "output")}
    facts["tensors used"] = len(found["used"])
    return {"lines": [str(output), *fact_lines(facts), *found["notes"]], **found}


def export_file(options: argparse.Namespace) -> dict[str, Any]:
    """Write the IP-Adapter file and return what it holds, and what it cannot hold."""
    file = writable_file(options.output, (".safetensors",))
    from imagine.ip_adapter.folders import export_folder

    found = export_folder(as_path(options.folder), file, options.base).as_dict()
    facts = {name: value for name, value in found.items() if name != "not_carried"}
    return {"lines": [*fact_lines(facts), *found["not_carried"]], **found}
