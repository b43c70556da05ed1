"""Captions that are too long are cut at the end of a sentence or phrase, counted and named; they stop no run."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imagine.networks.encoders import QUOTED_BYTES, T5_TOKENS
from train.cache.sentences import SentenceStore
from train.cache.shortening import CutCaptions, shorten
from train.data.language import build_text_encoders, make_tokenizers
from train.data.text_states import TextStates

LONG = " ".join(["A person with red hair, a hoodie and a balloon stands in a softly lit room."] * 30)


def words_fit(count: int) -> Any:
    return lambda text: len(text.split()) <= count


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("One two. Three four.", 4, "One two. Three four."),
        ("One two three. Four five six. Seven eight.", 7, "One two three. Four five six."),
        ("Dr. one two three four five six.", 6, "Dr. one two three four five"),  # the sentence would be too short
        ("One two, three four, five six seven eight.", 5, "One two, three four,"),
        ("one two three four five", 3, "one two three"),
        ('She says "stop." Then she goes away from here.', 5, 'She says "stop."'),
    ],
)
def test_a_text_is_cut_at_a_sentence_a_phrase_or_a_word(text: str, count: int, expected: str) -> None:
    assert shorten(text, words_fit(count)) == expected


def test_a_text_without_spaces_is_cut_where_it_fits() -> None:
    assert shorten("x" * 1000, lambda text: len(text) <= 77) == "x" * 77
    assert shorten("日本の写真。空は青い。とても長い文", lambda text: len(text) <= 12) == "日本の写真。空は青い。"
    assert shorten("words", lambda text: not text) == ""


class Gallery:
    """Captions of records: the second is too long."""

    size, pictures, camera, mark = 64, 1, False, "records"

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def captions(self, rows: Tensor, caption_styles: Any) -> list[str]:
        return [self.texts[row] for row in rows.tolist()]

    def letters(self, rows: Tensor) -> Tensor:
        return torch.zeros(len(rows), 4)

    def pairs(self, target: str) -> Tensor:
        return torch.zeros(0, 2, dtype=torch.long)

    def name(self, row: int) -> str:
        return f"record {row}"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizers")
    make_tokenizers(folder, sentences=150)
    return build_text_encoders(folder)


def test_a_long_caption_is_cut_and_named_in_the_world_tasks(
    text: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quote = f'A sign says "{"stop here now " * 30}" in red.'
    gallery: Any = Gallery(["a short one", LONG, quote])
    store = SentenceStore(gallery, text, tmp_path / "photos")
    with caplog.at_level(logging.WARNING, "train"):
        batch = store.take(torch.arange(3), ["dense"] * 3)
    assert batch.t5.mask is not None
    whole = text.encode_t5([shorten(LONG, lambda some: text.fits("t5", some))])
    length = int(whole.mask.sum())
    assert T5_TOKENS * 0.8 < length <= T5_TOKENS and batch.t5.mask[1].sum() == length
    assert torch.allclose(batch.t5.values[1, :length], whole.values[0, :length], atol=2e-2)
    assert 20 < len(batch.letters[2]) < QUOTED_BYTES and text.encode_byt5([f'"{batch.letters[2]}"'])
    report = json.loads((tmp_path / "photos" / "cut_captions.json").read_text())
    assert report["t5"] == {"captions": 1, "records": ["record 1"]} and report["byt5"]["records"] == ["record 2"]
    assert "the caption of record 1 is longer than t5 takes" in caplog.text
    SentenceStore(gallery, text, tmp_path / "photos").take(torch.arange(3), ["dense"] * 3)
    assert json.loads((tmp_path / "photos" / "cut_captions.json").read_text()) == report  # nothing is counted twice


def test_a_count_goes_on_after_a_restart(tmp_path: Path) -> None:
    for name in ("a", "b", "a"):
        cut = CutCaptions(tmp_path / "gallery" / "cut_captions.json")
        cut.add("clip", name)
        cut.save()
    assert json.loads(cut.path.read_text()) == {"clip": {"captions": 2, "records": ["a", "b"]}}
    cut.path.write_text("{torn")
    assert CutCaptions(cut.path).counts == {}


def test_the_task_for_public_bases_cuts_by_the_same_rule(tmp_path: Path) -> None:
    from tests import tiny_stock
    from train.data.public_base import BaseTextEncoders, T5TextEncoder, open_base

    tiny_stock.stock(False).save_pretrained(tmp_path / "base")
    readers = tiny_stock.readers()
    for name in ("t5", "byt5"):
        readers[f"{name}_encoder"].save_pretrained(tmp_path / name)
        readers[f"{name}_tokenizer"].save_pretrained(tmp_path / name)
    cpu = torch.device("cpu")
    base = BaseTextEncoders(open_base(str(tmp_path / "base")), cpu)
    t5, byt5 = (T5TextEncoder(name, tmp_path / name, T5_TOKENS, cpu) for name in ("t5", "byt5"))
    quote = f'A sign says "{"stop here now " * 30}" in red.'
    gallery: Any = Gallery(["a short one", LONG, quote])
    states = TextStates(gallery, [base, t5, byt5], tmp_path / "photos")
    states.read(torch.arange(3), ["dense"])
    dropped = dict.fromkeys(("clip", "t5", "byt5"), torch.zeros(3, dtype=torch.bool))
    taken = states.take(torch.arange(3), ["dense"] * 3, dropped)
    assert taken["byt5"].mask is not None and 20 < taken["byt5"].mask[2].sum() <= QUOTED_BYTES
    report = json.loads((tmp_path / "photos" / "cut_captions.json").read_text())
    assert "record 1" in report["clip"]["records"] and report["t5"]["records"][0] == "record 1"
    assert report["byt5"] == {"captions": 1, "records": ["record 2"]} and "record 0" not in str(report)
    cut = base.load().shorten(LONG)
    assert LONG.startswith(cut) and cut[-1] in ".,d" and len(cut) > 5
