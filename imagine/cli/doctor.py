"""`imagine doctor`: check the installation, or the quality of a photo."""

import argparse
from collections.abc import Mapping
from typing import Any

from imagine.cli.arguments import add_command, add_face, add_finder, add_weights
from imagine.cli.loading import load_finder, weights_folder
from imagine.cli.printing import fact_lines, size, table_lines
from imagine.errors import WeightsError


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands, "doctor", "check the installation, or how good a photo is and what would improve it", run
    )
    command.add_argument("photo", nargs="?", metavar="PHOTO", help="photo to check (default: check the installation)")
    add_weights(command)
    add_face(command)
    add_finder(command)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return the report on the photo, or on the installation."""
    from imagine.people.doctor import report_installation, report_photo
    from imagine.people.faces import default_finder

    try:
        folder = weights_folder(options.weights)
    except WeightsError:
        if options.weights is not None:
            raise
        folder = None  # the report says that no weights are installed
    if options.photo is None:
        found = report_installation(folder).as_dict()
        lines = _installation_lines(found)
    else:
        finder = load_finder(options.finder) or default_finder(None if folder is None else folder / "finder")
        found = report_photo(options.photo, finder, face=options.face).as_dict()
        lines = _photo_lines(found)
    return {"lines": [*lines, "", *(found["advice"] or ["No problem was found."])], **found}


def _installation_lines(found: Mapping[str, Any]) -> list[str]:
    versions = [[name, version or "not installed"] for name, version in found["versions"].items()]
    components = [[name, size(count)] for name, count in found["components"].items()]
    lines = fact_lines({name: found[name] for name in ("python", "system", "device", "threads", "weights")})
    lines += ["", *table_lines(["package", "version"], versions)]
    if components:
        lines += ["", *table_lines(["component of the weights", "size"], components)]
    return [*lines, "", *table_lines(["face detector", "usable"], list(found["finders"].items()))]


def _photo_lines(found: Mapping[str, Any]) -> list[str]:
    width, height = found["size"]
    upright = "upright" if found["orientation"] == 1 else "turned by EXIF"
    facts = {
        **{name: found[name] for name in ("name", "format", "mode")},
        "size": f"{width:,} x {height:,} px",
        "orientation": f"{found['orientation']}, {upright}",
        "faces": str(len(found["faces"])),
        **{name: found[name] for name in ("sharpness", "brightness", "quality")},
    }
    if not found["faces"]:
        return fact_lines(facts)
    columns = ("left", "top", "width", "height", "score")
    rows = [
        [str(number), *(f"{face[name]:.3g}" for name in columns), number == found["used"]]
        for number, face in enumerate(found["faces"])
    ]
    return [*fact_lines(facts), "", *table_lines(["face", *columns, "used"], rows)]
