"""`imagine download`: fetch a public base ahead, so that it can be used without a network."""

import argparse
from pathlib import Path
from typing import Any

from imagine.cli.arguments import add_command
from imagine.cli.progress import Display
from imagine.paths import folder_to_fill


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(commands, "download", "fetch a public base from the hub, and say its size and licence", run)
    command.add_argument("base", metavar="BASE", help="sdxl, sd15 or another name of `imagine licences`, or a hub id; "
                         "OWNER/NAME@REVISION pins it")  # fmt: skip
    command.add_argument("--ip-adapter", metavar="FILE", help="also fetch this IP-Adapter and its image encoder to the "
                         "cache: OWNER/NAME:FOLDER/FILE, or a public one such as plus-face-sdxl")  # fmt: skip
    command.add_argument("--output", type=Path, metavar="DIR", help="folder to fill with the base (default: the hub's "
                         "cache, where --base finds it by its name)")  # fmt: skip
    command.add_argument("--revision", metavar="NAME", help="revision of the base's repository")
    command.add_argument("--full-precision", action="store_true", help="take the weights of full precision where there "
                         "are some of half precision, which are half as large")  # fmt: skip
    command.set_defaults(online=lambda _: True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Download and return what there is now, and where."""
    into = None if options.output is None else folder_to_fill(options.output)
    from imagine.bases.opening import download

    with Display(options) as display:
        found = download(
            options.base, options.ip_adapter, options.revision, not options.full_precision, into, display.tell
        )
    places = {name: str(each.folder) for name, each in found.items()}
    size = sum(each.downloaded for each in found.values())
    return {
        "lines": [*(f"{name.replace('_', ' ')}: {place}" for name, place in places.items()),
                  "Everything was here already." if not size else f"Downloaded {size / 1e9:.2f} GB."],
        "folders": places, "downloaded": size,
    }  # fmt: skip
