"""The watermark: read back, corrected, and absent where there is none. Numbers stand in docs/provenance.md."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image
from skimage import data

from imagine.provenance import watermark
from imagine.provenance.watermark import BITS, MEANINGS, MOST_WRONG, add_watermark, code_word, read_watermark


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(data.astronaut()).resize((256, 256), Image.Resampling.LANCZOS)


def test_code_words_can_be_corrected() -> None:
    for one, other in itertools.combinations(MEANINGS, 2):
        assert (code_word(one) != code_word(other)).sum() == 16 > 2 * MOST_WRONG


def test_a_mark_is_read_back_also_from_a_jpeg_and_is_hardly_visible(photo: Image.Image) -> None:
    made = add_watermark(photo, "recorded")
    assert made is not None and made.wrong_bits <= MOST_WRONG and made.image.size == photo.size
    change = np.abs(np.asarray(made.image, float) - np.asarray(photo, float))
    assert 0 < change.max() <= 12 and change.mean() < 2.5
    file = io.BytesIO()
    made.image.save(file, "JPEG", quality=85)
    for picture in (made.image, Image.open(io.BytesIO(file.getvalue()))):
        reading = read_watermark(picture)
        assert reading.found and reading.consent == "recorded"


def test_a_picture_without_a_mark_has_none(photo: Image.Image) -> None:
    assert not read_watermark(photo).found and not read_watermark(Image.new("RGB", (128, 128), "white")).found


def test_wrong_bits_are_corrected(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (0, MOST_WRONG, MOST_WRONG + 1):
        bits = code_word("not recorded")
        bits[:wrong] = 1 - bits[:wrong]
        scores = {"rivagan_decoder.onnx": bits[None]}
        monkeypatch.setattr(watermark, "_run", lambda name, inputs, scores=scores: scores[name])
        reading = read_watermark(photo)
        assert reading.found == (wrong <= MOST_WRONG) and reading.wrong_bits == wrong and BITS == 32
        assert reading.consent == "not recorded"


def test_the_mark_is_on_by_default_only_where_it_is_reliable() -> None:
    assert watermark.is_reliable((256, 300)) and not watermark.is_reliable((255, 1024))
    assert not watermark.is_reliable((4096, 4096))
