"""Test the measures on rendered people with exact ground truth: each fault must change its measure, and only then."""

import io
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from data_synth.backends.contracts import Draft, Failed
from data_synth.backends.measuring import (
    Measurer,
    attribute_difference,
    face_difference,
    face_sharpness,
    known_box,
    picture_hash,
    quality,
)
from data_synth.backends.text_detector import text_share
from data_synth.records import Candidate, Measures, Reference, TargetSpec
from imagine.evaluation.report import to_pil
from imagine.people.photos import read_photo
from imagine.records import FaceBox
from imagine.world import Contexts, attributes, render, sample_contexts, sample_people
from imagine.world.seeds import HELD_OUT


@dataclass(frozen=True)
class RenderedPicture:
    """A rendered picture with its ground truth."""

    image: Image.Image
    box: FaceBox
    facts: dict[str, Any]

    @property
    def png(self) -> bytes:
        file = io.BytesIO()
        self.image.save(file, format="PNG")
        return file.getvalue()


PEOPLE = (0, 0, 1, 0)  # per picture: one person twice, another person, the first person in another context


def contexts() -> Contexts:
    """Return the contexts: frontal photos, of which the last one is turned and of another scene."""
    drawn = sample_contexts([3, 3, 3, 4])
    calm = {"yaw": 0.0, "pitch": 0.0, "roll": 0.0, "style": 0, "headwear": 0, "framing": 1, "light": 0}
    still = drawn.replace(**calm)
    moods = torch.tensor([0, 2, 0, 4])  # neutral, laughing, neutral, surprised
    return still.replace(expression=moods, yaw=torch.tensor([0.0, 0.0, 0.0, 0.5]))


@lru_cache(maxsize=1)
def pictures() -> tuple[RenderedPicture, ...]:
    people = sample_people([HELD_OUT[number] for number in PEOPLE])
    how = contexts()
    drawn, truth = render(people, how, size=128), attributes(people, how)
    shown = []
    for number, image in enumerate(drawn.images):
        left, top, width, height = drawn.boxes[number].tolist()
        facts = {"box": [left, top, width, height], "attributes": truth[number]}
        shown.append(RenderedPicture(to_pil(image), FaceBox(left, top, width, height, 1.0), facts))
    return tuple(shown)


@lru_cache(maxsize=1)
def portraits() -> tuple[tuple[Image.Image, FaceBox], ...]:
    """Return 48 pictures of different people in random contexts."""
    seeds = range(48)
    drawn = render(sample_people([HELD_OUT[seed] for seed in seeds]), sample_contexts(list(seeds)), size=128)
    boxes = [FaceBox(left, top, width, height, 1.0) for left, top, width, height in drawn.boxes.tolist()]
    return tuple((to_pil(image), box) for image, box in zip(drawn.images, boxes, strict=True))


def crowd() -> list[Image.Image]:
    return [image for image, _ in portraits()]


def bits(one: Image.Image, two: Image.Image) -> int:
    return (int(picture_hash(one), 16) ^ int(picture_hash(two), 16)).bit_count()


def as_jpeg(image: Image.Image, quality: int = 80) -> Image.Image:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


# --- hash -------------------------------------------------------------------------------------------------------------
def test_size_format_and_exposure_change_few_bits_of_the_hash() -> None:
    for image in crowd()[:16]:
        assert len(picture_hash(image)) == 16
        assert bits(image, image.resize((200, 200), Image.Resampling.LANCZOS)) <= 3
        assert bits(image, as_jpeg(image)) <= 3
        assert bits(image, ImageEnhance.Brightness(image).enhance(0.8)) <= 3


def test_different_pictures_have_different_hashes() -> None:
    some = crowd()
    apart = [bits(one, two) for number, one in enumerate(some) for two in some[:number]]
    assert min(apart) > 3
    assert np.median(apart) > 15


def test_the_hash_has_one_bit_per_increase_of_brightness() -> None:
    rising = Image.fromarray(np.tile(np.arange(0, 252, 28, dtype=np.uint8).repeat(4), (32, 1)))
    assert picture_hash(rising) == "f" * 16
    assert picture_hash(rising.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == "0" * 16


# --- quality and sharpness --------------------------------------------------------------------------------------------
def test_broken_pictures_have_low_quality() -> None:
    random = np.random.default_rng(0)
    image = crowd()[0]
    pixels = np.asarray(image, np.float32)
    noisy = Image.fromarray((pixels + random.normal(0, 60, pixels.shape)).clip(0, 255).astype(np.uint8))
    misty = Image.fromarray((pixels * 0.04 + 120).astype(np.uint8))
    burnt = Image.fromarray(((pixels - 128) * 12 + 128).clip(0, 255).astype(np.uint8))
    static = Image.fromarray(random.integers(0, 256, (128, 128, 3), dtype=np.uint8))
    flat = Image.new("RGB", (128, 128), (90, 120, 150))
    for broken in (noisy, misty, burnt, static, flat):
        assert quality(broken) < 0.5 * quality(image)
    assert quality(static) < 0.1
    assert quality(flat) == 0


def test_good_pictures_dark_ones_and_drawings_have_high_quality() -> None:
    good = [quality(image) for image in crowd()]
    assert min(good) > 0.3
    dark = [quality(ImageEnhance.Brightness(image).enhance(0.35)) for image in crowd()]
    assert min(dark) > 0.3


def test_blur_lowers_the_sharpness() -> None:
    shown = pictures()[0]
    blurred = [shown.image.filter(ImageFilter.GaussianBlur(radius)) for radius in (0, 1, 2, 4)]
    sharp = [face_sharpness(image, shown.box, 64) for image in blurred]
    assert sharp == sorted(sharp, reverse=True)
    assert sharp[0] > 5e-4 > sharp[-1]


# --- difference -------------------------------------------------------------------------------------------------------
def test_an_edited_copy_has_a_low_difference() -> None:
    shown = pictures()[0]
    darker = ImageEnhance.Contrast(ImageEnhance.Brightness(shown.image).enhance(0.7)).enhance(1.3)
    larger = shown.image.resize((192, 192), Image.Resampling.LANCZOS)
    box = shown.box
    wide = FaceBox(1.5 * box.left, 1.5 * box.top, 1.5 * box.width, 1.5 * box.height, 1.0)
    beside = replace(shown.box, left=shown.box.left + 2, top=shown.box.top - 2)
    assert face_difference(shown.image, shown.box, shown.image, shown.box) == pytest.approx(0, abs=1e-5)
    assert face_difference(shown.image, shown.box, darker, shown.box) < 0.1
    assert face_difference(shown.image, shown.box, larger, wide) < 0.1
    assert face_difference(shown.image, shown.box, shown.image, beside) < 0.1


def test_another_expression_or_pose_has_a_high_difference() -> None:
    calm, laughing, _, turned = pictures()
    copy = face_difference(calm.image, calm.box, as_jpeg(calm.image), calm.box)
    mood = face_difference(calm.image, calm.box, laughing.image, laughing.box)
    pose = face_difference(calm.image, calm.box, turned.image, turned.box)
    assert copy < 0.05
    assert mood > 0.2
    assert pose > 0.3


def test_a_box_outside_the_picture_raises_no_error() -> None:
    shown = pictures()[0]
    assert face_difference(shown.image, FaceBox(500, 500, 20, 20, 1.0), shown.image, shown.box) == pytest.approx(1)


def test_the_attribute_difference_is_a_share_of_the_common_attributes() -> None:
    one = {"expression": "sad", "gaze": "left", "yaw": "left", "pitch": "up", "roll": "left", "scene": "beach"}
    assert attribute_difference(one, one) == 0
    assert attribute_difference(one, {**one, "gaze": "right", "yaw": "front"}) == pytest.approx(0.4)
    assert attribute_difference(one, {**one, "scene": "room"}) == 0
    assert attribute_difference(one, {"gaze": "right"}) == 1
    assert attribute_difference(one, {"scene": "room"}) is None


# --- writing ----------------------------------------------------------------------------------------------------------
def written(
    image: Image.Image, text: str, size: int, colour: tuple[int, int, int], place: tuple[int, int]
) -> Image.Image:
    marked = image.copy()
    ImageDraw.Draw(marked).text(place, text, fill=colour, font=ImageFont.load_default(size=size))
    return marked


def test_watermarks_are_found() -> None:
    found = [
        text_share(written(image, "STOCKPHOTO", 14, colour, (8, 108)), box) > 0.01
        for image, box in portraits()[:24]
        for colour in ((255, 255, 255), (0, 0, 0))
    ]
    assert np.mean(found) > 0.75


def test_pictures_without_writing_and_letters_on_shirts_are_not_detected() -> None:
    taken = [text_share(image, box) > 0.01 for image, box in portraits()]  # many shirts have up to three letters
    assert np.mean(taken) <= 0.05


def test_the_share_is_close_to_the_area_of_the_writing() -> None:
    page = Image.new("RGB", (200, 200), (200, 190, 180))
    marked = written(page, "Watermark", 24, (20, 20, 20), (20, 80))
    left, top, right, bottom = ImageDraw.Draw(page).textbbox(
        (20, 80), "Watermark", font=ImageFont.load_default(size=24)
    )
    assert text_share(page) == 0
    assert text_share(marked) == pytest.approx((right - left) * (bottom - top) / 200**2, rel=0.25)
    assert text_share(written(page, "ABC", 24, (20, 20, 20), (20, 80))) == 0
    assert text_share(marked, FaceBox(0, 60, 200, 80, 1.0)) == 0  # letters on the face are ignored


def test_a_large_picture_is_shrunk_before_detection() -> None:
    page = written(Image.new("RGB", (1600, 1200), (200, 190, 180)), "Watermark", 80, (20, 20, 20), (900, 1000))
    assert text_share(page) == pytest.approx(text_share(page.resize((800, 600), Image.Resampling.LANCZOS)), rel=0.2)
    assert text_share(page, FaceBox(880, 980, 600, 150, 1.0)) == 0


# --- the measurer -----------------------------------------------------------------------------------------------------
def draft(
    reference: RenderedPicture, candidate: RenderedPicture | bytes, prompt: str = "a person, smiling", **facts: Any
) -> Draft:
    content = candidate if isinstance(candidate, bytes) else candidate.png
    return Draft(
        Reference("r", reference.png, facts=facts.pop("reference_facts", {})),
        TargetSpec("r-0", "r", "a person", prompt),
        Candidate("r-0-0-0", "r-0", content, facts=facts),
    )


@lru_cache(maxsize=1)
def measurer() -> Measurer:
    made = Measurer(Measurer.Settings(reader=True))
    made.load()
    return made


def measured(*drafts: Draft, by: Measurer | None = None) -> list[Measures]:
    found = (by or measurer()).measure(drafts)
    assert not any(isinstance(one, Failed) for one in found)
    return found  # type: ignore[return-value]


def test_the_shipped_judge_measures_identity_and_difference() -> None:
    calm, laughing, other, turned = pictures()
    copied, moved, stranger, elsewhere = measured(*(draft(calm, one) for one in (calm, laughing, other, turned)))
    assert copied.similarity == pytest.approx(1, abs=1e-3)
    assert copied.difference == 0
    for one in (moved, elsewhere):
        assert one.similarity is not None
        assert stranger.similarity is not None
        assert stranger.similarity < one.similarity < 0.999
        assert one.difference is not None
        assert one.difference >= 0.2
    assert {one.faces for one in (copied, moved, stranger, elsewhere)} == {1}
    assert elsewhere.attributes["yaw"] == "right"
    assert "hair_style" not in elsewhere.attributes  # an attribute of the identity, not of the context


def test_measures_do_not_depend_on_the_batch() -> None:
    drafts = [
        replace(draft(pictures()[0], one), candidate=Candidate(f"{n}", "r-0", one.png))
        for n, one in enumerate(pictures())
    ]
    assert measured(*drafts) == [one for each in drafts for one in measured(each)]


def test_boxes_and_attributes_in_the_facts_are_used() -> None:
    calm, _, _, turned = pictures()
    quick = Measurer(Measurer.Settings(recogniser="none", text=False))
    quick.load()
    (known,) = measured(draft(calm, turned, reference_facts=calm.facts, **turned.facts), by=quick)
    assert known.attributes == turned.facts["attributes"]
    assert known.difference == attribute_difference(calm.facts["attributes"], turned.facts["attributes"])
    assert (known.faces, known.similarity, known.text) == (1, None, None)
    assert known.sharpness is not None
    (unknown,) = measured(draft(calm, turned), by=quick)
    assert (unknown.faces, unknown.difference, unknown.sharpness, unknown.attributes) == (0, None, None, {})


def test_without_attributes_the_pixels_of_the_face_are_compared() -> None:
    calm, laughing, _, _ = pictures()
    by_pixels = Measurer(Measurer.Settings())
    by_pixels.load()
    copied, moved = measured(draft(calm, calm), draft(calm, laughing), by=by_pixels)
    assert copied.attributes == {}
    assert copied.difference == pytest.approx(0, abs=1e-4)
    assert moved.difference is not None
    assert moved.difference > 0.2


def test_pictures_without_a_face_and_unreadable_pictures() -> None:
    calm = pictures()[0]
    empty = io.BytesIO()
    Image.new("RGB", (128, 128), (120, 160, 200)).save(empty, format="PNG")
    nobody, broken, fine = measurer().measure(
        [draft(calm, empty.getvalue()), draft(calm, b"no picture"), draft(calm, calm)]
    )
    assert isinstance(nobody, Measures)
    assert (nobody.faces, nobody.similarity, nobody.sharpness) == (0, None, None)
    assert isinstance(broken, Failed)
    assert (broken.reason, broken.for_now) == ("a picture that cannot be read", False)
    assert isinstance(fine, Measures)


def test_text_is_not_measured_if_the_prompt_contains_long_writing() -> None:
    calm = pictures()[0]
    some = measured(*(draft(calm, calm, prompt=prompt) for prompt in ('a sign "WELCOME"', 'letters "ABC"', "a sign")))
    assert [one.text is None for one in some] == [True, False, False]


def test_the_identity_contains_recogniser_and_reader() -> None:
    plain, reading = (Measurer(Measurer.Settings(reader=reader)).identity for reader in (False, True))
    assert plain["recogniser"]["weights"] == reading["recogniser"]["weights"]
    assert "reader" in reading
    assert "reader" not in plain
    assert Measurer.Settings(recogniser_settings={"device": "cpu"}).model_dump().get("recogniser_settings") is None


def test_the_box_in_the_facts_is_scaled_with_a_large_photo() -> None:
    file = io.BytesIO()
    Image.new("RGB", (4096, 2048)).save(file, format="JPEG")
    photo = read_photo(file.getvalue())
    box = known_box(photo, {"box": [1000, 400, 200, 300]})
    assert box is not None
    assert (box.left, box.top, box.width, box.height) == (500, 200, 100, 150)
    assert known_box(photo, {}) is None
