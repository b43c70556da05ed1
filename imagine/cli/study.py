"""`imagine study`: ask people about pictures, on a page in the browser, and report their answers."""

import argparse
import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from imagine.cli import arguments
from imagine.cli.printing import table_lines
from imagine.errors import ConfigError
from imagine.paths import folder_to_fill


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    command = arguments.add_command(
        commands, "study", "ask people about the pictures of evaluations, blind, on a page in the browser", run
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="folder of the study, which holds study.sqlite")
    command.add_argument("--pictures", action="append", default=[], metavar="NAME=DIR", help="a system and the folder "
                         "of its evaluation; may be given several times, and adds to the study")  # fmt: skip
    command.add_argument("--cases", type=arguments.positive, metavar="N", help="number of people and prompts, drawn at "
                         "random (default: all)")  # fmt: skip
    command.add_argument("--opinions", type=arguments.positive, default=3, metavar="N", help="answers that each "
                         "question needs (default: 3)")  # fmt: skip
    command.add_argument("--rater", metavar="NAME", help="name of the rater; without it the page asks")
    command.add_argument("--port", type=arguments.non_negative, default=8430, metavar="N", help="port on this machine "
                         "(default: 8430; 0: any free port)")  # fmt: skip
    command.add_argument("--results", action="store_true", help="serve no page, but write results.json and answers.csv "
                         "and print the results")  # fmt: skip


def run(options: argparse.Namespace, announce: Callable[[str], None] = print) -> dict[str, Any]:
    """Create or extend the study; then serve its page until interrupted, or report the answers."""
    folder = folder_to_fill(options.folder)
    from imagine.evaluation.study.store import FILE, Study, create, rater_name
    from imagine.evaluation.study.trials import make_trials

    if options.pictures:
        create(folder / FILE, make_trials(_named(options.pictures), options.cases))
    study = Study(folder / FILE, options.opinions)
    if options.results:
        return _report(study, folder)
    from imagine.evaluation.study.server import StudyServer

    name = rater_name(options.rater) if options.rater is not None else ""
    trials = study.state(name or "nobody")["progress"]["trials"]
    with StudyServer(study, options.port) as server:
        address = server.address + (f"?rater={quote(name)}" if name else "")
        if not options.json:
            announce(f"{trials} questions: open {address} (stop with Ctrl+C; every answer is saved immediately)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    answers = len(study.answers())
    return {"lines": [f"The study holds {answers} answers."], "answers": answers}


def _named(given: list[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for each in given:
        name, equals, folder = each.partition("=")
        if not name or not equals or not folder:
            raise ConfigError(f"--pictures {each} is not NAME=DIR: give the system a name, such as ours=out/report.")
        if name in named:
            raise ConfigError(f"--pictures names {name} twice: give each system a name of its own.")
        named[name] = Path(folder)
    return named


def _report(study: Any, folder: Path) -> dict[str, Any]:
    from imagine.evaluation.runs.folder import config_error_on_failure
    from imagine.evaluation.study.results import results, to_csv

    answers = study.answers()
    found = results(answers)
    with config_error_on_failure(folder / "results.json"):
        (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        (folder / "answers.csv").write_text(to_csv(answers), encoding="utf-8")
    standalone = [
        [system, question, str(one["answers"]), *_interval(one["pass"])]
        for system, own in found["standalone"].items()
        for question, one in own.items()
    ]
    pairs = [
        [two, question, str(one["answers"]), *(_interval(one["win"])), _percent(one["tie"]["value"])]
        for two, own in found["head_to_head"].items()
        for question, one in own.items()
    ]
    left_out = [name for name, one in found["raters"].items() if not one["kept"]]
    lines = [
        *table_lines(["system", "question", "answers", "pass", "Wilson 95 %"], standalone),
        *([""] if pairs else []),
        *(table_lines(["systems", "question", "answers", "first wins", "Wilson 95 %", "ties"], pairs) if pairs else []),
        *([f"Left out, because they failed attention checks: {', '.join(left_out)}."] if left_out else []),
        f"Answers: {folder / 'answers.csv'}",
    ]
    return {"lines": lines, **found}


def _interval(share: Mapping[str, Any]) -> list[str]:
    low, high = share["wilson"]
    return [_percent(share["value"]), f"{low:.0%} to {high:.0%}"]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
