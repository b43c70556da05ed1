"""One call of a stock pipeline: its batch, its rows, and callbacks that change it while it runs."""

import copy
from typing import Any

import diffusers
import pytest
import torch

from imagine.errors import ConfigError
from imagine.records import Conditioning, Tokens
from imagine.stock.call import Batch, bind_arguments, last_rows, read_call
from imagine.stock.pipelines import personalised_class
from tests import tiny, tiny_ip, tiny_stock
from tests.tiny_stock import draw, same


def test_a_calls_arguments_by_name_and_the_batch_that_it_draws():
    def stock(prompt: Any, height: int = 0, guidance_scale: float = 7.5, **kwargs: Any) -> None: ...

    assert bind_arguments(stock, ("a", 8), {"callback_steps": 1}) == {"prompt": "a", "height": 8, "callback_steps": 1}
    pipe = tiny_stock.stock()
    assert read_call(pipe, stock, {"prompt": "a"}, None)[0] == Batch(1, 1, True)
    given = {"prompt": ["a", "b"], "num_images_per_prompt": 3, "guidance_scale": 1.0}
    assert read_call(pipe, stock, given, None)[0] == Batch(2, 3, False)
    pipe.unet.register_to_config(time_cond_proj_dim=8)  # distilled LCM denoisers have this and never use guidance
    assert read_call(pipe, stock, {"prompt_embeds": torch.zeros(2, 3, 4)}, None)[0] == Batch(2, 1, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identity_guidance_scale": 3.0}, "which only ImaginePipeline has"),
        ({"guidance_balance": True}, "which only ImaginePipeline has"),
        ({"identity_scales": 0.5}, "is it identity_scale[?]"),
        ({"num_inference_step": 2}, "is it num_inference_steps[?]"),
        ({"prompt": "twice"}, "multiple values"),
    ],
)
def test_unknown_arguments_raise_one_sentence(pipe: Any, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        pipe("a person", **options)
    assert "\n" not in str(caught.value)


def test_nothing_of_a_call_remains_after_it(pipe: Any):
    draw(pipe, reference=tiny.photo(1), cross_attention_kwargs={"scale": 1.0})
    assert pipe.cross_attention_kwargs == {"scale": 1.0}


def test_placeholders_are_replaced_in_every_prompt():
    def stock(prompt: Any, guidance_scale: float = 7.5) -> None: ...

    given = {"prompt": ["{ann} smiles", ""], "prompt_2": ["{ann} laughs", ""]}
    _, requests = read_call(tiny_stock.stock(), stock, given, {"ann": 1, "bob": 2})
    assert given == {"prompt": ["the person smiles", ""], "prompt_2": ["the person laughs", ""]}
    assert [len(request.people) for request in requests] == [1, 2]


def test_rows_have_the_order_of_the_stock_batch():
    positive = Tokens(torch.tensor([[[1.0]], [[2.0]]]))
    negative = Tokens(torch.tensor([[[-1.0], [-3.0]], [[-2.0], [-4.0]]]))
    rows = Batch(2, 2, True).rows(positive, negative)
    assert rows.values[:, 0, 0].tolist() == [-1, -1, -2, -2, 1, 1, 2, 2] and rows.mask is not None
    assert rows.mask[0].all() and rows.mask[-1].tolist() == [True, False]
    assert Batch(2, 2, False).rows(positive, negative).values.flatten().tolist() == [1, 1, 2, 2]
    scale = torch.arange(8.0)
    several = torch.tensor([[True, False], [True, True]])
    groups = Batch(2, 2, True).group_rows(several, negative_is_one=False)
    assert groups[:, 1].tolist() == [False, False, True, True] * 2 and groups[:, 0].all()
    assert Batch(2, 2, True).group_rows(several, negative_is_one=True)[:, 1].tolist() == [False] * 6 + [True] * 2
    assert Batch(2, 2, False).group_rows(several, negative_is_one=True).tolist() == groups[:4].tolist()
    routed: dict[str, list[torch.Tensor]] = {}
    record = Conditioning(
        {"a": rows}, {"a": scale, "b": {"x": scale}}, {"a": torch.ones(1, 1, 2, 2)}, {"a": groups}, routed
    )
    last = last_rows(record, 4)
    assert last.groups["a"][:, 1].tolist() == [False, False, True, True] and last.record is routed
    assert last.branches["a"].values[:, 0, 0].tolist() == [1, 1, 2, 2] and len(last.regions["a"]) == 1
    scales: Any = last.scales
    assert scales["a"].tolist() == scales["b"]["x"].tolist() == [4, 5, 6, 7]


def test_only_the_positive_rows_remain_after_guidance_ends(stock: Any, pipe: Any):
    xl = hasattr(stock, "text_encoder_2")
    kind = diffusers.callbacks.SDXLCFGCutoffCallback if xl else diffusers.callbacks.SDCFGCutoffCallback
    seen: list[tuple[int, torch.Tensor]] = []

    def watch(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        record = kwargs["cross_attention_kwargs"]["conditioning"]
        seen.append((len(record.branches["vision"].values), record.scales["vision"]))

    hook = pipe.unet.register_forward_pre_hook(watch, with_kwargs=True)
    options: dict[str, Any] = {"guidance_scale": 4.0, "num_inference_steps": 3}
    options |= {"reference": tiny.photo(1), "identity_scale": 0.7}
    cut = draw(pipe, callback_on_step_end=kind(None, cutoff_step_index=0), **options)
    hook.remove()
    assert [rows for rows, _ in seen] == [2, 1, 1]
    assert [scale.tolist() for _, scale in seen] == [pytest.approx([0.0, 0.7])] + [pytest.approx([0.7])] * 2
    assert not same(cut, draw(pipe, **options))


def test_a_callback_may_end_ip_adapters_as_in_diffusers():
    parts = tiny_ip.components(False)
    pipes = (
        diffusers.StableDiffusionPipeline(**parts),
        personalised_class(diffusers.StableDiffusionPipeline)(**{**parts, "unet": copy.deepcopy(parts["unet"])}),
    )
    file = tiny_ip.nested(tiny_ip.tensors("plus", pipes[0].unet, 0))
    drawn = []
    for each in pipes:
        each.set_progress_bar_config(disable=True)
        each.load_ip_adapter([file], subfolder=[""], weight_name=[""], image_encoder_folder=None)
        options: dict[str, Any] = {"ip_adapter_image": tiny.photo(1), "height": 16, "width": 16}
        options["num_inference_steps"] = 3
        whole = draw(each, **options)
        cutoff = diffusers.callbacks.IPAdapterScaleCutoffCallback(None, cutoff_step_index=0)
        drawn.append(draw(each, **options, callback_on_step_end=cutoff))
        assert not same(whole, drawn[-1])
    assert (drawn[0] - drawn[1]).abs().max() < 1e-5
