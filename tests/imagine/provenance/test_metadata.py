"""Settings in picture files: read back exactly, and by the rules of other programs."""

import io
import json
import re

import pytest
from PIL import Image

from imagine.provenance.metadata import read_settings, save_options
from imagine.provenance.record import PictureRecord, ShownPerson

RECORD = PictureRecord(
    'ein Mädchen, "laughing": Steps: 3', 7, 20, 5.0, "FlowMatchEuler", "owner/base, v2", "0123456789", "blur",
    (ShownPerson("abcdef012345", "agreed"),),
)  # fmt: skip


def read_as_a1111(text: str) -> dict[str, str]:
    """The rules of AUTOMATIC1111's parse_generation_parameters, written from their description in the docstring."""
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(pairs) >= 3
    prompt, negative, in_negative = list[str](), list[str](), False
    for line in lines:
        if line.startswith("Negative prompt:"):
            in_negative, line = True, line.removeprefix("Negative prompt:").strip()
        (negative if in_negative else prompt).append(line)
    values = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    return {**values, "prompt": "\n".join(prompt), "negative": "\n".join(negative)}


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_every_format_keeps_the_text_and_the_record(file_format: str) -> None:
    text, described = RECORD.as_text((64, 48)), RECORD.as_dict({"settings": "on"})
    file = io.BytesIO()
    Image.new("RGB", (64, 48)).save(file, file_format, **save_options(file_format, text, described, "imagine 1"))
    with Image.open(io.BytesIO(file.getvalue())) as opened:
        found = read_settings(opened)
    assert found.text == text and found.record == json.loads(json.dumps(described))


def test_other_programs_read_the_text() -> None:
    found = read_as_a1111(RECORD.as_text((64, 48)))
    assert found["prompt"] == RECORD.prompt and found["negative"] == "blur"
    assert (found["Seed"], found["Steps"], found["CFG scale"], found["Size"]) == ("7", "20", "5", "64x48")
    assert found["Model"] == "owner/base, v2" and found["Model hash"] == "0123456789"
    assert found["Imagine consent"] == "recorded" and found["Imagine personas"] == "abcdef012345"


def test_the_prompt_can_be_left_out() -> None:
    text, described = RECORD.as_text((64, 48), with_prompt=False), RECORD.as_dict({}, with_prompt=False)
    assert "laughing" not in text + json.dumps(described) and "blur" not in text and "Seed: 7" in text


def test_consent_counts_only_if_everybody_gave_it() -> None:
    assert PictureRecord().consent == "no person"
    assert PictureRecord(people=(ShownPerson("a", "self"), ShownPerson("b"))).consent == "not recorded"


def test_damaged_metadata_count_as_absent() -> None:
    picture = Image.new("RGB", (8, 8))
    picture.info = {"imagine": "{", "parameters": "x"}
    assert read_settings(picture).record is None and read_settings(picture).text == "x"
    assert read_settings(Image.new("RGB", (8, 8))).text == ""
