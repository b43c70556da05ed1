"""Progress of a command on the terminal: the stage that runs, how far it is, and the time left.

It goes to stderr, and only if stderr is a terminal and the command was not asked for JSON; otherwise nothing appears.
"""

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Display:
    """A context in which `report` shows the present stage of a command in one line, which is removed at the end.

    `report` is what library functions take as their `progress` argument.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._bars: Progress | None = _bars() if sys.stderr.isatty() and not options.json else None
        self._stage = ""
        self._task: TaskID | None = None

    def __enter__(self) -> "Display":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def report(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Show that `done` of `total` steps of a stage are done; a total of 0 means that it is unknown."""
        if self._bars is None:
            return
        count, left = (f"{done:,}/{total:,}", "left") if total else ("", "")
        if stage == self._stage and self._task is not None:
            self._bars.update(self._task, total=total or None, completed=done, count=count, left=left)
            return
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._stage = stage
        self._task = self._bars.add_task(stage, total=total or None, completed=done, count=count, left=left)

    def print(self, line: str) -> None:
        """Print a line on stdout, above the progress if both are on one terminal."""
        if self._bars is not None:
            self._bars.stop()
        print(line, flush=True)
        if self._bars is not None:
            self._bars.start()

    def tell(self, line: str) -> None:
        """Print a line on stderr, above the progress, such as what is downloaded."""
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)


def _bars() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[left]}"),
    )  # fmt: skip
    # Redirection would send what is printed on stdout, which may be a file, to the terminal.
    return Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    )
