"""The adapter on stock U-Nets of two shapes: it is removable, keeps people separate, and its files are strict."""

import copy
import io
import itertools
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from imagine.adapter.adapter import Adapter, BranchSpec, check_attached, prepare, read_metadata
from imagine.adapter.attention import TEXT, attention_layers
from imagine.errors import ConfigError, WeightsError
from imagine.planning.meter import Meter
from imagine.records import Conditioning, Tokens

TEXT_WIDTH, FEATURES = 24, 20
METADATA = {"base": "tiny", "encoder": "random", "feature_layer": "-2", "tokens": "6", "licence": "Apache-2.0"}
DESCRIPTION = {"branches", "format_version", "lora_rank", "lora_targets", *METADATA}

SD15_SHAPED = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
}
SDXL_SHAPED = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}


def build(options: dict[str, object]) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=3, out_channels=3, cross_attention_dim=TEXT_WIDTH, norm_num_groups=4, **options
    )
    return unet.eval().requires_grad_(False)


@pytest.fixture(params=[SD15_SHAPED, SDXL_SHAPED], ids=["sd15", "sdxl"])
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    return build(request.param)


@pytest.fixture
def tiny() -> UNet2DConditionModel:
    return build(SD15_SHAPED)


def text_adapter(unet: nn.Module) -> Adapter:
    return Adapter(unet, [BranchSpec("t5", 12), BranchSpec("byt5", 10)])


def identity_adapter(unet: nn.Module, rank: int = 2) -> Adapter:
    return Adapter(unet, [BranchSpec("vision", TEXT_WIDTH, projection="full", input_width=FEATURES)], lora_rank=rank)


def opened(adapter: Adapter) -> Adapter:
    """Make the adapter as after training: every parameter changed, so that gates are open and LoRA is not zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapter


class Call:
    """One fixed denoiser call for `people` items; an item has the same inputs in every batch."""

    def __init__(self, unet: UNet2DConditionModel, people: int = 3) -> None:
        random = lambda *shape: torch.randn(people, *shape, generator=torch.Generator().manual_seed(len(shape)))  # noqa: E731
        self.unet = unet
        # Self-attention over one position, as at the coarsest level of smaller latents, would have no gradient.
        self.noisy, self.text, self.features = random(3, 8, 8), random(5, TEXT_WIDTH), random(6, FEATURES)
        self.text_mask = (torch.arange(5) < torch.tensor([5, 3, 2])[:people, None]).float()
        t5, byt5 = random(7, 12), random(4, 10)
        t5_mask = torch.arange(7) < torch.tensor([4, 7, 1])[:people, None]
        self.branches = {"t5": Tokens(t5, t5_mask), "byt5": Tokens(byt5)}
        self.added = {"text_embeds": random(10), "time_ids": random(6)}

    def conditioning(self, adapter: Adapter, scale: "float | Tensor" = 1.0) -> Conditioning:
        vision = adapter.tokens("vision", self.features)
        return Conditioning({**self.branches, "vision": vision}, {"vision": scale})

    def __call__(self, conditioning: Conditioning | None = None, items: slice = slice(None)) -> Tensor:
        output: Tensor = self.unet(
            self.noisy[items],
            torch.tensor([900.0, 500.0, 100.0])[: len(self.noisy)][items],
            encoder_hidden_states=self.text[items],
            encoder_attention_mask=self.text_mask[items],
            added_cond_kwargs={name: tensor[items] for name, tensor in self.added.items()},
            cross_attention_kwargs=None if conditioning is None else {"conditioning": conditioning},
        ).sample
        return output


def item(conditioning: Conditioning, index: int) -> Conditioning:
    """Return the conditioning of one batch item alone."""
    rows = slice(index, index + 1)
    branches = {
        name: Tokens(tokens.values[rows], None if tokens.mask is None else tokens.mask[rows])
        for name, tokens in conditioning.branches.items()
    }
    scales = {name: scale[rows] if isinstance(scale, Tensor) else scale for name, scale in conditioning.scales.items()}
    return Conditioning(branches, scales)


# --- attach and detach ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_fresh_adapters_give_the_base_picture_bit_for_bit(unet):
    call, text, identity = Call(unet), text_adapter(unet), identity_adapter(unet)
    base = call()
    with text.attach(unet), identity.attach(unet):
        assert torch.equal(call(call.conditioning(identity)), base)


@torch.no_grad()
@pytest.mark.parametrize("scale", [0, 0.0, torch.zeros(3)])
def test_identity_scale_zero_gives_the_base_picture_bit_for_bit(unet, scale):
    call, identity = Call(unet), opened(identity_adapter(unet))
    base = call()
    with identity.attach(unet):
        conditioning = Conditioning({"vision": identity.tokens("vision", call.features)}, {"vision": scale})
        assert torch.equal(call(conditioning), base)
        assert torch.equal(call(prepare(unet, conditioning)), base)


@torch.no_grad()
def test_identity_scale_zero_of_one_person_gives_that_persons_base_picture_bit_for_bit(unet):
    call, text, identity = Call(unet), opened(text_adapter(unet)), opened(identity_adapter(unet))
    with text.attach(unet):
        base = call(Conditioning(call.branches))
        with identity.attach(unet):
            out = call(call.conditioning(identity, torch.tensor([1.0, 0.0, 0.5])))
            assert torch.equal(call(Conditioning(call.branches)), base)  # without vision tokens LoRA is off too
    assert [torch.equal(out[i], base[i]) for i in range(3)] == [False, True, False]


@torch.no_grad()
@pytest.mark.parametrize("orders", list(itertools.product([(0, 1), (1, 0)], repeat=2)))
def test_two_adapters_attach_and_detach_in_any_order_twice(unet, orders):
    call, adapters = Call(unet), [opened(text_adapter(unet)), opened(identity_adapter(unet))]
    base, tree, names = call(), repr(unet), list(unet.state_dict())
    stock = dict(unet.attn_processors)
    outputs = []
    for _ in range(2):
        for which in orders[0]:
            adapters[which].attach(unet)
        assert repr(unet) == tree and list(unet.state_dict()) == names  # processors only refer to the weights
        outputs.append(call(call.conditioning(adapters[1])))
        adapters[orders[1][0]].detach(unet)
        alone = call(call.conditioning(adapters[1]))
        assert not torch.equal(alone, base) and not torch.equal(alone, outputs[0])
        adapters[orders[1][1]].detach(unet)
        assert repr(unet) == tree and torch.equal(call(), base)
        assert all(unet.attn_processors[name] is processor for name, processor in stock.items())
    assert torch.equal(*outputs) and not torch.equal(outputs[0], base)


@torch.no_grad()
def test_attaching_in_another_order_gives_the_same_picture_bit_for_bit(unet):
    call, text, identity = Call(unet), opened(text_adapter(unet)), opened(identity_adapter(unet))
    with text.attach(unet), identity.attach(unet):
        first = call(call.conditioning(identity))
    with identity.attach(unet), text.attach(unet):
        assert torch.equal(call(call.conditioning(identity)), first)


def test_attached_denoiser_is_still_saved_as_a_stock_one(unet, tmp_path):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    opened(identity_adapter(unet)).attach(unet)
    unet.save_pretrained(tmp_path)
    loaded, report = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert list(loaded.state_dict()) == list(before)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in before.items())


def test_calls_log_no_warning(tiny):
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logging.getLogger("diffusers").addHandler(handler)
    try:
        call, identity = Call(tiny), identity_adapter(tiny)
        with identity.attach(tiny):
            call(call.conditioning(identity))
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    assert written.getvalue() == ""


# --- people stay separate ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_people_in_one_batch_equal_single_calls(unet):
    call, text, identity = Call(unet), opened(text_adapter(unet)), opened(identity_adapter(unet))
    with text.attach(unet), identity.attach(unet):
        conditioning = call.conditioning(identity, torch.tensor([1.0, 0.3, 0.7]))
        together = call(conditioning)
        for i in range(3):
            alone = call(item(conditioning, i), slice(i, i + 1))
            # Not bitwise: matrix products split their sums differently for other batch sizes, in the stock base too.
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
        # Bitwise: one person's result must not depend on the other people in the batch.
        others = {**conditioning.branches, "vision": Tokens(conditioning.branches["vision"].values.clone())}
        others["vision"].values[1:] = 7.0
        assert torch.equal(call(replace(conditioning, branches=others))[0], together[0])


def test_concurrent_threads_equal_single_calls_bit_for_bit(tiny):
    call, identity = Call(tiny), opened(identity_adapter(tiny))
    with identity.attach(tiny), torch.no_grad():
        conditionings = [call.conditioning(identity, scale) for scale in (0.0, 0.4, 0.8, 1.2)]
        expected = [call(conditioning) for conditioning in conditionings]
        wrong: list[int] = []
        start = threading.Barrier(len(conditionings))

        def work(index: int) -> None:
            start.wait()
            with torch.no_grad():
                for _ in range(5):
                    if not torch.equal(call(conditionings[index]), expected[index]):
                        wrong.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(conditionings))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(expected, 2))


@torch.no_grad()
def test_padding_has_no_influence_on_the_picture(unet):
    call, text = Call(unet), opened(text_adapter(unet))
    with text.attach(unet):
        out = call(Conditioning(call.branches))
        t5 = call.branches["t5"]
        assert t5.mask is not None
        scrambled = torch.where(t5.mask[..., None], t5.values, 100 * torch.randn_like(t5.values))
        assert torch.equal(call(Conditioning({**call.branches, "t5": Tokens(scrambled, t5.mask)})), out)


# --- prepared once per picture ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.8, torch.tensor([1.0, 0.0, 0.6])])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_prepared_conditioning_gives_the_same_picture(unet, scale, lora_rank):
    call, text, identity = Call(unet), opened(text_adapter(unet)), opened(identity_adapter(unet, lora_rank))
    with text.attach(unet), identity.attach(unet):
        plain = call.conditioning(identity, scale)
        mask = torch.ones(3, 6, dtype=torch.bool)
        mask[2] = False  # the third has no reference at all
        plain = replace(plain, branches={**plain.branches, "vision": Tokens(plain.branches["vision"].values, mask)})
        expected = call(plain)
        ready = prepare(unet, plain)
        first = call(ready)
        # LoRA is then a product of fewer rows, which is rounded differently; without LoRA the bits are the same.
        torch.testing.assert_close(first, expected, rtol=0, atol=1e-6 if lora_rank else 0)
        assert torch.equal(call(ready), first)  # the second call reads the cache
    crossing = [name for name, attn in attention_layers(unet).items() if attn.is_cross_attention]
    assert ready.cache is not None
    kept = {key for key in ready.cache if not key[0].startswith("strength")}
    assert kept == set(itertools.product(crossing, ["t5", "byt5", "vision", TEXT]))


def test_rows_in_which_the_identity_is_off_cost_nothing_once_prepared(unet):
    call, identity = Call(unet), opened(identity_adapter(unet))
    spent, pictures = {}, {}
    with identity.attach(unet):
        for name, scale in {"all": [1.0] * 3, "two": [0.0, 1.0, 1.0], "one": [0.0, 0.0, 0.6]}.items():
            plain = call.conditioning(identity, torch.tensor(scale))
            ready = prepare(unet, replace(plain, branches={"vision": plain.branches["vision"]}))
            with torch.no_grad():
                pictures[name] = call(ready)
                with Meter() as meter:
                    assert torch.equal(call(ready), pictures[name])
            spent[name] = meter.flops
            assert torch.equal(call(ready).detach(), pictures[name])  # with gradients nothing is changed in place
            whole = call(replace(ready, cache=None)).detach()  # LoRA in all rows, which is rounded differently
            torch.testing.assert_close(whole, pictures[name], atol=1e-6, rtol=0)
        other = replace(ready, scales={"vision": torch.tensor([1.0, 1.0, 1.0])})  # another strength, the same cache
        torch.testing.assert_close(call(other), call(replace(other, cache=None)), atol=1e-5, rtol=1e-5)
    assert spent["all"] - spent["two"] == spent["two"] - spent["one"] > 0


@torch.no_grad()
def test_cached_keys_are_used(tiny):
    call, text = Call(tiny), opened(text_adapter(tiny))
    with text.attach(tiny):
        ready = prepare(tiny, Conditioning(call.branches))
        expected = call(ready)
        emptied = {
            name: Tokens(torch.zeros_like(tokens.values), tokens.mask) for name, tokens in ready.branches.items()
        }
        assert torch.equal(call(replace(ready, branches=emptied)), expected)
        assert not torch.equal(call(Conditioning(emptied)), expected)


@torch.no_grad()
def test_text_other_than_the_cached_one_is_encoded(tiny):
    call, text = Call(tiny), opened(text_adapter(tiny))
    with text.attach(tiny):
        ready = prepare(tiny, Conditioning(call.branches))
        before = call(ready)
        call.text = torch.randn_like(call.text)
        expected = call(Conditioning(call.branches))
        assert torch.equal(call(ready), expected) and not torch.equal(expected, before)


@torch.no_grad()
def test_a_layer_that_a_scale_does_not_name_is_without_the_branch(unet):
    call, identity = Call(unet), opened(identity_adapter(unet))
    names = list(attention_layers(unet))
    tokens = {"vision": identity.tokens("vision", call.features)}
    base = call()
    with identity.attach(unet):
        everywhere = call(Conditioning(tokens, {"vision": 0.7}))
        assert torch.equal(call(Conditioning(tokens, {"vision": dict.fromkeys(names, 0.7)})), everywhere)
        assert torch.equal(call(Conditioning(tokens, {"vision": {}})), base)
        half = Conditioning(tokens, {"vision": dict.fromkeys(names[::2], torch.full((3,), 0.7))})
        assert torch.equal(call(prepare(unet, half)), call(half))
        assert not torch.equal(call(half), everywhere) and not torch.equal(call(half), base)


@torch.no_grad()
def test_regions_keep_references_to_their_part_of_the_picture(unet):
    call, identity = Call(unet), opened(identity_adapter(unet))
    alone = identity.tokens("vision", call.features).values
    with identity.attach(unet):
        expected = call(Conditioning({"vision": Tokens(alone)}))
        both = Tokens(torch.cat([alone, torch.randn_like(alone)], 1))
        first_everywhere = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])[None]
        conditioning = Conditioning({"vision": both}, regions={"vision": first_everywhere})
        torch.testing.assert_close(call(conditioning), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(call(prepare(unet, conditioning)), call(conditioning))
        halves = torch.zeros(1, 2, 8, 8)
        halves[:, 0, :, :4], halves[:, 1, :, 4:] = 1, 1
        divided = Conditioning({"vision": both}, regions={"vision": halves})
        assert (call(divided) - expected).abs().max() > 1e-3


def test_tokens_that_no_attached_adapter_reads_are_refused(tiny):
    call, identity = Call(tiny), identity_adapter(tiny)
    with identity.attach(tiny), pytest.raises(WeightsError, match="No attached adapter reads the branch 't5'"):
        prepare(tiny, call.conditioning(identity))


# --- training ---------------------------------------------------------------------------------------------------------


def gradients(call: Call, adapters: list[Adapter]) -> dict[str, Tensor]:
    for adapter in adapters:
        adapter.zero_grad()
    call(call.conditioning(adapters[1], torch.tensor([1.0, 0.0, 0.5]))).square().sum().backward()
    named = [(f"{i}.{name}", p) for i, adapter in enumerate(adapters) for name, p in adapter.named_parameters()]
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def test_gradient_reaches_every_parameter_and_checkpointing_changes_none(unet):
    call, adapters = Call(unet), [opened(text_adapter(unet)), opened(identity_adapter(unet))]
    unet.train()
    with adapters[0].attach(unet), adapters[1].attach(unet):
        plain = gradients(call, adapters)
        unet.enable_gradient_checkpointing()
        checkpointed = gradients(call, adapters)
    assert [name for name, gradient in plain.items() if not gradient.any()] == []
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)


def test_fresh_adapter_starts_to_learn_through_its_gates_and_lora(unet):
    call, adapters = Call(unet), [text_adapter(unet), identity_adapter(unet)]
    with adapters[0].attach(unet), adapters[1].attach(unet):
        moving = {name for name, gradient in gradients(call, adapters).items() if gradient.any()}
    every = [f"{i}.{name}" for i, adapter in enumerate(adapters) for name, _ in adapter.named_parameters()]
    assert moving == {name for name in every if name.endswith(("gate", "lora_B.weight"))}


class Trained(nn.Module):
    """The module that a trainer wraps: the denoiser's call and the adapters that it uses."""

    def __init__(self, call: Call, adapter: Adapter) -> None:
        super().__init__()
        self.call, self.adapter = call, adapter

    def forward(self, scale: Tensor) -> Tensor:
        return self.call(self.call.conditioning(self.adapter, scale)).square().mean()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel_finds_every_parameter_even_with_every_reference_dropped(tiny, process_group):
    call, adapter = Call(tiny), opened(identity_adapter(tiny))
    call.branches = {}
    with adapter.attach(tiny):
        model = DistributedDataParallel(Trained(call, adapter))
        for scale in (torch.ones(3), torch.zeros(3), torch.ones(3)):  # DDP itself raises if a parameter was not used
            adapter.zero_grad()
            model(scale).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())


def test_mixed_precision_keeps_a_fresh_adapter_bitwise_neutral(tiny):
    call, identity = Call(tiny), identity_adapter(tiny)
    call.branches = {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        base = call()
        with identity.attach(tiny):
            conditioning = call.conditioning(identity)
            assert torch.equal(call(conditioning), base)
            opened(identity)
            assert torch.equal(call(prepare(tiny, conditioning)), call(conditioning))
            assert torch.isfinite(call(conditioning)).all() and not torch.equal(call(conditioning), base)


def test_parts_name_every_parameter_exactly_once(tiny):
    text, identity = text_adapter(tiny), identity_adapter(tiny)
    assert set(text.parts()) == {"t5_branch", "byt5_branch"}
    assert set(identity.parts()) == {"vision_branch", "vision_projection", "lora"}
    for adapter in (text, identity):
        listed = [id(parameter) for part in adapter.parts().values() for parameter in part]
        assert sorted(listed) == sorted(map(id, adapter.parameters()))


def test_keys_and_values_start_as_the_denoisers_own_where_widths_agree(tiny):
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2"
    own = tiny.get_submodule(layer)
    vision = identity_adapter(tiny).layers()[layer].branches()["vision"]
    assert torch.equal(vision.to_k.weight, own.to_k.weight) and torch.equal(vision.to_v.weight, own.to_v.weight)
    assert text_adapter(tiny).layers()[layer].branches()["t5"].to_k.weight.shape == (32, 12)


def test_branch_trained_with_the_base_starts_open(tiny):
    adapter = Adapter(tiny, [BranchSpec("t5", 12, zero_init=False)])
    call = Call(tiny)
    base = call()
    with adapter.attach(tiny):
        assert not torch.equal(call(Conditioning({"t5": call.branches["t5"]})), base)
        assert torch.equal(call(Conditioning({"t5": call.branches["t5"]}, {"t5": 0.0})), base)


def test_a_branchs_own_scale_applies_where_the_call_names_none(tiny):
    call, half = Call(tiny), opened(Adapter(tiny, [BranchSpec("t5", 12, scale=0.5)]))
    with half.attach(tiny):
        silent = call(Conditioning({"t5": call.branches["t5"]}))
        assert torch.equal(silent, call(Conditioning({"t5": call.branches["t5"]}, {"t5": 0.5})))
        assert not torch.equal(silent, call(Conditioning({"t5": call.branches["t5"]}, {"t5": 1.0})))


# --- files ------------------------------------------------------------------------------------------------------------


def test_names_in_a_file_are_pinned(tiny):
    cross, alone = (f"mid_block.attentions.0.transformer_blocks.0.attn{i}" for i in (2, 1))
    names = {name for name in identity_adapter(tiny).state_dict() if name.startswith(("mid_block", "projections"))}
    low_rank = [f"{target}.lora_{end}.weight" for target in ("to_q", "to_k", "to_v", "to_out.0") for end in "AB"]
    expected = {f"{layer}.{name}" for layer in (cross, alone) for name in low_rank}
    expected |= {f"{cross}.vision.{name}" for name in ("to_k.weight", "to_v.weight", "gate")}
    expected |= {f"projections.vision.proj.{i}.{kind}" for i in (0, 2, 3) for kind in ("weight", "bias")}
    assert names == expected


@torch.no_grad()
def test_saved_and_loaded_adapter_gives_the_same_picture_bit_for_bit(unet, tmp_path):
    call, identity = Call(unet), opened(identity_adapter(unet))
    with identity.attach(unet):
        expected = call(call.conditioning(identity))
    identity.save(tmp_path / "adapter", METADATA)
    before = torch.get_rng_state()
    loaded = Adapter.load(tmp_path / "adapter", unet, expected={"encoder": "random"})
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in identity.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters())  # see adapter._read
    with loaded.attach(unet):
        assert torch.equal(call(call.conditioning(loaded)), expected)
    assert set(loaded.metadata) == DESCRIPTION and loaded.metadata == read_metadata(tmp_path / "adapter")


@torch.no_grad()
def test_a_concatenated_branch_is_saved_as_one_and_prepared_once_a_picture(tiny, tmp_path):
    call = Call(tiny)
    width = tiny.config.cross_attention_dim
    adapter = opened(Adapter(tiny, [BranchSpec("vision", width, zero_init=False, fusion="concatenated")]))
    vision = Tokens(torch.randn(3, 5, width))
    with adapter.attach(tiny):
        conditioning = Conditioning({"vision": vision})
        expected = call(conditioning)
        assert torch.equal(call(prepare(tiny, conditioning)), expected)
    adapter.save(tmp_path, METADATA)
    loaded = Adapter.load(tmp_path, tiny)
    assert loaded.branch_specs[0].fusion == "concatenated"
    with loaded.attach(tiny):
        assert torch.equal(call(conditioning), expected)


def test_file_keeps_its_precision(tiny, tmp_path):
    text_adapter(tiny).half().save(tmp_path / "text.safetensors", METADATA)
    assert {p.dtype for p in Adapter.load(tmp_path / "text.safetensors", tiny).parameters()} == {torch.float16}
    assert [file.name for file in tmp_path.iterdir()] == ["text.safetensors"]


GATE = "mid_block.attentions.0.transformer_blocks.0.attn2.t5.gate"


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[GATE]


def rename(tensors: dict[str, Tensor]) -> None:
    tensors[GATE.replace("gate", "gates")] = tensors.pop(GATE)


def add(tensors: dict[str, Tensor]) -> None:
    tensors["something.else"] = torch.zeros(1)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors[GATE] = torch.zeros(31)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (drop, f"lacks {GATE};"),
        (rename, f"lacks {GATE} and has the unknown tensor {GATE}s \\(is it {GATE}, renamed\\?\\);"),
        (add, "has the unknown tensor something.else;"),
        (reshape, f"holds {GATE} of shape \\[31\\] instead of \\[32\\];"),
    ],
)
def test_file_that_does_not_fit_is_refused_by_name(tiny, tmp_path, damage, sentence):
    file = tmp_path / "adapter.safetensors"
    text_adapter(tiny).save(file, METADATA)
    tensors, metadata = load_file(file), read_metadata(file)
    damage(tensors)
    save_file(tensors, file, metadata)
    with pytest.raises(WeightsError, match=sentence) as caught:
        Adapter.load(file, tiny)
    assert "\n" not in str(caught.value)


def damaged(folder: Path, unet: nn.Module, **changes: str) -> Path:
    text_adapter(unet).save(folder, METADATA)
    file = folder / "adapter.safetensors"
    save_file(load_file(file), file, {**read_metadata(file), **changes})
    return file


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format_version": "99"}, "has format_version '99', but this version of imagine reads '1'"),
        ({"branches": "nonsense"}, "does not describe its branches and LoRA properly"),
        ({"branches": '[{"title": "t5"}]'}, "does not describe its branches and LoRA properly"),
        ({"encoder": "another"}, "has encoder 'another', but 'random' is needed"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tiny, tmp_path, changes, sentence):
    with pytest.raises(WeightsError, match=sentence):
        Adapter.load(damaged(tmp_path, tiny, **changes), tiny, expected={"encoder": "random"})


def test_missing_and_truncated_files_are_refused(tiny, tmp_path):
    with pytest.raises(WeightsError, match="There is no adapter file"):
        Adapter.load(tmp_path, tiny)
    file = damaged(tmp_path, tiny)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        Adapter.load(file, tiny)


def test_saving_without_the_required_metadata_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="must also contain encoder, licence"):
        text_adapter(tiny).save(tmp_path, {key: METADATA[key] for key in ("base", "feature_layer", "tokens")})


# --- errors -----------------------------------------------------------------------------------------------------------


def test_attached_twice_and_detached_when_not_attached_are_errors(tiny):
    identity = identity_adapter(tiny)
    with pytest.raises(WeightsError, match="not attached"):
        identity.detach(tiny)
    with identity.attach(tiny):
        with pytest.raises(WeightsError, match="already attached to this denoiser"):
            identity.attach(tiny)
        with pytest.raises(WeightsError, match="Another attached adapter also has a branch 'vision'"):
            identity_adapter(tiny).attach(tiny)


@pytest.mark.parametrize(
    "interfere",
    [
        lambda unet: unet.set_attention_slice("max"),
        lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
        lambda unet: unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(AttnProcessor2_0()),
    ],
)
def test_replaced_processors_are_noticed_and_the_advice_given_works(tiny, interfere):
    call, identity = Call(tiny), opened(identity_adapter(tiny))
    identity.attach(tiny)
    check_attached(tiny, [identity])
    expected = call(call.conditioning(identity))
    interfere(tiny)
    with pytest.raises(WeightsError, match="set_attention_slice, set_attn_processor, enable_xformers"):
        check_attached(tiny, [identity])
    tiny.set_attn_processor(AttnProcessor2_0())
    identity.attach(tiny)
    check_attached(tiny, [identity])
    assert torch.equal(call(call.conditioning(identity)), expected)


def test_foreign_processors_are_not_overwritten(tiny):
    tiny.set_attention_slice("max")
    before = dict(tiny.attn_processors)
    with pytest.raises(WeightsError, match="uses SlicedAttnProcessor instead of the stock"):
        identity_adapter(tiny).attach(tiny)
    assert tiny.attn_processors == before


def test_adapter_of_another_denoiser_is_refused(tiny):
    with pytest.raises(WeightsError, match="built for a denoiser with"):
        identity_adapter(build(SDXL_SHAPED)).attach(tiny)
    wider = build({**SD15_SHAPED, "block_out_channels": (16, 64)})
    with pytest.raises(WeightsError, match="does not fit the denoiser's layer"):
        identity_adapter(wider).attach(tiny)


def test_copied_denoiser_does_not_count_as_attached(tiny):
    identity = identity_adapter(tiny)
    identity.attach(tiny)
    with pytest.raises(WeightsError, match="not attached"):
        check_attached(copy.deepcopy(tiny), [identity])


@pytest.mark.parametrize(
    ("specs", "targets", "sentence"),
    [
        ([], ("to_q",), "one or more branches"),
        ([BranchSpec("a", 4), BranchSpec("a", 4)], ("to_q",), "with different names"),
        ([BranchSpec("clip", 4)], ("to_q",), "cannot be called 'clip'"),
        ([BranchSpec("train", 4)], ("to_q",), "cannot be called 'train'"),
        ([BranchSpec("vision", 4, projection="full")], ("to_q",), "both projection and input_width"),
        ([BranchSpec("vision", 4)], ("ff",), "no LoRA target 'ff'"),
    ],
)
def test_impossible_adapters_are_refused(tiny, specs, targets, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Adapter(tiny, specs, lora_rank=2, lora_targets=targets)
