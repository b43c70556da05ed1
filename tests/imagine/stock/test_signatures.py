"""Every method of ours takes what the stock method takes, and its signature says so."""

import inspect
import typing
from typing import Any

import diffusers
import pytest

import imagine.stock
from imagine.stock import STOCK_PIPELINES
from imagine.stock.pipelines import PersonalisationMixin
from tests import tiny, tiny_stock

OURS = ("reference", "identity_scale", "identity_window", "identity_blocks", "refine_faces", "face", "on_no_face",
        "branch_embeds", "negative_branch_embeds", "layout", "attempts")  # fmt: skip


def replaced_methods(stock: type) -> list[str]:
    """Return the public methods of a stock class that our mixins replace."""
    mixins = [base for base in PersonalisationMixin.__mro__ if base.__module__.startswith("imagine.")]
    names = {
        name for mixin in mixins for name, each in vars(mixin).items() if callable(each) or hasattr(each, "__func__")
    }
    return sorted(name for name in names if not name.startswith("_") and callable(getattr(stock, name, None)))


@pytest.mark.parametrize("name", STOCK_PIPELINES)
def test_the_call_lists_the_stock_arguments_and_ours(name: str):
    stock, ours = getattr(diffusers, name), getattr(imagine.stock, name)
    wanted, found = (inspect.signature(each.__call__).parameters for each in (stock, ours))
    assert [each for each in found if each not in OURS] == list(wanted) and set(OURS) <= set(found)
    assert all(found[each] == wanted[each] for each in wanted)
    hints = typing.get_type_hints(ours.__call__)
    assert set(typing.get_type_hints(stock.__call__)) <= set(hints) and "identity_scale" in hints
    assert "identity_scale:" in ours.__call__.__doc__ and "num_inference_steps" in ours.__call__.__doc__


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLControlNetInpaintPipeline"])
def test_every_replaced_method_takes_the_stock_arguments_by_place_and_by_name(name: str):
    stock, ours = getattr(diffusers, name), getattr(imagine.stock, name)
    methods = replaced_methods(stock)
    assert {"from_pretrained", "save_pretrained", "from_pipe", "enable_group_offload", "load_ip_adapter"} <= set(
        methods
    )
    for method in methods:
        wanted = list(inspect.signature(getattr(stock, method)).parameters)
        assert list(inspect.signature(getattr(ours, method)).parameters)[: len(wanted)] == wanted, method


def test_a_bound_call_can_be_inspected_and_takes_stock_arguments_by_place():
    pipe = tiny_stock.personal(tiny_stock.stock())
    parameters = inspect.signature(pipe.__call__).parameters
    assert next(iter(parameters)) == "prompt" and parameters["guidance_scale"].default == 7.5
    by_place = pipe("a person", 16, 16, 1, reference=tiny.photo(1), generator=tiny.generator(1), output_type="pt")
    by_name = pipe(
        prompt="a person", height=16, width=16, num_inference_steps=1, reference=tiny.photo(1),
        generator=tiny.generator(1), output_type="pt",
    )  # fmt: skip
    assert by_place.images.equal(by_name.images) and by_place.faces


def test_saving_by_place_names_the_variant(tmp_path: Any):
    pipe = tiny_stock.personal(tiny_stock.stock())
    pipe.save_pretrained(tmp_path, True, "fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert (tmp_path / "adapter" / "adapter.fp16.safetensors").is_file()
