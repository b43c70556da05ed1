"""Stock pipelines that know people: without a reference they are diffusers' own bit for bit, with one they are not."""

from typing import Any

import pytest
import torch

from imagine.stock import Personal, imagined
from tests import tiny, tiny_stock

PROMPT = "a person smiling on a beach"
OTHER = 'an old woman in a blue shirt with the letters "OK"'


def draw(pipe: Any, prompt: Any = PROMPT, seed: int = 7, **options: Any) -> torch.Tensor:
    generator = options.pop("generator", None) or tiny.generator(seed)
    steps = options.pop("num_inference_steps", 2)
    pictures = pipe(prompt, generator=generator, num_inference_steps=steps, output_type="pt", **options).images
    assert isinstance(pictures, torch.Tensor) and pictures.isfinite().all()
    return pictures


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() < 1e-4)


@pytest.fixture(scope="module", params=[False, True], ids=["sd15", "sdxl"])
def xl(request: Any) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def stock(xl: bool) -> Any:
    return tiny_stock.stock(xl)


@pytest.fixture(scope="module")
def pipe(xl: bool) -> Any:
    return tiny_stock.personal(tiny_stock.stock(xl))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_without_a_reference_or_at_strength_zero_it_is_the_stock_picture(stock: Any, pipe: Any, guidance: float):
    wanted = draw(stock, guidance_scale=guidance)
    assert torch.equal(draw(pipe, guidance_scale=guidance), wanted)
    off = draw(pipe, guidance_scale=guidance, reference=tiny.photo(1), identity_scale=0.0)
    assert torch.equal(off, wanted)
    shown = draw(pipe, guidance_scale=guidance, reference=tiny.photo(1))
    assert not same(shown, wanted) and not same(shown, draw(pipe, guidance_scale=guidance, reference=tiny.photo(2)))


def test_two_people_in_one_batch_come_out_as_one_by_one(pipe: Any):
    prompts, references = [PROMPT, OTHER, PROMPT], [tiny.photo(1), [tiny.photo(2), tiny.photo(3)], tiny.photo(4)]
    generators = [tiny.generator(seed) for seed in (1, 2, 3)]
    together = draw(pipe, prompts, reference=references, generator=generators)
    for row, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        assert same(together[row : row + 1], draw(pipe, prompt, reference=reference, seed=row + 1))


def test_imagined_classes_are_stock_ones_by_name_and_always_the_same(stock: Any, pipe: Any):
    assert type(pipe) is imagined(type(stock)) is imagined(type(pipe))
    assert isinstance(pipe, Personal) and isinstance(pipe, type(stock)) and type(pipe).__name__ == type(stock).__name__
