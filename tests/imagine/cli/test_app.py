"""`imagine app`: it serves the page on this machine, and refuses what it cannot serve in one sentence."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from imagine.cli import app, main, serve
from tests.commands import assert_refused
from tests.root import ROOT


def run(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: Any) -> tuple[int, str, str]:
    code = main(["app", "--no-open", "--folder", str(folder), *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_what_cannot_be_served_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no folder" in run(capsys, tmp_path, "--weights", tmp_path / "none")[2]
    (tmp_path / "settings.yaml").write_text("host: 0.0.0.0\n")
    refused = run(capsys, tmp_path, "--settings", tmp_path / "settings.yaml")
    assert_refused(*refused)
    assert "for this machine only" in refused[2]
    monkeypatch.setattr(serve, "NEEDED", (*serve.NEEDED, "a_package_that_nobody_has"))
    refused = run(capsys, tmp_path)
    assert_refused(*refused)
    assert "pip install 'imagine-yourself-open[serve]'" in refused[2]


def test_the_command_serves_the_page_until_it_is_stopped(tmp_path: Path, weights: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "imagine", "app", "--no-open", "--weights", str(weights), "--port", str(port)]
    setting = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--folder", str(tmp_path / "state")], env=setting, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        page = fetched(f"http://127.0.0.1:{port}/")
        assert page == (app.PAGES / "index.html").read_text()
        assert "function" in fetched(f"http://127.0.0.1:{port}/scripts/api.js")
        assert f'"weights":"{weights}"' in fetched(f"http://127.0.0.1:{port}/v1/server")
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert out.startswith(f"The app is at http://127.0.0.1:{port}/ (Ctrl-C stops it).") and "Traceback" not in err
    assert process.returncode in (0, 130), err


def fetched(address: str, within: float = 60.0) -> str:
    """Return what an address holds, once it answers."""
    end = time.monotonic() + within
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < end
            time.sleep(0.1)
