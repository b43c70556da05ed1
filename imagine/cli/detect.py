"""`imagine detect`: read the marks of a picture file: settings, content credentials and watermark."""

import argparse
from pathlib import Path
from typing import Any

from imagine.cli.arguments import add_command
from imagine.cli.loading import check_photos
from imagine.cli.printing import fact_lines


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(commands, "detect", "read what a picture says of its origin", run)
    command.add_argument("file", type=Path, metavar="FILE", help="picture file")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return the marks of the picture."""
    check_photos([options.file])
    from imagine.provenance.detection import detect

    found = detect(options.file)
    signed, marked, record = found.credentials, found.watermark, found.record or {}
    facts = {
        "settings": "by imagine" if found.record else "by another program" if found.text else "none",
        "credentials": None if signed is None else f"{signed['state']}, issuer {signed.get('issuer')}",
        "watermark": None if marked is None else _watermark(marked),
        "seed": str(record["seed"]) if record.get("seed") is not None else None,
        "weights": record.get("weights"), "consent": record.get("consent"), "flag": record.get("flag"),
        "prompt": record.get("prompt"),
    }  # fmt: skip
    return {"lines": [found.verdict, *fact_lines(facts), *found.notes], **found.as_dict()}


def _watermark(marked: dict[str, Any]) -> str:
    bits = f"{marked['bits'] - marked['wrong_bits']} of {marked['bits']} bits"
    return f"found, {bits}, consent: {marked['consent']}" if marked["found"] else f"not found ({bits} of the nearest)"
