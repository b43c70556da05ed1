"""The demo's contact sheet: its people and prompts, what it shows, and its errors."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from imagine.adapter.adapter import FILE_NAME
from imagine.errors import ConfigError
from imagine.evaluation import demo, report
from imagine.evaluation.judge import Judge, Reader
from imagine.evaluation.suites import contexts_for
from imagine.networks.recogniser import Recogniser
from imagine.world import VERSION, attributes, sample_people, seeds
from imagine.world.captions import PHRASES, STYLE_PHRASES
from imagine.world.vocabulary import ATTRIBUTES, TRAITS
from tests import tiny
from tests.root import ROOT

SHIPPED = ROOT / "weights" / demo.EXAMPLES


class Copier:
    """A pipeline that returns the reference for every prompt."""

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


def test_people_are_held_out_and_sentences_cover_the_attributes() -> None:
    assert len(demo.PEOPLE) >= 4
    assert all(person in seeds.DEMO for person in demo.PEOPLE)
    assert len(demo.SENTENCES) >= 6
    asked = {name for sentence in demo.SENTENCES for name in sentence.asked}
    assert asked >= {"expression", "gaze", "yaw", "scene", "clothes", "headwear", "style", "letters"}


def test_sentences_name_what_they_ask_for_and_can_be_rendered() -> None:
    phrases = {**PHRASES, "style": STYLE_PHRASES}
    wanted = [sentence.asked for sentence in demo.SENTENCES]
    rendered = attributes(sample_people(range(len(wanted))), contexts_for(wanted, range(len(wanted))))
    for sentence, row in zip(demo.SENTENCES, rendered, strict=True):
        for name, word in sentence.asked.items():
            expected = phrases.get(name, {}).get(word, (f'"{word}"' if name == "letters" else word,))
            assert any(phrase in sentence.text for phrase in expected), (sentence.text, name, word)
            assert row[name] == word


def test_the_shipped_references_are_these_people(tmp_path: Path) -> None:
    with safe_open(SHIPPED.parent / "adapter" / FILE_NAME, "pt") as file:
        world = file.metadata().get("world", "portrait-world-1")
    if world != VERSION:
        pytest.skip(f"the shipped weights were trained in {world}, whose renders are their references")
    drawn = demo.write_examples(tmp_path)
    shipped = sorted(SHIPPED.glob("*.png"))
    assert [path.name for path in shipped] == [path.name for path in drawn]
    for one, other in zip(shipped, drawn, strict=True):
        with Image.open(one) as a, Image.open(other) as b:
            difference = (report.to_tensor(a) - report.to_tensor(b)).abs().mean()
        assert difference < 0.01, (
            f"{one.name} shows another picture: run imagine.evaluation.demo.write_examples('weights/examples')"
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


def test_a_sheet_that_cannot_be_written_is_one_sentence(judge: Judge, tmp_path: Path) -> None:
    references = demo.write_examples(tmp_path / "examples", demo.PEOPLE[:1])
    (tmp_path / "out" / "demo.png").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"demo\.png cannot be written"):
        demo.draw_sheet(Copier(), judge, references, tmp_path / "out", people=demo.PEOPLE[:1])


def test_a_real_pipeline_draws_the_sheet(judge: Judge, tmp_path: Path) -> None:
    references = demo.write_examples(tmp_path / "examples", demo.PEOPLE[:1])
    sheet = demo.draw_sheet(tiny.pipeline(), judge, references, tmp_path, people=demo.PEOPLE[:1])
    assert sheet.path.is_file()
