"""A photo of another person among several: dlib for photographs, our own recogniser for drawings."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from imagine.errors import FaceError, ImagineError, WeightsError
from imagine.people import photo_recogniser
from imagine.people.photo_recogniser import PhotoRecogniser
from imagine.people.strangers import Identity, find_stranger
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.records import FaceBox
from imagine.world import render, sample_contexts, sample_people
from tests.photographs import astronaut


class Numbers:
    """Embeddings of one number each."""

    same, is_certain = 1.0, True

    def embed(self, image: Image.Image, face: FaceBox) -> NDArray[np.float32]:
        raise AssertionError("the embeddings are given")

    def distance(self, one: NDArray[np.float32], two: NDArray[np.float32]) -> float:
        return abs(float(one[0]) - float(two[0]))


def identities(*values: "float | None") -> list[Identity | None]:
    numbers = Numbers()
    return [None if value is None else Identity(numbers, np.array([value])) for value in values]


@pytest.mark.parametrize(
    ("values", "stranger"),
    [
        ((0.0, 0.5, 0.9), None),
        ((0.0, 0.8, 1.6), None),  # the first and the last belong together through the second
        ((0.0, 5.0), 1),
        ((5.0, 0.0, 0.5), 0),
        ((0.0, 0.5, 5.0, 5.5), 2),  # two pairs: the first photo's person counts
        ((0.0, None, 0.5), None),
        ((None, 3.0), None),
    ],
)
def test_the_stranger_is_outside_the_largest_group(values: "tuple[float | None, ...]", stranger: "int | None") -> None:
    found = find_stranger(identities(*values))
    assert (None if found is None else found.index) == stranger


def test_faces_of_different_recognisers_are_not_compared() -> None:
    one, two = identities(0.0)[0], identities(9.0)[0]
    assert find_stranger([one, two]) is None


@pytest.fixture(scope="module")
def pipe() -> ImaginePipeline:
    return ImaginePipeline.from_pretrained()


@pytest.fixture(scope="module")
def someone_else() -> Image.Image:
    """A photograph of another person than the astronaut: the cameraman."""
    import skimage.data

    return Image.fromarray(skimage.data.camera()).convert("RGB").resize((1024, 1024))


def test_enrolling_two_photographs_of_two_people_is_refused_and_names_the_photo(
    pipe: ImaginePipeline, someone_else: Image.Image, tmp_path: Path
) -> None:
    astronaut().save(tmp_path / "1.png")
    ImageEnhance.Brightness(astronaut()).enhance(0.7).save(tmp_path / "2.png")
    someone_else.save(tmp_path / "3.png")
    photos = [str(tmp_path / f"{number}.png") for number in (1, 2, 3)]
    assert len(pipe.enroll(photos[:2]).faces) == 2
    with pytest.raises(FaceError, match=r"3\.png shows another person .* below 0\.60"):
        pipe.enroll(photos)
    assert len(pipe.enroll(photos, check_identity=False).faces) == 3
    with pytest.raises(FaceError, match="shows another person"):
        pipe("smiling", reference=photos, num_inference_steps=1)


def test_a_drawing_of_another_person_is_reported_in_its_quality(pipe: ImaginePipeline) -> None:
    people, contexts = sample_people([7_700_001, 7_700_001, 7_700_002]), sample_contexts([3, 4, 5])
    images = render(people, contexts, size=128).images
    drawn = [Image.fromarray((each * 255).round().byte().permute(1, 2, 0).numpy()) for each in images]
    warnings = ["another person" in face.quality for face in pipe.enroll(drawn).faces]
    assert warnings == [False, False, True]


def test_without_dlib_nothing_is_compared_and_the_recogniser_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photo_recogniser.model_file.cache_clear()
    monkeypatch.setattr(photo_recogniser, "is_installed", lambda: False)
    with pytest.raises(ImagineError, match=r"\[photos\]"):
        PhotoRecogniser()


def test_another_file_than_the_tested_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    photo_recogniser.model_file.cache_clear()
    monkeypatch.setattr(photo_recogniser, "SHA256", {name: "0" * 64 for name in photo_recogniser.SHA256})
    with pytest.raises(WeightsError, match="not the file that was tested"):
        PhotoRecogniser()
    photo_recogniser.model_file.cache_clear()
