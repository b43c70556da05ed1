"""Every cell of the support tables in docs/support.md is a test that exists, with this parameter."""

import ast
import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Any

from tests.imagine.stock.test_references import CASES
from tests.root import ROOT
from tests.tiny_transformer_folders import SHORT_NAMES

COLUMNS = ("flux2", "z_image", "qwen", "flux", "sd3", "sana")  # of the first table, after those of the U-Nets
PAGE = ROOT / "docs" / "support.md"


def halves() -> tuple[str, str]:
    """Return what is before and behind the heading of the tests."""
    return PAGE.read_text(encoding="utf-8").partition("## Tests behind the tables")[::2]


def test_every_cell_of_all_families_is_a_test_that_runs_on_this_family() -> None:
    support, tests = halves()
    table = re.findall(r"^\| (.+?) \| ((?:(?:yes|no) \| ){7}(?:yes|no)) \|$", support, re.MULTILINE)
    wanted = {re.sub(r"\[\^[\w-]+\]", "", row): cells.split(" | ") for row, cells in table}
    behind = tests.partition("### Tests on Stable Diffusion")[0]
    found = re.findall(r"^\| (.+?) \| (`\S+`)? ?\| (`\S+`)? ?\| ?(.*?) ?\|$", behind, re.MULTILINE)
    by_row = {row: (on_unets.strip("`"), on_transformers.strip("`"), re.findall(r"`(\w+)`", cases))
              for row, on_unets, on_transformers, cases in found if row not in ("row", "---")}  # fmt: skip
    assert len(wanted) > 12 and set(by_row) <= set(wanted) and set(COLUMNS) == set(SHORT_NAMES.values())
    for row, cells in wanted.items():
        on_unets, on_transformers, cases = by_row.get(row, ("", "", []))
        assert cells[:2] == ["yes" if on_unets else "no"] * 2, row
        assert cells[2:] == ["yes" if column in cases else "no" for column in COLUMNS], row
        if on_unets:
            function(on_unets)
        if on_transformers:
            check_cases(on_transformers, cases)


def function(place: str) -> Any:
    """Return a test function by its path in the table."""
    file, name = place.split("::")
    return getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)


def check_cases(place: str, cases: Sequence[str]) -> None:
    """Raise AssertionError unless a test runs on exactly these of the columns, where it does not skip any."""
    test = function(place)
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    listed = [mark.args[1] for mark in marks if mark.args[0] in ("name", "kind", "base")]
    module = inspect.getmodule(test)
    assert module is not None
    run = set(listed[0] if listed else module.NAMES)
    run |= {SHORT_NAMES[each] for each in run if each in SHORT_NAMES}  # tests of short names
    assert set(cases) <= run, f"{place} does not run on {set(cases) - run}"
    left_out = set(COLUMNS) & run - set(cases)
    assert not left_out or "pytest.skip" in inspect.getsource(test), f"{place} also runs on {left_out}"


def test_every_cell_of_the_table_of_stable_diffusion_is_a_test() -> None:
    support, tests = halves()
    rows = dict(re.findall(r"^\| ([^|]+?) \| ((?:yes|no)\S* \| (?:yes|no)\S*) \|$", support, re.MULTILINE))
    wanted = {re.sub(r"\[\^[\w-]+\]", "", row): cells for row, cells in rows.items()}
    tests = tests.partition("### Tests on Stable Diffusion")[2]
    found = re.findall(r"^\| (.+?) \| `([\w/.]+)::(\w+)` \| (.*?) ?\| (.*?) ?\|$", tests, re.MULTILINE)
    assert len(found) > 10 and [row for row, *_ in found] == list(wanted)
    for row, file, name, *cases in found:
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert name in {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}, name
        named = [case.strip("`") for case in cases if case]
        assert set(named) <= {"sd15", "sdxl", *CASES}, row
        if named:  # a base without a test must say no
            assert [cell.startswith("yes") for cell in wanted[row].split(" | ")] == [bool(case) for case in cases], row
    shown = {case.strip("`") for _, _, _, *cases in found for case in cases if "-" in case}
    assert shown == set(CASES)
