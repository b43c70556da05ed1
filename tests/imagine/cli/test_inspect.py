"""`imagine inspect`: its facts, tables and escapes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.commands import Run, process


def test_inspect_names_the_kind_and_the_components(run: Run, weights: Path) -> None:
    code, out, _ = run("inspect", weights / "adapter", "--json")
    assert code == 0 and json.loads(out)["kind"] == "adapter"
    code, out, _ = run("inspect", weights)
    assert code == 0 and re.search(r"^kind: +weights$", out, re.MULTILINE) and "UNet2DConditionModel" in out


def test_characters_that_the_terminal_lacks_are_printed_as_escapes(tmp_path: Path) -> None:
    (tmp_path / "é").mkdir()
    tiny.pipeline().enroll(tiny.photo(1)).save(tmp_path / "é" / "me.safetensors")
    for more, shown in (([], "\\xe9"), (["--json"], "\\u00e9")):
        done = process("-m", "imagine", "inspect", str(tmp_path / "é"), *more, PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, "") and shown in done.stdout
    assert json.loads(done.stdout)["path"] == str(tmp_path / "é")


def test_a_result_that_cannot_be_printed_is_reported_in_one_sentence(weights: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    command = f"{sys.executable} -m imagine inspect {weights} > /dev/full"
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1 and "cannot be printed (No space left" in ran.stderr


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m imagine inspect {tmp_path / 'weights'} | true; exit ${{PIPESTATUS[0]}}"
    tiny.pipeline().save_pretrained(tmp_path / "weights")
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
