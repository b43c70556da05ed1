"""Adapters follow a pipeline whose denoiser or attention processors are replaced, or leave it with a warning."""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from imagine.adapter.adapter import is_attached
from imagine.adapter.attention import ParallelAttention, attention_layers
from imagine.errors import WeightsError
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.stock.pipelines import personalised_class
from tests import tiny, tiny_ip, tiny_stock

Draw = Callable[..., torch.Tensor]


def world() -> Any:
    return tiny.pipeline()


def draw(pipe: Any, **options: Any) -> torch.Tensor:
    given = {"num_inference_steps": 2, "generator": tiny.generator(7), "output_type": "pt", **options}
    return pipe("a person smiling on a beach", **given).images


def other_denoiser(pipe: Any) -> Any:
    """Return a denoiser of the same layers as the pipeline's, with other weights."""
    torch.manual_seed(99)
    return type(pipe.unet).from_config(pipe.unet.config).eval()


def clean(denoiser: Any) -> bool:
    return not any(isinstance(each.processor, ParallelAttention) for each in attention_layers(denoiser).values())


@pytest.fixture(params=["world", "sd15", "sdxl"])
def pipe(request: Any) -> Any:
    return world() if request.param == "world" else tiny_stock.personal(tiny_stock.stock(request.param == "sdxl"))


def test_adapters_move_to_a_new_denoiser_and_back(pipe: Any):
    before, old, adapter = draw(pipe, reference=tiny.photo(1)), pipe.unet, pipe.adapter
    pipe.unet = other_denoiser(pipe)
    assert pipe.adapter is adapter and is_attached(pipe.unet, adapter) and clean(old)
    moved = draw(pipe, reference=tiny.photo(1))
    assert not torch.allclose(moved, before) and not torch.allclose(moved, draw(pipe))
    pipe.load_adapter(adapter)
    assert pipe.unload_adapter() is adapter and not is_attached(pipe.unet, adapter)
    pipe.load_adapter(adapter)
    pipe.unet = old
    assert torch.equal(draw(pipe, reference=tiny.photo(1)), before)
    pipe.unet = None
    assert clean(old)
    pipe.unet = old
    assert torch.equal(draw(pipe, reference=tiny.photo(1)), before)


def test_an_adapter_that_does_not_fit_the_new_denoiser_leaves_with_a_warning():
    pipe = tiny_stock.personal(tiny_stock.stock())
    old, adapter = pipe.unet, pipe.adapter
    with pytest.warns(UserWarning, match="'vision' was removed from the pipeline.*built for a denoiser with"):
        pipe.unet = tiny_ip.unet()
    assert pipe.adapter is None and clean(old) and clean(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    assert draw(pipe, height=16, width=16).isfinite().all()
    with pytest.raises(WeightsError, match="No adapter is attached"):
        draw(pipe, reference=tiny.photo(1))
    assert pipe.unload_adapter() is None
    with pytest.raises(WeightsError, match="built for a denoiser"):
        pipe.load_adapter(adapter)
    fitting = tiny_stock.identity(pipe.unet)
    pipe.load_adapter(fitting)
    with pytest.raises(WeightsError, match="built for a denoiser"):
        pipe.load_adapter(adapter)
    assert pipe.adapter is fitting and is_attached(pipe.unet, fitting)  # the present one stays


def test_ip_adapters_move_too_or_leave_with_their_scales():
    pipe = personalised_class(type(tiny_stock.stock()))(**tiny_ip.components())
    pipe.set_progress_bar_config(disable=True)
    files = [tiny_ip.nested(tiny_ip.tensors(kind, pipe.unet, seed)) for seed, kind in enumerate(("plus", "linear"))]
    pipe.load_ip_adapter(files, image_encoder_folder=None)
    pipe.set_ip_adapter_scale([0.2, 0.7])
    given: dict[str, Any] = {"ip_adapter_image": [tiny.photo(1), tiny.photo(2)], "height": 16, "width": 16}
    before, old = draw(pipe, **given), pipe.unet
    pipe.unet = other_denoiser(pipe)
    assert clean(old) and not torch.allclose(draw(pipe, **given), before)
    pipe.unet = old
    assert torch.equal(draw(pipe, **given), before)
    with pytest.warns(UserWarning, match="was removed from the pipeline"):
        pipe.unet = tiny_stock.unet(False)
    assert not pipe.ip_adapters and not pipe.ip_scales
    pipe.unload_ip_adapter()


def test_a_pipeline_that_shares_the_old_denoiser_keeps_its_adapter(pipe: Any):
    other = type(pipe).from_pipe(pipe)
    other.finder = pipe.finder
    other.set_progress_bar_config(disable=True)
    before = draw(pipe, reference=tiny.photo(1))
    pipe.unet = other_denoiser(pipe)
    assert torch.equal(draw(other, reference=tiny.photo(1)), before)
    assert not torch.allclose(draw(pipe, reference=tiny.photo(1)), before)
    old = other.unet
    del other
    gc.collect()
    pipe.unet = old
    assert torch.equal(draw(pipe, reference=tiny.photo(1)), before)


def test_a_pipeline_made_with_another_denoiser_takes_the_adapters_along(pipe: Any):
    before = draw(pipe, reference=tiny.photo(1))
    other = ImaginePipeline.from_pipe(pipe, unet=other_denoiser(pipe))
    other.set_progress_bar_config(disable=True)
    assert other.adapter is pipe.adapter and other.finder is pipe.finder
    drawn = draw(other, reference=tiny.photo(1))
    assert not torch.allclose(drawn, before) and not torch.allclose(drawn, draw(other))
    assert torch.equal(draw(pipe, reference=tiny.photo(1)), before)


def test_an_adapter_that_other_code_removed_can_be_unloaded_or_loaded_again(pipe: Any):
    before, adapter = draw(pipe, reference=tiny.photo(1)), pipe.adapter
    for names in (list(attention_layers(pipe.unet)), list(attention_layers(pipe.unet))[:2]):
        for name in names:
            attention_layers(pipe.unet)[name].set_processor(AttnProcessor2_0())
        with pytest.raises(WeightsError, match="load the adapter again"):
            draw(pipe, reference=tiny.photo(1))
        if pipe.text_adapter is not None:  # the world's pipeline: its text adapter was removed too
            pipe.text_adapter.release(pipe.unet)
            pipe.text_adapter.attach(pipe.unet)
        pipe.load_adapter(adapter)
        assert torch.equal(draw(pipe, reference=tiny.photo(1)), before)
    attention_layers(pipe.unet)[names[0]].set_processor(AttnProcessor2_0())
    assert pipe.unload_adapter() is adapter and not is_attached(pipe.unet, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.unet = other_denoiser(pipe)


def test_a_compiled_denoiser_is_the_same_denoiser(pipe: Any):
    adapter, denoiser = pipe.adapter, pipe.unet
    pipe.unet = torch.compile(denoiser)
    assert pipe.adapter is adapter and is_attached(denoiser, adapter) and pipe.denoiser is denoiser
    pipe.unet = denoiser
    assert is_attached(denoiser, adapter)


def test_the_worlds_pipeline_can_be_made_for_prompts_and_photos_only(tmp_path: Any):
    whole = world()
    whole.save_pretrained(tmp_path)
    pipe = ImaginePipeline.from_pretrained(tmp_path, unet=None, vae=None, finder=whole.finder)
    text, wanted = pipe.encode_prompt("a person"), whole.encode_prompt("a person")
    assert text[1].keys() == wanted[1].keys() == {"t5", "byt5"} and torch.allclose(text[0].values, wanted[0].values)
    persona = pipe.enroll(tiny.photo(1))
    drawn = whole(prompt_embeds=text, reference=persona, generator=tiny.generator(7), output_type="pt").images
    assert torch.allclose(
        drawn, whole("a person", tiny.photo(1), generator=tiny.generator(7), output_type="pt").images, atol=1e-5
    )
    with pytest.raises(ValueError, match="without unet and vae"):
        pipe("a person")
    with pytest.raises(ValueError, match="without a unet"):
        pipe.load_adapter(whole.adapter)
    pipe.unet, pipe.vae = other_denoiser(whole), whole.vae
    pipe.unet.load_state_dict(whole.unet.state_dict())
    pipe.set_progress_bar_config(disable=True)
    assert torch.allclose(
        pipe("a person", persona, generator=tiny.generator(7), output_type="pt").images, drawn, atol=1e-5
    )
    pipe = ImaginePipeline.from_pretrained(tmp_path, image_encoder=None, text_encoder_2=None)
    with pytest.raises(ValueError, match="freed or left out"):
        pipe("a person")
