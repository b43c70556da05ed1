"""Several people on stock U-Nets: routers attach, cache, learn and are saved with the adapter; rows stay separate."""

import json
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from imagine.adapter.adapter import Adapter, BranchSpec, prepare, read_metadata
from imagine.adapter.attention import attention_layers
from imagine.errors import ConfigError, WeightsError
from imagine.records import Conditioning, Tokens
from tests.imagine.adapter.test_adapter import (
    FEATURES,
    METADATA,
    SD15_SHAPED,
    SDXL_SHAPED,
    TEXT_WIDTH,
    Call,
    build,
    opened,
)

PRESENT = torch.tensor([[True, True], [True, False], [False, False]])
LENGTH = 6


@pytest.fixture(params=[SD15_SHAPED, SDXL_SHAPED], ids=["sd15", "sdxl"])
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    return build(request.param)


@pytest.fixture
def tiny() -> UNet2DConditionModel:
    return build(SD15_SHAPED)


def adapter_for(unet: UNet2DConditionModel, rank: int = 2, **spec: Any) -> Adapter:
    torch.manual_seed(1)
    given: dict[str, Any] = {"projection": "full", "input_width": FEATURES, "router": True, **spec}
    return Adapter(unet, [BranchSpec("vision", TEXT_WIDTH, **given)], lora_rank=rank)


def people(adapter: Adapter, seed: int = 0, **others: Any) -> Conditioning:
    """Return the conditioning of two people, one, and nobody; `seed` chooses the people."""
    features = torch.randn(3, 2 * LENGTH, FEATURES, generator=torch.Generator().manual_seed(seed))
    tokens = adapter.tokens("vision", features, PRESENT.repeat_interleave(LENGTH, 1))
    return Conditioning({"vision": tokens}, groups={"vision": PRESENT}, **others)


@torch.no_grad()
def test_a_new_adapter_gives_the_base_picture_bit_for_bit(unet: UNet2DConditionModel) -> None:
    call, adapter = Call(unet), adapter_for(unet)
    base = call()
    with adapter.attach(unet):
        assert torch.equal(call(people(adapter)), base)
        assert torch.equal(call(prepare(unet, people(adapter))), base)


@torch.no_grad()
def test_each_row_is_as_alone_and_one_person_as_without_groups(unet: UNet2DConditionModel) -> None:
    call, adapter = Call(unet), opened(adapter_for(unet))
    base = call()
    with adapter.attach(unet):
        together = call(people(adapter))
        values = people(adapter).branches["vision"].values
        one = call(Conditioning({"vision": Tokens(values[:, :LENGTH].contiguous())}))
        assert torch.equal(together[1], one[1]) and torch.equal(together[2], base[2])
        assert (together[0] - one[0]).abs().max() > 1e-3
        plain = opened(adapter_for(unet, router=False))
    for name, parameter in plain.named_parameters():
        parameter.copy_(adapter.get_parameter(name))
    with plain.attach(unet):
        assert torch.equal(call(Conditioning({"vision": Tokens(values[:, :LENGTH].contiguous())})), one)
    with adapter.attach(unet):
        pair = Conditioning({"vision": Tokens(values[:1])}, groups={"vision": PRESENT[:1]})
        torch.testing.assert_close(call(pair, slice(0, 1)), together[:1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("with_layout", [False, True], ids=["router", "router and layout"])
@pytest.mark.parametrize("scale", [0.7, torch.tensor([1.0, 0.5, 1.0]), torch.tensor([0.0, 1.0, 1.0])])
def test_prepared_conditioning_gives_the_same_picture(
    unet: UNet2DConditionModel, scale: "float | Tensor", with_layout: bool
) -> None:
    call, adapter = Call(unet), opened(adapter_for(unet))
    regions = {"vision": torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(3))} if with_layout else {}
    with adapter.attach(unet):
        plain = people(adapter, scales={"vision": scale}, regions=regions)
        ready = prepare(unet, plain)
        for _ in range(2):
            assert torch.equal(call(ready), call(plain))
        emptied = Tokens(torch.zeros_like(ready.branches["vision"].values), ready.branches["vision"].mask)
        assert torch.equal(call(replace(ready, branches={"vision": emptied})), call(plain))  # the cache is used


@torch.no_grad()
def test_a_prepared_guided_batch_skips_its_unconditional_rows(tiny: UNet2DConditionModel) -> None:
    call, adapter = Call(tiny), opened(adapter_for(tiny, rank=0))
    with adapter.attach(tiny):
        whole = people(adapter, scales={"vision": torch.tensor([0.0, 1.0, 0.0])})
        broken = people(adapter, scales=whole.scales)
        broken.branches["vision"].values[0] = torch.nan  # rows that are skipped are not computed at all
        assert torch.equal(call(prepare(tiny, broken)), call(prepare(tiny, whole)))


@torch.no_grad()
def test_a_record_has_every_layer_and_every_row_prepared_or_not(unet: UNet2DConditionModel) -> None:
    call, adapter = Call(unet), opened(adapter_for(unet))
    layers = [f"router {name}" for name, attn in attention_layers(unet).items() if attn.is_cross_attention]
    with adapter.attach(unet):
        scales = {"vision": torch.tensor([0.0, 1.0, 1.0])}
        plain: dict[str, list[Tensor]] = {}
        ready: dict[str, list[Tensor]] = {}
        call(people(adapter, scales=scales, record=plain))
        call(prepare(unet, people(adapter, scales=scales, record=ready)))
    assert list(plain) == list(ready) and sorted(plain) == sorted(layers)
    for name in layers:
        assert torch.equal(plain[name][0], ready[name][0]) and len(plain[name]) == 1
        assert plain[name][0].shape[:2] == (3, 3) and plain[name][0].shape[2] in (64, 16, 4)


def test_concurrent_threads_equal_single_calls_bit_for_bit(tiny: UNet2DConditionModel) -> None:
    call, adapter = Call(tiny), opened(adapter_for(tiny))
    found: dict[int, Tensor] = {}
    with adapter.attach(tiny), torch.no_grad():
        conditionings = {seed: people(adapter, seed) for seed in range(4)}
        expected = {seed: call(each) for seed, each in conditionings.items()}

        def work(seed: int) -> None:
            with torch.no_grad():
                ready = prepare(tiny, conditionings[seed])
                for _ in range(3):
                    found[seed] = call(ready)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in conditionings]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in expected)
    assert not torch.equal(expected[0][0], expected[1][0])


# --- training ---------------------------------------------------------------------------------------------------------


def test_gradients_reach_the_routers_and_checkpointing_changes_none(unet: UNet2DConditionModel) -> None:
    call, adapter = Call(unet), opened(adapter_for(unet))
    unet.train()

    def gradients() -> dict[str, Tensor]:
        adapter.zero_grad()
        record: dict[str, list[Tensor]] = {}
        picture = call(people(adapter, record=record))
        routed = sum(each[0][0].square().mean() for each in record.values())
        (picture.square().sum() + routed).backward()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in adapter.named_parameters()}

    with adapter.attach(unet):
        plain = gradients()
        unet.enable_gradient_checkpointing()
        checkpointed = gradients()
    assert [name for name, gradient in plain.items() if not gradient.any()] == []
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


def test_mixed_precision_and_prepared_agree(tiny: UNet2DConditionModel) -> None:
    call, adapter = Call(tiny), opened(adapter_for(tiny))
    with adapter.attach(tiny), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        conditioning = people(adapter)
        found = call(conditioning)
        assert found.isfinite().all() and torch.equal(call(prepare(tiny, conditioning)), found)


def test_the_router_is_a_part_of_its_own(tiny: UNet2DConditionModel) -> None:
    adapter = adapter_for(tiny)
    parts = adapter.parts()
    assert set(parts) == {"vision_branch", "vision_router", "vision_projection", "lora"}
    listed = [id(parameter) for part in parts.values() for parameter in part]
    assert sorted(listed) == sorted(map(id, adapter.parameters()))
    layers = [layer for layer in adapter.layers().values() if layer.branches()]
    assert len(parts["vision_router"]) == 6 * len(layers)
    assert set(adapter_for(tiny, router=False).parts()) == {"vision_branch", "vision_projection", "lora"}


# --- files ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_router_gives_the_same_picture_bit_for_bit(unet: UNet2DConditionModel, tmp_path: Any) -> None:
    call, adapter = Call(unet), opened(adapter_for(unet))
    adapter.save(tmp_path, METADATA)
    assert json.loads(read_metadata(tmp_path)["branches"])[0]["router"] is True
    with adapter.attach(unet):
        expected = call(people(adapter))
    again = Adapter.load(tmp_path, unet)
    assert again.branch_specs == adapter.branch_specs
    with again.attach(unet):
        assert torch.equal(call(people(again)), expected)


def rewrite(file: Any, tensors: dict[str, Tensor], **changes: Any) -> None:
    """Write an adapter's file again with other tensors, and changed values (None: left out) in its branch's spec."""
    with safe_open(file, framework="pt") as opened_file:
        metadata = opened_file.metadata()
    spec = {**json.loads(metadata["branches"])[0], **changes}
    metadata["branches"] = json.dumps([{name: value for name, value in spec.items() if name not in changes or value}])
    save_file(tensors, file, metadata)


@torch.no_grad()
def test_a_file_from_before_routers_loads_without_one(tiny: UNet2DConditionModel, tmp_path: Any) -> None:
    adapter = opened(adapter_for(tiny, router=False))
    adapter.save(tmp_path, METADATA)
    file = tmp_path / "adapter.safetensors"
    rewrite(file, load_file(file), router=None, people=None)
    assert "router" not in read_metadata(file)["branches"]
    again = Adapter.load(file, tiny)
    assert again.branch_specs == adapter.branch_specs and not again.branch_specs[0].router
    call = Call(tiny)
    with again.attach(tiny):
        conditioning = people(again)
        assert torch.equal(call(conditioning), call(replace(conditioning, groups={})))


def test_a_file_whose_router_does_not_fit_its_description_is_refused(tiny: UNet2DConditionModel, tmp_path: Any) -> None:
    adapter_for(tiny).save(tmp_path, METADATA)
    file = tmp_path / "adapter.safetensors"
    tensors = load_file(file)
    rewrite(file, tensors, router=None)
    with pytest.raises(WeightsError, match=r"names no router but holds .*router\.nobody.*; save the adapter again"):
        Adapter.load(file, tiny)
    rewrite(file, {name: tensor for name, tensor in tensors.items() if ".router." not in name}, router=True)
    with pytest.raises(WeightsError, match=r"names a router but lacks .*router\.nobody.*; save the adapter again"):
        Adapter.load(file, tiny)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [{"people": "concatenate"}, {"fusion": "concatenated"}])
def test_a_router_needs_a_softmax_per_person(tiny: UNet2DConditionModel, spec: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="has a router, which needs a softmax per person"):
        adapter_for(tiny, **spec)
    adapter_for(tiny, router=False, **spec)


@torch.no_grad()
def test_a_branch_that_shares_the_texts_softmax_ignores_groups(tiny: UNet2DConditionModel) -> None:
    call, adapter = Call(tiny), opened(adapter_for(tiny, router=False, fusion="concatenated"))
    with adapter.attach(tiny):
        conditioning = people(adapter)
        assert torch.equal(call(conditioning), call(replace(conditioning, groups={})))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"groups": {"vision": torch.ones(3, 5, dtype=torch.bool)}}, r"groups \[3, 5\] do not fit the tokens \[3, 12"),
        ({"groups": {"vision": torch.ones(2, 2, dtype=torch.bool)}}, r"groups \[2, 2\] do not fit the tokens \[3, 12"),
        ({"regions": {"vision": torch.ones(1, 3, 8, 8)}}, "There are 3 regions for 2 people in 'vision'"),
    ],
)
def test_groups_that_do_not_fit_are_refused(tiny: UNet2DConditionModel, changes: dict[str, Any], sentence: str) -> None:
    adapter = adapter_for(tiny)
    with adapter.attach(tiny), pytest.raises(ConfigError, match=sentence):
        prepare(tiny, replace(people(adapter), **changes))
