"""`imagine`: help, exit codes and refusals that all commands share."""

from pathlib import Path
from typing import Any

import pytest

from imagine import __version__
from tests.commands import Run, assert_refused, process


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["generate"],
        ["enroll", "nobody.jpg", "--output", "me.png"],
        ["inspect", "nothing.safetensors"],
        ["inspect", "x" * 5000],
        ["inspect", "~nobody-at-all"],
        ["enroll", "x" * 5000, "--output", "me.safetensors"],
        ["evaluate", "--output", "x" * 5000],
        ["import-ip-adapter", "x.safetensors", "--base", "sdxl", "--output", "x" * 5000],
        ["export-ip-adapter", "~nobody-at-all", "--output", "x.safetensors"],
        ["doctor", "nobody.jpg"],
        ["doctor", "--weights", "nowhere"],
        ["evaluate", "--weights", "nowhere", "--output", "report"],
        ["evaluate", "--output", "report", "--identities", "none"],
    ],
)
def test_wrong_commands_are_refused(run: Run, tmp_path: Path, monkeypatch: Any, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(*run(*arguments))
    assert not list(tmp_path.iterdir())


def test_an_unexpected_error_exits_with_one_and_without_a_traceback(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("imagine.inspection.inspect", lambda path: [][1])
    code, out, err = run("inspect", tmp_path)
    assert (code, out) == (1, "") and "IndexError" in err and "Traceback" not in err
    monkeypatch.setenv("IMAGINE_DEBUG", "1")
    with pytest.raises(IndexError):
        run("inspect", tmp_path)


def test_help_imports_no_heavy_libraries() -> None:
    check = (
        "import sys; from imagine.cli import main; code = main(['--help']); print(sorted(sys.modules)); sys.exit(code)"
    )
    done = process("-c", check)
    assert done.returncode == 0 and "generate" in done.stdout
    modules = done.stdout.splitlines()[-1]
    assert not any(f"'{name}'" in modules for name in ("torch", "diffusers", "transformers", "PIL", "numpy"))


def test_the_module_is_the_command() -> None:
    done = process("-m", "imagine", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"imagine {__version__}")
    done = process("-m", "imagine", "generate", "--reference", "x.jpg", "--prompt", "smiling", "--output", "x.png")
    assert_refused(done.returncode, done.stdout, done.stderr)
