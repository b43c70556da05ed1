"""`imagine demo`: what it prints, the command it suggests, and what it refuses."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from imagine.adapter.adapter import FILE_NAME
from imagine.cli import demo
from imagine.evaluation import demo_people
from imagine.evaluation.demo import PEOPLE
from tests import tiny
from tests.commands import Run, assert_refused, terminal


def test_the_demo_draws_its_sheet_and_prints_a_command_that_works(
    run: Run, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # These weights hold neither examples nor a judge, so that the shipped ones are used.
    monkeypatch.chdir(tmp_path)
    with terminal(monkeypatch) as progress:
        code, out, _ = run("demo", "--weights", weights, "--output", "out/my demo")
    assert code == 0
    assert demo.ALONE in out
    assert "Similarity to another picture" in out and f"Open {tmp_path / 'out' / 'my demo' / 'demo.png'}" in out
    with Image.open("out/my demo/demo.png") as sheet:
        assert sheet.height > 160 * len(PEOPLE)
    words = shlex.split(out.splitlines()[-1])
    assert run(*words[words.index("generate") :])[0] == 0
    with Image.open("out/my demo/mine.png") as picture:
        assert picture.size == (tiny.SIZE, tiny.SIZE)
    assert all(stage in progress[0] for stage in ("loading the model", "drawing", "0/24", "judging the pictures"))


def test_the_demo_as_json(run: Run, weights: Path, tmp_path: Path) -> None:
    code, out, err = run("demo", "--weights", weights, "--output", tmp_path, "--json")
    result = json.loads(out)
    assert (code, err) == (0, "") and result["sheet"] == str(tmp_path / "demo.png")
    assert result.keys() == {"sheet", "people_sheet", "similarity", "ceiling", "found", "command"}
    assert result["people_sheet"] is None  # these weights were trained with one person in a picture


def test_the_suggested_command_can_be_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "my weights"
    words = shlex.split(demo.generate_command(weights / "examples" / "a.png", Path("out"), weights))
    words = words[words.index("generate") :]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options == {
        "--reference": "my weights/examples/a.png",
        "--prompt": demo.EXAMPLE_PROMPT,
        "--output": "out/mine.png",
        "--weights": "my weights",
    }
    assert "--weights" not in demo.generate_command(Path("a.png"), Path("out"), None)


def test_the_suggested_command_is_that_of_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "imagine").write_text("")
        (tmp_path / folder / "imagine").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "mine" / "python"))
    for path, command in (("other", "mine/imagine"), ("mine", "imagine")):
        monkeypatch.setenv("PATH", str(tmp_path / path))
        assert shlex.split(demo.generate_command(Path("a.png"), Path("out"), None))[:2] == [command, "generate"]
    (tmp_path / "mine" / "imagine").unlink()
    words = shlex.split(demo.generate_command(Path("a.png"), Path("out"), None))
    assert words[:4] == ["mine/python", "-m", "imagine", "generate"]


def test_a_wrong_weights_folder_is_one_sentence(run: Run, tmp_path: Path) -> None:
    code, out, err = run("demo", "--weights", tmp_path, "--output", tmp_path / "out")
    assert_refused(code, out, err)
    assert str(tmp_path) in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [("taken", [], "choose another"), ("taken/below", [], "choose another"), ("out", ["--seed", "9" * 30], "--seed")],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, more: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    # This folder holds no weights: if anything were loaded, the message would be about that.
    code, out, err = run("demo", "--output", output, "--weights", tmp_path, *more)
    assert_refused(code, out, err)
    assert message in err and not (tmp_path / "out").exists()


def test_weights_trained_with_several_people_draw_pairs_too(
    run: Run, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the tokenizer of these weights knows few words
    monkeypatch.setattr(demo_people, "SENTENCES", ("{a} and {b} smiling", "{b} and {a} on a beach"))
    several = Path(shutil.copytree(weights, tmp_path / "weights"))
    path = several / "adapter" / FILE_NAME
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, {**metadata, "people": "2"})
    code, out, _ = run("demo", "--weights", several, "--output", tmp_path / "out")
    assert code == 0 and demo.ALONE not in out
    assert "of 8 recognised" in out and f"Open {tmp_path / 'out' / 'people.png'}" in out
