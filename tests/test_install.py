"""What people install and type: the verbs of the Makefile, and the wheel."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def make(verb: str, *variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", verb, *variables], cwd=ROOT, capture_output=True, text=True)


def script(path: Path, *lines: str) -> Path:
    """An executable that notes what it is asked for in `asked` beside it, and then does `lines`."""
    path.write_text("\n".join(["#!/bin/sh", f'echo "$*" >> {path.with_name("asked")}', *lines, ""]))
    path.chmod(0o755)
    return path


@needs_make
@pytest.mark.parametrize(("code", "asked"), [(0, ["train", "train.assemble"]), (3, ["train"]), (2, ["train"])])
def test_weights_are_put_together_only_after_the_last_image(tmp_path: Path, code: int, asked: list[str]) -> None:
    python = script(tmp_path / "python", f'[ "$2" != train ] || exit {code}')
    (tmp_path / "ready").touch()  # newer than what it is made from
    ran = make("weights", f"PY={python}", f"READY={tmp_path / 'ready'}")
    assert (ran.returncode == 0) == (code == 0), ran.stderr
    assert [line.split()[1] for line in (tmp_path / "asked").read_text().splitlines()] == asked
