"""Every cell of the support table in docs/bases.md is a test that exists, with this parameter."""

import ast
import re

from tests.imagine.stock.test_references import CASES
from tests.root import ROOT


def test_every_cell_of_the_table_of_bases_is_a_test() -> None:
    text = (ROOT / "docs" / "bases.md").read_text(encoding="utf-8")
    support, tests = text.partition("## Tests behind the table")[::2]
    rows = dict(re.findall(r"^\| (.+?) \| ((?:yes|no)\S* \| (?:yes|no)\S*) \|$", support, re.MULTILINE))
    wanted = {re.sub(r"\[\^[\w-]+\]", "", row): cells for row, cells in rows.items()}
    found = re.findall(r"^\| (.+?) \| `([\w/.]+)::(\w+)` \| (.*?) ?\| (.*?) ?\|$", tests, re.MULTILINE)
    assert len(found) > 10 and [row for row, *_ in found] == list(wanted)
    for row, file, function, *cases in found:
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert function in {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}, function
        named = [case.strip("`") for case in cases if case]
        assert set(named) <= {"sd15", "sdxl", *CASES}, row
        if named:  # a base without a test must say no
            assert [cell.startswith("yes") for cell in wanted[row].split(" | ")] == [bool(case) for case in cases], row
    shown = {case.strip("`") for _, _, function, *cases in found for case in cases if "-" in case}
    assert shown == set(CASES)
