"""`python -m train CONFIG.yaml --output DIR`: read the run file and train its stages.

Exit codes: 0 done; 1 an error of the program; 2 the input is wrong; 3 stopped cleanly before the end, and the same
command resumes the run.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagine.errors import ImagineError
from imagine.paths import folder_to_fill
from train.config import load_run
from train.run.console import configure_logging

DONE, WRONG, STOPPED = 0, 2, 3  # a script that uses the trained weights must be able to tell "done" from "stopped"


def main(arguments: Sequence[str] | None = None, tasks: Mapping[str, Any] | None = None) -> int:
    """Run the command line and return the exit code. `tasks` replaces the table of tasks."""
    options = _parser().parse_intermixed_args(arguments)
    configure_logging()
    try:
        run = load_run(options.config, options.overrides)
        from train.stages import TASKS, run_stages  # imported late, so that a typo is reported before torch loads

        chosen = TASKS if tasks is None else tasks
        only = [name for name in options.only.split(",") if name]
        if options.dry_run:
            from train.data.portraits import describe_records
            from train.plan import format_plan, plan

            planned = format_plan(plan(run, options.output, chosen))
            for line in describe_records(run.data):
                print(f"  {line}")
            print(planned)
            return DONE
        if options.self_test:
            from train.selftest import self_test

            return 0 if all(each.passed for each in self_test(run, options.output, only, chosen)) else 1
        output, minutes = folder_to_fill(options.output), options.max_minutes
        finished = run_stages(run, output, resume=options.resume, only=only, max_minutes=minutes, tasks=chosen)
    except ImagineError as error:
        sys.stderr.write(f"{error}\n")
        return WRONG
    except OSError as error:  # a full disk, missing permissions, a lost network
        what = "A file of the run could not be read or written"
        sys.stderr.write(f"{what} ({error}). Fix the cause and run the same command again; it resumes the run.\n")
        return WRONG
    return DONE if finished else STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train the stages of a run file in order. The same command resumes a run that was stopped.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the run file")
    parser.add_argument("overrides", nargs="*", metavar="stage.key=value", help="replace a value of the run file")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder of the run")
    parser.add_argument("--resume", action="store_true", help="resume with changed settings, for example images")
    parser.add_argument("--dry-run", action="store_true", help="print the plan of every stage; train nothing")
    parser.add_argument("--self-test", action="store_true", help="overfit one batch per stage; keep nothing")
    parser.add_argument("--only", default="", metavar="STAGE[,STAGE]", help="train only these stages")
    parser.add_argument("--max-minutes", type=float, metavar="M", help="stop cleanly after M minutes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
