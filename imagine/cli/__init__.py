"""The command `imagine`. Each command is one module of this folder: its arguments, its checks and what it prints.

Exit codes: 0 for success, 2 for a mistake in the user's input (one sentence on stderr says what to do), 1 for a fault
of ours, 130 for an interrupt. With --json, stdout receives one JSON object and nothing else. An output file appears
complete or not at all. Nothing is downloaded unless an argument names a repository of the hub.

Heavy libraries are imported inside the commands that need them, after the arguments have been checked, so that
`imagine --help` and a mistyped path are answered at once.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from imagine import __version__
from imagine.cli import (
    app,
    benchmark,
    compare,
    demo,
    detect,
    doctor,
    download,
    enroll,
    evaluate,
    generate,
    inspect,
    ip_adapter,
    licences,
    persona,
    plan,
    serve,
    study,
    try_photo,
)
from imagine.cli.arguments import Command, Parser
from imagine.cli.loading import silence_libraries
from imagine.cli.printing import print_result, to_json
from imagine.errors import ImagineError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, by default with the arguments of this process, and return its exit code."""
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has printed its message
        return int(stop.code or 0)
    run: Command = options.run
    try:
        silence_libraries(online=getattr(options, "online", _never)(options))
        result = run(options)
    except ImagineError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except Exception as error:  # a traceback would not help users who cannot change the code
        if os.environ.get("IMAGINE_DEBUG"):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"imagine failed ({reason}); set IMAGINE_DEBUG=1 to see the traceback, and report the fault.",
            file=sys.stderr,
        )
        return 1
    lines: list[str] = result.pop("lines")
    return print_result(to_json(result) if options.json else "\n".join(lines))


def _never(_: object) -> bool:
    """Return that a command needs no network, which holds for all that do not say otherwise (`online`)."""
    return False


def _parser() -> Parser:
    parser = Parser(prog="imagine", description="Turn one photo of a person and a prompt into a new picture of them.")
    parser.add_argument("--version", action="version", version=f"imagine {__version__}")
    commands: Any = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    modules = (
        generate, app, try_photo, enroll, persona, detect, inspect, doctor, evaluate, compare, study, benchmark, demo,
        ip_adapter, plan, download, licences, serve,
    )  # fmt: skip
    for module in modules:
        module.add_commands(commands)
    return parser
