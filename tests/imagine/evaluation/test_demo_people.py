"""The demo's second sheet: which weights draw it, what it shows of each person, and its error."""

from pathlib import Path

import pytest
from PIL import Image

from imagine.errors import ConfigError
from imagine.evaluation import demo, demo_people
from imagine.people.assignment import PersonResult
from tests import tiny


@pytest.fixture(autouse=True)
def short_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer of the tiny pipeline knows few words, so that the demo's sentences are too long for it."""
    monkeypatch.setattr(demo_people, "SENTENCES", ("{a} and {b} smiling", "{b} and {a} on a beach"))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return demo.write_examples(tmp_path_factory.mktemp("examples"))


def test_only_weights_that_were_trained_with_several_people_draw_it() -> None:
    pipe = tiny.pipeline()
    assert not demo_people.draws_two_people(pipe)
    assert not demo_people.draws_two_people(tiny.pipeline(with_adapter=False))
    assert pipe.adapter is not None
    pipe.adapter.metadata = {**pipe.adapter.metadata, "people": "4"}
    assert demo_people.draws_two_people(pipe)


def test_the_sheet_shows_every_pair_with_every_sentence(references: list[Path], tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    assert pipe.adapter is not None
    pipe.adapter.metadata = {**pipe.adapter.metadata, "people": "2"}
    sheet = demo_people.draw_people_sheet(pipe, references, tmp_path)
    assert sheet.shown == 2 * len(demo_people.PAIRS) * len(demo_people.SENTENCES) and 0 <= sheet.matched <= sheet.shown
    with Image.open(sheet.path) as picture:
        assert picture.width > 240 * (2 + len(demo_people.SENTENCES)) and picture.height > 160 * len(demo_people.PAIRS)


def test_notes_say_who_was_recognised() -> None:
    people = [PersonResult("a", True, 0.75, True), PersonResult("b", True, 0.25, False), PersonResult("a", False)]
    assert demo_people.notes([*people, PersonResult("b", True)]) == [
        ("a: recognised (0.75)", True),
        ("b: found, not recognised (0.25)", False),
        ("a: missing", False),
        ("b: found", True),
    ]


def test_a_sheet_that_cannot_be_written_is_one_sentence(references: list[Path], tmp_path: Path) -> None:
    (tmp_path / "people.png").mkdir()
    with pytest.raises(ConfigError, match=r"people\.png cannot be written"):
        demo_people.draw_people_sheet(tiny.pipeline(), references, tmp_path)
