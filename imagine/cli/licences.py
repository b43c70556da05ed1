"""`imagine licences`: the licences of public bases, adapters and recognisers, and where they were read."""

import argparse
from typing import Any

from imagine.cli.arguments import add_command
from imagine.cli.printing import table_lines


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    add_command(commands, "licences", "list the licences of public bases, adapters and recognisers", run)


def run(_: argparse.Namespace) -> dict[str, Any]:
    """Return the table."""
    from imagine.licences import USES, licences

    found = licences()
    rows = [[each.kind, each.name, each.title, each.licence, USES[each.commercial], each.source] for each in found]
    header = ["kind", "name", "network", "licence", "use", "source"]
    advice = "This is no legal advice: read the licence itself before you use a network; publishers change them."
    return {
        "lines": [*table_lines(header, rows), "", advice],
        "licences": [each.model_dump(mode="json") for each in found],
    }
