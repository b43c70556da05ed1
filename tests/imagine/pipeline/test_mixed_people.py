"""Batches whose pictures have different numbers of people, with and without a router and a layout."""

from typing import Any

import pytest
import torch

from imagine.adapter.adapter import Adapter, BranchSpec
from tests import tiny, tiny_stock

ANN, BOB, EVE = tiny.photo(1), tiny.photo(2), tiny.photo(3)
PROMPTS = ["{ann} hugs {bob}", "{ann} smiles", "{eve}, {bob} and {ann}"]
REFERENCES = {"ann": [ANN, EVE], "bob": BOB, "eve": EVE}
BOXES = {"ann": (0, 0, 0.4, 1), "bob": (0.5, 0, 1, 1)}
PAIR = {"ann": ANN, "bob": BOB}


def routed(denoiser: Any) -> Adapter:
    """Return a random, open identity adapter with a router."""
    torch.manual_seed(5)
    spec = BranchSpec("vision", 16, projection="full", input_width=24, router=True)
    adapter = Adapter(denoiser, [spec], lora_rank=2)
    for name, parameter in adapter.named_parameters():
        if name.endswith("gate") or "lora_B" in name or "router" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapter


def pipeline(stock: bool, router: bool) -> Any:
    pipe: Any = tiny_stock.personal(tiny_stock.stock(False)) if stock else tiny.pipeline()
    if router:
        pipe.load_adapter(routed(pipe.unet))
    return pipe


def draw(pipe: Any, prompt: Any, reference: Any, generator: Any, **options: Any) -> Any:
    options = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 3.0, **options}
    return pipe(prompt, reference=reference, generator=generator, **options)


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
@pytest.mark.parametrize("router", [False, True], ids=["no-router", "router"])
@pytest.mark.parametrize("layout", [None, "left to right", BOXES], ids=["free", "columns", "boxes"])
def test_a_picture_is_the_same_in_a_mixed_batch_as_alone(stock: bool, router: bool, layout: Any) -> None:
    pipe = pipeline(stock, router)
    together = draw(pipe, PROMPTS, REFERENCES, [tiny.generator(seed) for seed in range(3)], layout=layout).images
    for row, prompt in enumerate(PROMPTS):
        own = {name: REFERENCES[name] for name in REFERENCES if f"{{{name}}}" in prompt}
        places = {name: box for name, box in layout.items() if name in own} if isinstance(layout, dict) else layout
        alone = draw(pipe, prompt, own, tiny.generator(row), layout=places).images
        assert alone.isfinite().all() and (together[row] - alone[0]).abs().max() < 1e-4


def test_a_layout_guides_a_router() -> None:
    pipe = pipeline(False, True)
    free, columns, exchanged = (
        draw(pipe, PROMPTS[0], PAIR, tiny.generator(1), layout=layout).images
        for layout in (None, "left to right", {"ann": (0.5, 0, 1, 1), "bob": (0, 0, 0.5, 1)})
    )
    assert not torch.equal(free, columns) and not torch.equal(columns, exchanged)
    one = [draw(pipe, "a person", ANN, tiny.generator(1), layout=each).images for each in (None, "left to right")]
    assert torch.equal(*one)


def test_an_adapter_with_a_router_needs_no_columns_on_a_stock_pipeline() -> None:
    noted = [
        any("router" in note for note in draw(pipeline(True, router), PROMPTS[0], PAIR, tiny.generator(1)).notes)
        for router in (False, True)
    ]
    assert noted == [True, False]


def test_the_unconditional_pass_of_several_people_may_show_an_empty_picture() -> None:
    pipe = pipeline(True, False)
    pipe.load_adapter(tiny_stock.identity(pipe.unet, absent="zeros"))
    assert draw(pipe, PROMPTS[0], PAIR, tiny.generator(1)).images.isfinite().all()
