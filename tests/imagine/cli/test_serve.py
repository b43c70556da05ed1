"""`imagine serve`: its settings and keys, and what it refuses; tests/imagine/serving runs the server itself."""

import argparse
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from imagine.cli import main, serve
from imagine.serving.settings import BaseSettings, ServeSettings
from tests.commands import assert_refused


def run(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: Any) -> tuple[int, str, str]:
    code = main(["serve", "--folder", str(folder), *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_keys_are_made_listed_and_revoked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, tmp_path, "--create-key", "phone", "--json")
    assert code == 0 and json.loads(out)["key"].startswith("imagine_")
    code, out, _ = run(capsys, tmp_path, "--list-keys", "--json")
    (key,) = json.loads(out)["keys"]
    assert key["name"] == "phone" and key["revoked"] is None
    assert run(capsys, tmp_path, "--revoke-key", key["id"])[0] == 0
    assert "revoked" in run(capsys, tmp_path, "--list-keys")[1]
    assert_refused(*run(capsys, tmp_path, "--revoke-key", key["id"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_bach: 3", "no setting 'max_bach': choose from"),
        ("max_batch: zero", "max_batch is wrong"),
        ("- 3", "one setting per line"),
        ("a: [", "not a YAML file"),
    ],
)
def test_wrong_settings_are_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    code, out, err = run(capsys, tmp_path, "--settings", tmp_path / "settings.yaml")
    assert_refused(code, out, err)
    assert message in err


def test_what_cannot_be_served_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no file" in run(capsys, tmp_path, "--settings", tmp_path / "none.yaml")[2]
    assert "no folder" in run(capsys, tmp_path, "--weights", tmp_path / "none")[2]
    assert "is not a port" in run(capsys, tmp_path, "--port", "70000")[2]
    code, _, err = run(capsys, tmp_path, "--host", "0.0.0.0", "--json")
    assert code == 2 and "--create-key" in err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = run(capsys, tmp_path, "--port", taken.getsockname()[1], "--json")
        assert code == 2 and "choose another --port" in err
    with FileLock(tmp_path / "server.lock"):
        code, _, err = run(capsys, tmp_path, "--json")
        assert code == 2 and "Another server" in err


def test_the_arguments_of_a_base_become_settings(tmp_path: Path) -> None:
    command = argparse.ArgumentParser()
    serve.add_commands(command.add_subparsers())
    given = ["serve", "--base", "sdxl", "--ip-adapter", "plus-face-sdxl", "--offload", "model"]
    settings = serve.read_settings(command.parse_args([*given, "--folder", str(tmp_path)]))
    assert settings.base == BaseSettings(name="sdxl", ip_adapter="plus-face-sdxl", offload="model")
    assert ServeSettings.model_validate_json(settings.model_dump_json()) == settings
    assert serve.read_settings(command.parse_args(["serve", "--folder", str(tmp_path)])).base is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--adapter", "a"], "--adapter needs --base"),
        (["--base", "sdxl", "--weights", "w"], "--weights belongs to imagine's own weights"),
        (["--base", "sdxl", "--image-encoder", "e"], "--image-encoder belongs to --ip-adapter"),
        (["--base", "sdxl", "--preset", "balanced"], "--preset belongs to --ip-adapter"),
    ],
)
def test_arguments_that_do_not_fit_the_base_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, given: list[str], message: str
) -> None:
    code, out, err = run(capsys, tmp_path, *given)
    assert_refused(code, out, err)
    assert message in err
