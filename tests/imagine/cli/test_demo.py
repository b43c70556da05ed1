"""The demo: what it asks for, the sheet it draws, the line it prints, and its one-sentence errors."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from imagine import cli
from imagine.cli import demo
from imagine.errors import ConfigError
from imagine.evaluation import report
from imagine.evaluation.judge import Judge, Reader, Recogniser
from imagine.evaluation.suites import contexts_for
from imagine.world import attributes, sample_people, seeds
from imagine.world.captions import PHRASES, STYLE_PHRASES
from imagine.world.vocabulary import ATTRIBUTES, TRAITS
from tests import tiny
from tests.root import ROOT

SHIPPED = ROOT / "weights" / demo.EXAMPLES


class Copier:
    """A pipeline that gives back the reference, whatever the sentence."""

    def enroll(self, photos: Sequence[Image.Image]) -> Image.Image:
        return photos[0]

    def __call__(
        self, prompts: list[str], reference: list[Image.Image], generator: list[torch.Generator], output_type: str
    ) -> SimpleNamespace:
        assert len(prompts) == len(reference) == len(generator)
        assert len({one.initial_seed() for one in generator}) == len(generator)
        return SimpleNamespace(images=list(reference))


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    reader = Reader({**ATTRIBUTES, "letters": ()}, TRAITS, size=64, widths=(8, 8, 8, 16), hidden=16)
    return Judge(Recogniser(size=32, widths=(8, 8, 8, 16), dimensions=8), reader)


def test_people_are_the_demos_own_and_sentences_cover_what_is_promised() -> None:
    assert len(demo.PEOPLE) >= 4
    assert all(person in seeds.DEMO for person in demo.PEOPLE)
    assert len(demo.SENTENCES) >= 6
    asked = {name for sentence in demo.SENTENCES for name in sentence.asked}
    assert asked >= {"expression", "gaze", "yaw", "scene", "clothes", "headwear", "style", "letters"}


def test_sentences_say_what_they_ask_for_and_can_be_shown() -> None:
    phrases = {**PHRASES, "style": STYLE_PHRASES}
    wanted = [sentence.asked for sentence in demo.SENTENCES]
    shown = attributes(sample_people(range(len(wanted))), contexts_for(wanted, range(len(wanted))))
    for sentence, row in zip(demo.SENTENCES, shown, strict=True):
        for name, word in sentence.asked.items():
            said = phrases.get(name, {}).get(word, (f'"{word}"' if name == "letters" else word,))
            assert any(phrase in sentence.text for phrase in said), (sentence.text, name, word)
            assert row[name] == word


def test_the_shipped_references_are_these_people(tmp_path: Path) -> None:
    drawn = demo.write_examples(tmp_path)
    shipped = sorted(SHIPPED.glob("*.png"))
    assert [path.name for path in shipped] == [path.name for path in drawn]
    for one, other in zip(shipped, drawn, strict=True):
        with Image.open(one) as a, Image.open(other) as b:
            difference = (report.to_tensor(a) - report.to_tensor(b)).abs().mean()
        assert difference < 0.01, (
            f"{one.name} shows another picture: run imagine.cli.demo.write_examples('weights/examples')"
        )


def test_the_sheet_holds_every_reference_picture_and_score(judge: Judge, tmp_path: Path) -> None:
    people = demo.PEOPLE[:2]
    references = demo.write_examples(tmp_path / "examples", people)
    sheet = demo.draw_sheet(Copier(), judge, references, tmp_path / "out", people=people)
    assert sheet.path == tmp_path / "out" / "demo.png"
    with Image.open(sheet.path) as picture:
        assert picture.width > 160 * (1 + len(demo.SENTENCES))
        assert picture.height > 160 * len(people)
    assert -1 <= sheet.similarity <= 1
    assert 0 <= sheet.found <= 1
    assert sheet.similarity != sheet.ceiling


def test_notes_say_yes_and_no() -> None:
    notes = demo.notes(0.5, 0.75, {"scene": "snow", "letters": "HI"}, {"scene": True, "letters": False})
    assert notes == [("likeness 0.50 (real 0.75)", None), ("snow: yes", True), ("HI: no", False)]


def test_the_printed_line_is_a_command_that_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = demo.generate_line(tmp_path / "my weights" / "examples" / "a.png", Path("out"), tmp_path / "my weights")
    words = shlex.split(line)
    words = words[words.index("generate") :]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options == {
        "--reference": "my weights/examples/a.png",
        "--prompt": demo.EXAMPLE_PROMPT,
        "--output": "out/mine.png",
        "--weights": "my weights",
    }
    assert "--weights" not in demo.generate_line(Path("a.png"), Path("out"), None)


def test_a_wrong_weights_folder_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--weights", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert str(tmp_path) in said.err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo weights")
    tiny.pipeline().save_pretrained(folder)  # the examples, the judge and the finder are then the shipped ones
    return folder


def test_the_demo_draws_its_sheet_and_prints_a_line_that_draws_on(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--weights", str(weights), "--output", "out/my demo"]) == 0
    said = capsys.readouterr().out
    assert "Similarity to another picture" in said and f"Open {tmp_path / 'out' / 'my demo' / 'demo.png'}" in said
    with Image.open("out/my demo/demo.png") as sheet:
        assert sheet.height > 160 * len(demo.PEOPLE)
    words = shlex.split(said.splitlines()[-1])
    assert cli.main(words[words.index("generate") :]) == 0
    with Image.open("out/my demo/mine.png") as picture:
        assert picture.size == (tiny.SIZE, tiny.SIZE)


def test_the_printed_command_is_that_of_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "imagine").write_text("")
        (tmp_path / folder / "imagine").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "mine" / "python"))
    for path, command in (("other", "mine/imagine"), ("mine", "imagine")):
        monkeypatch.setenv("PATH", str(tmp_path / path))
        assert shlex.split(demo.generate_line(Path("a.png"), Path("out"), None))[:2] == [command, "generate"]
    (tmp_path / "mine" / "imagine").unlink()
    words = shlex.split(demo.generate_line(Path("a.png"), Path("out"), None))
    assert words[:4] == ["mine/python", "-m", "imagine", "generate"]


@pytest.mark.parametrize(
    ("output", "more", "says"),
    [("taken", [], "choose another"), ("taken/below", [], "choose another"), ("out", ["--seed", "9" * 30], "--seed")],
)
def test_what_cannot_be_done_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], output: str, more: list[str],
    says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    # A folder of weights that is none: had anything been loaded, the sentence would be about that.
    assert demo.main(["--output", output, "--weights", str(tmp_path), *more]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and says in said.err and not (tmp_path / "out").exists()


def test_a_sheet_that_cannot_be_written_is_one_sentence(judge: Judge, tmp_path: Path) -> None:
    references = demo.write_examples(tmp_path / "examples", demo.PEOPLE[:1])
    (tmp_path / "out" / "demo.png").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"demo\.png cannot be written"):
        demo.draw_sheet(Copier(), judge, references, tmp_path / "out", people=demo.PEOPLE[:1])


def test_a_real_pipeline_draws_the_sheet(judge: Judge, tmp_path: Path) -> None:
    references = demo.write_examples(tmp_path / "examples", demo.PEOPLE[:1])
    sheet = demo.draw_sheet(tiny.pipeline(), judge, references, tmp_path, people=demo.PEOPLE[:1])
    assert sheet.path.is_file()
