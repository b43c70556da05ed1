"""Calls with several people: phrases as names, layouts, and the size of the picture."""

from typing import Any

import numpy as np
import pytest
import torch

from imagine.errors import ConfigError, PromptError
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.records import VISION
from tests import tiny

PROMPT = "{ann} in a red hat, looking to {bob}"
ANN, BOB = tiny.photo(1), tiny.photo(2)
BOTH = {"ann": ANN, "bob": BOB}


@pytest.fixture(scope="module")
def pipe() -> ImaginePipeline:
    return tiny.pipeline()


def draw(pipe: Any, prompt: Any = PROMPT, reference: Any = BOTH, **options: Any) -> torch.Tensor:
    images: torch.Tensor = pipe(
        prompt, reference=reference, generator=tiny.generator(7), output_type="pt", **options
    ).images
    return images


def test_phrases_and_placeholders_bind_the_same_people(pipe: ImaginePipeline) -> None:
    phrases = draw(pipe, "the woman looks at a man", {"the woman": ANN, "a man": BOB})
    words = "the first person, the woman, looks at the second person, a man"
    assert torch.equal(phrases, draw(pipe, words, BOTH))
    assert not torch.equal(phrases, draw(pipe, "the woman looks at a man", {"the woman": BOB, "a man": ANN}))


def test_a_layout_guides_the_people_and_follows_their_names(pipe: ImaginePipeline) -> None:
    plain, columns = draw(pipe), draw(pipe, layout="left to right")
    halves: dict[str, Any] = {"bob": (0.5, 0, 1, 1), "ann": (0, 0, 0.5, 1)}
    assert not torch.equal(plain, columns) and torch.equal(columns, draw(pipe, layout=halves))
    left = np.zeros((tiny.SIZE, tiny.SIZE), np.uint8)
    left[:, : tiny.SIZE // 2] = 255
    assert torch.equal(columns, draw(pipe, layout={"ann": left, "bob": 255 - left}))
    assert torch.equal(columns, draw(pipe, layout={"ann": left}))  # bob may be anywhere else
    exchanged = draw(pipe, layout={"ann": 255 - left, "bob": left})
    assert not torch.equal(columns, exchanged)
    assert torch.equal(exchanged, draw(pipe, reference={"bob": BOB, "ann": ANN}, layout="left to right"))


def test_a_layout_does_not_change_one_person_who_may_be_everywhere(pipe: ImaginePipeline) -> None:
    one = draw(pipe, "a person", ANN)
    assert torch.equal(one, draw(pipe, "a person", ANN, layout="left to right"))
    assert not torch.equal(one, draw(pipe, "a person", {"ann": ANN}, layout={"ann": (0, 0, 0.5, 1)}))


def test_copies_and_guidance_passes_have_the_layout(pipe: ImaginePipeline) -> None:
    both_scales: tuple[dict[str, Any], ...] = (
        {"guidance_scale": 3.0},
        {"guidance_scale": 3.0, "identity_guidance_scale": 5.0},
    )
    for options in both_scales:
        pair = pipe(
            PROMPT, reference=BOTH, layout="left to right", num_images_per_prompt=2, output_type="pt",
            generator=[tiny.generator(6), tiny.generator(7)], **options,
        ).images  # fmt: skip
        torch.testing.assert_close(pair[1:], draw(pipe, layout="left to right", **options), atol=1e-4, rtol=0)


def test_the_denoiser_gets_the_regions_of_every_row(pipe: ImaginePipeline) -> None:
    seen: list[Any] = []

    def keep(_module: Any, _arguments: Any, options: Any) -> None:
        seen.append(options["cross_attention_kwargs"]["conditioning"].regions[VISION])

    hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    draw(pipe, layout="left to right", guidance_scale=3.0)
    hook.remove()
    assert seen[0].shape == (2, 2, 4, 4) and seen[0][1, 0, 0].tolist() == [1, 1, 0, 0]


def test_weights_for_several_people_draw_wider_canvases() -> None:
    pipe = tiny.pipeline()
    assert draw(pipe).shape == (1, 3, 32, 32)  # nothing says that they were trained with several people
    assert pipe.adapter is not None
    pipe.adapter.metadata = {**pipe.adapter.metadata, "people": "4"}
    sizes = {}
    for count in range(1, 5):
        names = ["ann", "bob", "eve", "joe"][:count]
        sizes[count] = tuple(
            draw(pipe, " and ".join(f"{{{name}}}" for name in names), dict.fromkeys(names, ANN)).shape[2:]
        )
    assert sizes == {1: (32, 32), 2: (32, 48), 3: (32, 64), 4: (48, 64)}
    assert draw(pipe, height=32).shape == draw(pipe, width=32).shape == (1, 3, 32, 32)
    assert draw(pipe, "a beach", None).shape == (1, 3, 32, 32)
    mixed = draw(pipe, ["{ann} smiles", PROMPT], BOTH)
    assert mixed.shape == (2, 3, 32, 48)
    pipe.adapter.metadata = {**pipe.adapter.metadata, "people": "2"}
    assert draw(pipe, "{a}, {b} and {c}", {"a": ANN, "b": BOB, "c": BOB}).shape == (1, 3, 32, 48)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layout": {"eve": (0, 0, 1, 1)}}, ConfigError, "names 'eve'"),
        ({"layout": {"ann": (0, 0, 0.6, 1), "bob": (0.4, 0, 1, 1)}}, ConfigError, "'ann' and 'bob' overlap by 33%"),
        ({"layout": {"ann": np.ones((32, 64))}}, ConfigError, "has the shape"),
        ({"layout": "side by side"}, ConfigError, "layout='side by side' is unknown"),
        ({"reference": {**BOTH, "eve": ANN}}, PromptError, r"never mentions \{eve\}"),
        ({"reference": {"ann": ANN}}, PromptError, r"names \{bob\}"),
    ],
)
def test_calls_that_cannot_be_drawn_raise_one_sentence(
    pipe: ImaginePipeline, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        draw(pipe, **options)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
