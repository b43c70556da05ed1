"""How facts, tables and values are printed, and that no command prints the representation of a Python object."""

import argparse
import re
from pathlib import Path

from imagine.cli import _parser
from imagine.cli.plan import check_lines
from imagine.cli.printing import fact_lines, in_words, interval, size, table_lines
from tests import tiny
from tests.commands import Run

REPRESENTATION = re.compile(r"\(-?\d+, |\{'|\['|\[-?\d|\(\)|\[\]|\{\}|\b(True|False|None)\b|OrderedDict|<\w+ ")


def test_values_are_printed_in_words() -> None:
    assert [in_words(each) for each in (True, False, None, 1234567, 0.0123456)] == [
        "yes",
        "no",
        "",
        "1,234,567",
        "0.0123",
    ]
    assert in_words([1, "a", {"b": True}]) == "1, a, b yes" and in_words(()) == ""
    assert interval(-0.0981, -0.0487) == "-0.098 to -0.049"
    assert [size(each) for each in (12, 2048, 3 * 2**20, 1.5 * 2**30)] == ["12 bytes", "2.0 KiB", "3.0 MiB", "1.50 GiB"]


def test_facts_and_tables_are_aligned() -> None:
    assert fact_lines({"a_name": 1, "b": None, "c": "x"}) == ["a name: 1", "c:      x"]
    assert table_lines(["part", "count"], [["first", 12], ["second", 3]]) == [
        "part    count",
        "first      12",
        "second      3",
    ]


def test_a_table_of_plan_check() -> None:
    rows = {"parameters": {"planned": 12345, "measured": 12345, "off": 0.0}}
    lines = check_lines({"tolerance": 0.15, "rows": rows})
    assert lines[1].split() == ["parameters", "12,345", "12,345", "0.0%"]
    assert lines[-1] == "Memory agrees within 15%, everything else exactly."


def test_no_command_prints_a_python_representation(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    persona = tmp_path / "me.safetensors"
    tiny.pipeline().enroll([tiny.photo(1), tiny.photo(2)]).save(persona)
    commands: list[list[str | Path]] = [
        ["inspect", weights], ["inspect", weights / "adapter"], ["inspect", weights / "unet"], ["inspect", persona],
        ["doctor", "--weights", weights], ["doctor", photo, "--weights", weights],
        ["plan", "--base", "portrait"], ["plan", "--base", "portrait", "--train"],
    ]  # fmt: skip
    for command in commands:
        code, out, err = run(*command)
        assert (code, err) == (0, "") and out.count("\n") > 4
        assert not REPRESENTATION.search(out), (command, REPRESENTATION.search(out))


def test_every_argument_has_a_help_text() -> None:
    commands = next(each for each in _parser()._actions if isinstance(each, argparse._SubParsersAction)).choices
    assert len(commands) == 19
    assert [(name, each.dest) for name, parser in commands.items() for each in parser._actions if not each.help] == []
