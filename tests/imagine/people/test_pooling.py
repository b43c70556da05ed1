"""Pooling of several photos: weights by quality, and the mean that uses them."""

import pytest
import torch
from PIL import Image

from imagine.errors import ConfigError
from imagine.people.pooling import LOWEST_WEIGHT, checked_pooling, photo_weight, pool
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.records import FaceBox, FaceCrop
from tests import tiny


@pytest.fixture(scope="module")
def pipe() -> ImaginePipeline:
    return tiny.pipeline()


def crop(score: float = 1.0, side: float = 100, sharpness: float = 1.0) -> FaceCrop:
    box = FaceBox(0, 0, side, side, score)
    return FaceCrop(Image.new("RGB", (8, 8)), box, (box,), 0, sharpness, "good")


def test_small_blurred_and_doubtful_faces_count_less() -> None:
    good = photo_weight(crop(), 100)
    assert good == 1
    for poor in (crop(score=0.5), crop(side=20), crop(sharpness=1e-4)):
        assert LOWEST_WEIGHT <= photo_weight(poor, 100) < good
    assert photo_weight(crop(0.1, 5, 0.0), 100) == LOWEST_WEIGHT
    assert photo_weight(FaceCrop(Image.new("RGB", (8, 8)), None, (), -1, 1.0, ""), 100) == 0.25


def test_the_mean_is_weighted_and_has_the_tokens_of_one_photo() -> None:
    one, two = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.allclose(pool([one, two], [(3.0,), (1.0,)], 2, "mean"), torch.full((2, 3), 0.25))
    both = torch.cat([one, two])
    assert torch.allclose(pool([both], [(3.0, 1.0)], 2, "mean"), torch.full((2, 3), 0.25))
    assert torch.allclose(pool([both, two], [(), ()], 2, "mean"), torch.full((2, 3), 0.75))
    assert torch.equal(pool([one, two], [(), ()], 2, "concatenate"), both)
    with pytest.raises(ConfigError, match="choose concatenate or mean"):
        checked_pooling("sum")


def test_a_persona_of_the_mean_draws_and_keeps_its_weights(pipe: ImaginePipeline) -> None:
    photos = [tiny.photo(1), tiny.photo(2), tiny.photo(3)]
    persona = pipe.enroll(photos, pooling="mean")
    assert persona.tokens == tiny.TOKENS and persona.pooling == "mean" and len(persona.photo_weights) == 3
    assert pipe("a person", reference=persona, generator=tiny.generator(1)).images
    assert pipe.enroll([persona]).pooling == "mean"
