"""How commands print their results: aligned facts and tables for people, or one JSON object."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_GAP = "  "  # between two columns


def print_result(text: str) -> int:
    """Print the result of a command and return the exit code: 1 if it cannot be printed."""
    encoding = sys.stdout.encoding or "utf-8"
    # A file name may hold bytes that are no text, and a terminal may lack characters: both are printed as escapes.
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, flush=True)
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit cannot fail again
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has closed the pipe
            return 0
        print(f"The command is done, but its result cannot be printed ({error.strerror}).", file=sys.stderr)
        return 1


def to_json(result: Mapping[str, Any]) -> str:
    """Return a result as JSON, with escapes if stdout cannot encode its characters."""
    text = json.dumps(result, ensure_ascii=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(result, default=str)
    return text


def fact_lines(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    """Return one line "name: value" for each fact, the values aligned; facts without a value are left out."""
    shown = {name.replace("_", " "): in_words(value) for name, value in facts.items() if value not in (None, "")}
    shown = {name: value for name, value in shown.items() if value}
    width = max(map(len, shown), default=0) + 1
    return [f"{indent}{name + ':':<{width}} {value}" for name, value in shown.items()]


def table_lines(header: Sequence[str], rows: Sequence[Sequence[Any]], indent: str = "") -> list[str]:
    """Return a table as lines: a header, then the rows, each column as wide as its widest cell.

    A column is aligned to the right if all its cells are numbers or strings that begin with a digit or a sign.
    """
    cells = [[in_words(cell) for cell in row] for row in rows]
    columns = list(zip(header, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell[:1] in "+-.0123456789" for cell in column[1:]) and any(column[1:]) for column in columns]
    lines = []
    for row in (header, *cells):
        aligned = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ]
        lines.append(indent + _GAP.join(aligned).rstrip())
    return lines


def in_words(value: Any) -> str:
    """Return a value as people write it: yes or no, digits in groups of three, lists and mappings with commas."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {in_words(each)}".rstrip() for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(in_words, value))
    return str(value)


def interval(low: float, high: float) -> str:
    """Return an interval as "low to high", with three decimals."""
    return f"{low:.3f} to {high:.3f}"


def size(count: float) -> str:
    """Return a number of bytes in the largest unit of which it is at least one."""
    for unit, factor, decimals in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if count >= factor:
            return f"{count / factor:.{decimals}f} {unit}"
    return f"{count:.0f} bytes"
