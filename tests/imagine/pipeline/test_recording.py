"""Records of a call: they repeat the picture, name nobody, and are saved with it; and flags of a safety classifier."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagine.errors import ConfigError, SafetyError
from imagine.personas.consent import Consent
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.pipeline.recording import picture_seeds, weights_hash
from imagine.provenance.detection import detect
from imagine.provenance.marks import Marks
from tests import tiny

PLAIN = Marks(credentials=False)


class Classifier:
    """Flags the word "rude", and what it is told to."""

    name = "test"

    def __init__(self, photos: str = "", pictures: str = "") -> None:
        self.photos, self.pictures = photos, pictures

    def check_prompt(self, prompt: str, people: int) -> str:
        return f"the word is rude, with {people} people" if "rude" in prompt else ""

    def check_photo(self, image: Image.Image) -> str:
        return self.photos

    def check_picture(self, image: Image.Image, prompt: str, people: int) -> str:
        return self.pictures


@pytest.fixture(scope="module")
def pipe() -> ImaginePipeline:
    return tiny.pipeline()


def test_a_record_repeats_the_picture_and_names_nobody(pipe: ImaginePipeline, tmp_path: Path) -> None:
    consent = Consent.state("agreed", "canary note")
    people = {"canary": pipe.enroll(tiny.photo(1), consent=consent), "bob": tiny.photo(2)}
    out = pipe("{bob} on a beach, {canary} smiling", reference=people, generator=tiny.generator(5), guidance_scale=3)
    (record,) = out.records
    assert record.prompt == "{b} on a beach, {a} smiling" and record.seed == 5 and record.steps == 3
    assert [person.consent for person in record.people] == ["not recorded", "agreed"]
    out.save(tmp_path / "x.png", PLAIN)
    assert b"canary" not in (tmp_path / "x.png").read_bytes().lower()
    found = detect(tmp_path / "x.png").record
    assert found["guidance_scale"] == 3 and found["settings"]["dtype"] == "float32"
    again = pipe(
        found["prompt"], reference=dict(zip("ab", people.values(), strict=True)), num_inference_steps=found["steps"],
        generator=tiny.generator(found["seed"]), guidance_scale=found["guidance_scale"],
        identity_scale=found["settings"]["identity_scale"],
    )  # fmt: skip
    assert (np.asarray(again.images[0]) == np.asarray(out.images[0])).all()


def test_seeds_are_recorded_only_where_they_repeat_a_picture() -> None:
    used = tiny.generator(3)
    torch.randn(1, generator=used)
    shared = tiny.generator(4)
    assert picture_seeds([tiny.generator(1), tiny.generator(2)], 2) == [1, 2]
    assert picture_seeds(shared, 2) == [4, None] and picture_seeds([used, None], 2) == [None, None]


def test_copies_and_prompts_are_recorded_in_order(pipe: ImaginePipeline, tmp_path: Path) -> None:
    out = pipe(["one", "two"], num_images_per_prompt=2, generator=[tiny.generator(n) for n in range(4)])
    assert [(record.prompt, record.seed) for record in out.records] == [("one", 0), ("one", 1), ("two", 2), ("two", 3)]
    assert [path.name for path in out.save(tmp_path / "x.png", PLAIN)] == [f"x-{n}.png" for n in (1, 2, 3, 4)]
    with pytest.raises(ConfigError, match="output_type='pil'"):
        pipe("one", output_type="pt").save(tmp_path / "y.png")


def test_the_hash_follows_the_weights(pipe: ImaginePipeline) -> None:
    before = weights_hash(pipe)
    assert before == weights_hash(pipe) == weights_hash(tiny.pipeline()) != weights_hash(tiny.pipeline(seed=1))
    with torch.no_grad():
        next(pipe.unet.parameters()).add_(1)
    assert weights_hash(pipe) != before
    with torch.no_grad():
        next(pipe.unet.parameters()).sub_(1)


def test_a_safety_classifier_refuses_inputs_and_flags_pictures(pipe: ImaginePipeline) -> None:
    assert pipe("one", generator=tiny.generator(1)).flags == []
    plain = pipe("one", generator=tiny.generator(1)).images[0]
    try:
        pipe.safety = Classifier(pictures="because of the test")
        out = pipe("one", generator=tiny.generator(1))
        assert out.flags == ["because of the test"] and out.records[0].flag == out.flags[0]
        assert (np.asarray(out.images[0]) == np.asarray(plain)).all()  # and no black picture
        assert pipe("one", output_type="pt").flags == out.flags
        with pytest.raises(SafetyError, match="The prompt is refused by the safety classifier: the word is rude, with"):
            pipe("rude")
        pipe.safety = Classifier(photos="it is a test")
        with pytest.raises(SafetyError, match="photo 1 is refused by the safety classifier: it is a test"):
            pipe("one", reference=tiny.photo(1))
    finally:
        pipe.safety = None
