"""Tests of the installation: the targets of the Makefile, and the wheel."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

from tests.root import ROOT

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(verb: str, *variables: str) -> subprocess.CompletedProcess[str]:
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", verb, *variables], cwd=ROOT, env=mine, capture_output=True, text=True)


def script(path: Path, *lines: str) -> Path:
    """Write an executable that appends its arguments to the file `asked` beside it and then runs `lines`."""
    path.write_text("\n".join(["#!/bin/sh", f'echo "$*" >> {path.with_name("asked")}', *lines, ""]))
    path.chmod(0o755)
    return path


@needs_make
@pytest.mark.parametrize(("code", "asked"), [(0, ["train", "train.assemble"]), (3, ["train"]), (2, ["train"])])
def test_weights_are_assembled_only_after_the_last_image(tmp_path: Path, code: int, asked: list[str]) -> None:
    python = script(tmp_path / "python", f'[ "$2" != train ] || exit {code}')
    (tmp_path / "ready").touch()  # newer than its prerequisites
    ran = make("weights", f"PY={python}", f"READY={tmp_path / 'ready'}")
    assert (ran.returncode == 0) == (code == 0), ran.stderr
    assert [line.split()[1] for line in (tmp_path / "asked").read_text().splitlines()] == asked


def python_of_version(path: Path, minor: int) -> None:
    """Write a command that runs this Python but reports another minor version."""
    answer = f"import sys; sys.version_info = (3, {minor}, 0); exec(sys.argv[1])"
    script(path, f'exec {sys.executable} -c "{answer}" "$2"')


@needs_make
@pytest.mark.parametrize(
    ("found", "taken"),
    [
        ({"python3": 12, "python3.13": 13}, "python3"),
        ({"python3": 14, "python3.11": 11}, "python3.11"),
        ({"python3": 14}, "python3"),
        ({"python3": 9}, ""),
    ],
)
def test_setup_chooses_a_python_that_the_pinned_versions_support(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, int], taken: str
) -> None:
    for name, minor in found.items():
        python_of_version(tmp_path / name, minor)
    for name in {"python3", "python3.13", "python3.12", "python3.11", "python3.10"} - found.keys():
        script(tmp_path / name, "exit 127")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    ran = make("setup", "--dry-run", f"VENV={tmp_path / 'venv'}")
    assert f'"{taken}" -m venv' in ran.stdout


@needs_make
def test_setup_recreates_an_incomplete_venv_and_keeps_a_complete_one(tmp_path: Path) -> None:
    python = script(tmp_path / "python3", "exit 7")
    setting = (f"VENV={tmp_path / 'venv'}", f"PYTHON={python}")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    assert make("setup", *setting).returncode != 0
    assert (tmp_path / "asked").read_text() == f"-m venv --clear {tmp_path / 'venv'}\n"
    script(tmp_path / "venv" / "bin" / "uv")  # a venv that uv can fill needs no pip
    assert make("setup", *setting).returncode == 0
    assert (tmp_path / "asked").read_text().count("\n") == 1 and (tmp_path / "venv" / ".ready").exists()


def test_every_required_package_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    asked = {
        re.split(r"[^\w.-]", each)[0].lower().replace("_", "-") for each in requires("imagine-yourself-open") or ()
    }
    assert len(asked) > 25 and asked - pinned == set()
    assert "opencv-python" not in pinned, "opencv-python needs system libraries; use opencv-python-headless"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel offline, with the packages that `make setup` installs, and return a folder with its contents."""
    made, folder = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(made)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (wheel,) = made.iterdir()
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_holds_the_packages_the_weights_and_the_command(unpacked: Path) -> None:
    (facts,) = unpacked.glob("*.dist-info")
    assert {path.name for path in unpacked.iterdir()} == {"imagine", "train", "data_synth", facts.name}
    assert "imagine = imagine.cli:main" in (facts / "entry_points.txt").read_text()
    assert {path.name for path in (facts / "licenses").iterdir()} == {"LICENSE", "NOTICE"}
    shipped = [path.relative_to(ROOT / "weights") for path in (ROOT / "weights").rglob("*") if path.is_file()]
    assert Path("unet/diffusion_pytorch_model.safetensors") in shipped
    packed = unpacked / "imagine" / "_weights"
    assert [path for path in shipped if (packed / path).read_bytes() != (ROOT / "weights" / path).read_bytes()] == []
    pages = [path.relative_to(ROOT) for path in (ROOT / "imagine" / "app").rglob("*") if path.is_file()]
    assert len(pages) > 8 and [path for path in pages if not (unpacked / path).is_file()] == []
    assert (unpacked / "data_synth" / "review" / "page.html").is_file() and (
        unpacked / "imagine" / "py.typed"
    ).is_file()


def test_an_installed_wheel_finds_the_weights_that_it_holds(unpacked: Path) -> None:
    setting = {**os.environ, "PYTHONPATH": str(unpacked), "HF_HUB_OFFLINE": "1"}
    code = "import imagine.networks.weights; print(imagine.networks.weights.default_folder())"
    found, doctor = (
        subprocess.run([sys.executable, *command], cwd=unpacked, env=setting, capture_output=True, text=True)
        for command in (["-c", code], ["-m", "imagine", "doctor", "--json"])
    )
    assert Path(found.stdout.strip()) == unpacked / "imagine" / "_weights", found.stderr
    assert doctor.returncode == 0, doctor.stderr
    assert str(unpacked / "imagine" / "_weights") in json.dumps(json.loads(doctor.stdout))
