"""Several people in pictures of the stock pipelines: regions, and attempts until a picture shows them."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagine.errors import ConfigError, PromptError
from imagine.people.assignment import PersonResult
from imagine.pipeline.attempts import to_image
from imagine.records import VISION
from imagine.stock.call import Batch
from imagine.stock.people import PLACED_NOTE, drawn_size, region_rows
from tests import tiny, tiny_stock
from tests.faces import HalvesFinder, Threshold
from tests.tiny_stock import SIDE, draw, same

PROMPT = "{ann} in a red hat, looking to {bob}"
ANN, BOB = tiny.photo(1), tiny.photo(2)
BOTH = {"ann": ANN, "bob": BOB}
HALVES = {"ann": (0, 0, 0.5, 1), "bob": (0.5, 0, 1, 1)}


def seen_regions(pipe: Any, **options: Any) -> Any:
    """Return the regions of the references in one call."""
    seen: list[Any] = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["cross_attention_kwargs"]["conditioning"].regions.get(VISION)),
        with_kwargs=True,
    )
    draw(pipe, **{"prompt": PROMPT, "reference": BOTH, "num_inference_steps": 1, **options})
    hook.remove()
    return seen[0]


def test_people_of_an_adapter_without_a_router_stand_from_left_to_right(pipe: Any) -> None:
    plain = pipe(PROMPT, reference=BOTH, generator=tiny.generator(7), num_inference_steps=2, output_type="pt")
    assert PLACED_NOTE in plain.notes
    placed = pipe(
        PROMPT, reference=BOTH, generator=tiny.generator(7), num_inference_steps=2, output_type="pt",
        layout="left to right",
    )  # fmt: skip
    assert torch.equal(plain.images, placed.images) and PLACED_NOTE not in placed.notes
    assert torch.equal(plain.images, draw(pipe, PROMPT, reference=BOTH, layout=HALVES))
    exchanged = {"bob": HALVES["ann"], "ann": HALVES["bob"]}
    other = draw(pipe, PROMPT, reference=BOTH, layout=exchanged)
    assert not same(plain.images, other)
    assert torch.equal(other, draw(pipe, PROMPT, reference={"bob": BOB, "ann": ANN}))


def test_the_regions_have_the_rows_of_the_stock_batch(pipe: Any) -> None:
    regions = seen_regions(pipe, num_images_per_prompt=2, guidance_scale=3.0)
    assert regions.shape[:2] == (4, 2) and regions.shape[2:] == (SIDE // pipe.vae_scale_factor,) * 2
    half = regions.shape[3] // 2
    assert (regions[:, 0, :, :half] == 1).all() and (regions[:, 0, :, half:] == 0).all()
    assert len(seen_regions(pipe, guidance_scale=1.0)) == 1
    assert seen_regions(pipe, prompt="a person", reference=ANN) is None
    assert (
        seen_regions(pipe, prompt="a person", reference={"ann": ANN}, layout={"ann": (0, 0, 1, 0.5)})[0, 0, -1, 0] == 0
    )


def test_rows_without_a_person_show_the_empty_picture_everywhere() -> None:
    regions = torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]]]])
    rows = region_rows(regions, Batch(1, 2, True), True)
    assert rows is not None and rows[:2, 0].eq(1).all() and rows[:2, 1].eq(0).all() and torch.equal(rows[2:3], regions)
    assert region_rows(None, Batch(1, 1, True), True) is None


def test_pictures_of_a_batch_have_their_own_layout(pipe: Any) -> None:
    prompts, references = [PROMPT, "{bob} hugs {ann}"], [BOTH, {"bob": BOB, "ann": ANN}]
    generators = [tiny.generator(7), tiny.generator(8)]
    together = draw(pipe, prompts, reference=references, generator=generators)
    for row in range(2):
        assert same(together[row : row + 1], draw(pipe, prompts[row], reference=references[row], seed=7 + row))


def test_the_size_of_the_picture_gives_the_shape_of_the_regions(xl: bool) -> None:
    pipe = tiny_stock.personal(tiny_stock.stock(xl))
    assert drawn_size(pipe, {}) == (SIDE, SIDE) and drawn_size(pipe, {"height": 32}) == (32, SIDE)
    assert seen_regions(pipe, width=2 * SIDE).shape[2:] == (8, 16)
    picture = Image.new("RGB", (48, 32))
    img2img = tiny_stock.personal(tiny_stock.stock(xl, "Img2Img"))
    for image in (picture, [picture], np.asarray(picture), torch.zeros(1, 3, 32, 48)):
        assert drawn_size(img2img, {"image": image}) == (32, 48)
    assert seen_regions(img2img, image=picture, strength=1.0).shape[2:] == (16, 24)
    inpaint = tiny_stock.personal(tiny_stock.stock(xl, "Inpaint"))
    assert drawn_size(inpaint, {"image": picture}) == (SIDE, SIDE)


def test_calls_that_cannot_be_drawn_raise_one_sentence(pipe: Any) -> None:
    for options, error, message in (
        ({"layout": {"eve": (0, 0, 1, 1)}}, ConfigError, "names 'eve'"),
        ({"layout": {"ann": (0, 0, 0.6, 1), "bob": (0.4, 0, 1, 1)}}, ConfigError, "overlap by 33%"),
        ({"reference": {**BOTH, "eve": ANN}}, PromptError, r"never mentions \{eve\}"),
        ({"attempts": 0}, ConfigError, "attempts=0"),
        ({"attempts": 2, "output_type": "latent"}, ConfigError, "attempts needs pictures"),
    ):
        with pytest.raises(error, match=message):
            pipe(PROMPT, **{"reference": BOTH, **options})


def test_phrases_name_people_in_both_prompts_of_sdxl() -> None:
    pipe = tiny_stock.personal(tiny_stock.stock(True))
    phrases = {"the woman": ANN, "a man": BOB}
    words = "the first person, the woman, sees the second person, a man"
    named = draw(pipe, "the woman sees a man", prompt_2="a man, the woman", reference=phrases)
    plain = "the second person, a man, the first person, the woman"
    assert torch.equal(named, draw(pipe, words, prompt_2=plain, reference=BOTH))


# --- attempts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_picture_that_is_drawn_again_equals_the_one_of_its_seed(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, output_type: str
) -> None:
    monkeypatch.setattr(pipe, "_finder", HalvesFinder())
    shared: dict[str, Any] = {"num_inference_steps": 2, "output_type": output_type, "attempts": 6}
    prompts, references = [PROMPT, "{bob} hugs {ann}"], [BOTH, {"bob": BOB, "ann": ANN}]

    def call(limit: float, prompt: Any, reference: Any, generator: Any, **options: Any) -> Any:
        recogniser = Threshold(limit)
        monkeypatch.setattr(pipe, "_picture_recogniser", lambda: recogniser)
        monkeypatch.setattr("imagine.people.reference_encoder._photo_recogniser", lambda: recogniser)
        pipe.__dict__.pop("_persona_cache", None)
        return pipe(prompt, reference=reference, generator=generator, **{**shared, **options})

    def seeds() -> list[torch.Generator]:
        return [tiny.generator(seed) for seed in range(4)]

    scale = {"identity_scale": [0.5, 1.0], "num_images_per_prompt": 2}
    first = call(2.0, prompts, references, seeds(), **scale)
    assert first.attempts == [1] * 4 and first.people_found == [2] * 4 and first.seeds == [None] * 4
    assert first.people[2] == [PersonResult(name, True, 1.0, True) for name in ("bob", "ann")]
    halves = [np.split(np.asarray(to_image(image)) / 255, 2, axis=1) for image in first.images]
    brighter = sorted(max(half.mean() for half in each) for each in halves)
    out = call(float(np.mean(brighter[1:3])), prompts, references, seeds(), **scale)  # two of four pictures fail
    assert any(seed is not None for seed in out.seeds) and max(out.attempts) > 1, "choose other seeds for this test"
    for row, seed in enumerate(out.seeds):
        wanted = first.images[row]
        if seed is not None:
            prompt = row // 2
            alone = {"identity_scale": [0.5, 1.0][prompt]}
            wanted = call(2.0, prompts[prompt], references[prompt], tiny.generator(seed), **alone).images[0]
            assert not np.array_equal(np.asarray(to_image(wanted)), np.asarray(to_image(first.images[row])))
        difference = np.asarray(to_image(out.images[row]), int) - np.asarray(to_image(wanted), int)
        assert np.abs(difference).max() <= 1


def test_a_tuple_is_drawn_again_too_and_one_person_only_if_asked(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "_finder", HalvesFinder(1))
    recogniser = Threshold(-1.0)
    monkeypatch.setattr(pipe, "_picture_recogniser", lambda: recogniser)
    monkeypatch.setattr("imagine.people.reference_encoder._photo_recogniser", lambda: recogniser)
    options: dict[str, Any] = {"reference": ANN, "num_inference_steps": 1, "output_type": "np"}
    out = pipe("a person", generator=tiny.generator(7), attempts=2, **options)
    assert out.attempts == [2] and out.people[0][0].matched is False
    assert any("nobody who is like the person" in note for note in out.notes)
    whole = pipe("a person", generator=tiny.generator(7), attempts=2, return_dict=False, **options)
    assert np.array_equal(whole[0], out.images)
    assert not hasattr(pipe("a person", generator=tiny.generator(7), **options), "people")
