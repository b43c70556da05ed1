"""Parallel attention against an explicit formula, and against diffusers' own processor bit for bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from imagine.adapter.attention import GATE_GAIN, Branch, LayerWeights, LowRank, ParallelAttention
from imagine.records import Conditioning, Tokens, Watched, attention_to

WIDTH, TEXT_WIDTH, HEADS, HEAD_WIDTH, RANK = 16, 12, 2, 8, 3


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def cross_attention(**options: object) -> Attention:
    attn = Attention(WIDTH, cross_attention_dim=TEXT_WIDTH, heads=HEADS, dim_head=HEAD_WIDTH, **options)
    return attn.eval().requires_grad_(False)


def weights(owner: str, widths: dict[str, int], targets: tuple[str, ...] = ()) -> LayerWeights:
    """Return random weights for one layer, with open gates and LoRA."""
    layer = LayerWeights(owner, dict.fromkeys(widths, 1.0))
    for name, width in widths.items():
        layer.add_module(name, Branch(width, HEADS * HEAD_WIDTH, zero_init=False))
    for target in targets:
        layer.add_module(target, LowRank(TEXT_WIDTH if target in ("to_k", "to_v") else WIDTH, WIDTH, RANK))
    return randomise(layer)


def randomise(layer: LayerWeights) -> LayerWeights:
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.requires_grad_(False)


def parallel(attn: Attention, *layers: LayerWeights) -> ParallelAttention:
    return ParallelAttention("here", AttnProcessor2_0(), layers)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the textbook formula, head by head, on (batch, length, inner) each."""
    parts = []
    for head in range(HEADS):
        columns = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
        scores = torch.einsum("bqc,bkc->bqk", query[..., columns], key[..., columns]) / HEAD_WIDTH**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], float("-inf"))
        parts.append(torch.einsum("bqk,bkc->bqc", scores.softmax(dim=-1), value[..., columns]))
    return torch.cat(parts, dim=-1)


def lora(layer: LayerWeights, target: str, states: Tensor) -> Tensor:
    low_rank = layer.low_rank(target)
    assert low_rank is not None
    return states @ low_rank.lora_A.weight.T @ low_rank.lora_B.weight.T


def test_equals_the_explicit_formula():
    attn = cross_attention()
    text_layer, vision_layer = weights("t5", {"t5": 10}), weights("vision", {"vision": 14}, ("to_q", "to_k", "to_v"))
    states, text = torch.randn(2, 5, WIDTH), torch.randn(2, 4, TEXT_WIDTH)
    t5, vision = torch.randn(2, 6, 10), torch.randn(2, 3, 14)
    text_mask = torch.tensor([[True] * 4, [True, True, False, False]])
    t5_mask = torch.tensor([[True] * 6, [True] + [False] * 5])
    scale = torch.tensor([0.7, 1.3])
    conditioning = Conditioning({"t5": Tokens(t5, t5_mask), "vision": Tokens(vision)}, {"t5": 0.5, "vision": scale})

    identity = scale[:, None, None]
    query = states @ attn.to_q.weight.T + identity * lora(vision_layer, "to_q", states)
    key = text @ attn.to_k.weight.T + identity * lora(vision_layer, "to_k", text)
    value = text @ attn.to_v.weight.T + identity * lora(vision_layer, "to_v", text)
    mixed = softmax_attention(query, key, value, text_mask)
    for layer, name, tokens, mask, factor in (
        (text_layer, "t5", t5, t5_mask, 0.5),
        (vision_layer, "vision", vision, None, identity),
    ):
        branch = layer.branches()[name]
        attended = softmax_attention(query, tokens @ branch.to_k.weight.T, tokens @ branch.to_v.weight.T, mask)
        mixed = mixed + factor * GATE_GAIN * branch.gate * attended
    expected = mixed @ attn.to_out[0].weight.T + attn.to_out[0].bias

    additive = ((1 - text_mask.float()) * -10000.0)[:, None]  # as the U-Net converts encoder_attention_mask
    actual = parallel(attn, vision_layer, text_layer)(attn, states, text, additive, conditioning)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "shape", "crosses"),
    [
        ({}, (2, 5, WIDTH), True),
        ({"bias": True, "cross_attention_norm": "layer_norm"}, (2, 5, WIDTH), True),
        ({"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4}, (2, 5, WIDTH), True),
        ({"qk_norm": "layer_norm"}, (2, 5, WIDTH), True),
        ({"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0}, (2, WIDTH, 3, 4), False),
    ],
)
def test_without_additions_it_is_the_stock_processor_bit_for_bit(options, shape, crosses):
    attn = Attention(WIDTH, TEXT_WIDTH if crosses else None, HEADS, dim_head=HEAD_WIDTH, **options).eval()
    states, text = torch.randn(shape), torch.randn(2, 4, TEXT_WIDTH) if crosses else None
    mask = torch.tensor([[[0.0] * 4], [[0.0, 0.0, -10000.0, -10000.0]]]) if crosses else None
    stock = AttnProcessor2_0()(attn, states, text, mask)
    assert torch.equal(parallel(attn)(attn, states, text, mask), stock)


def test_zero_for_one_item_keeps_that_item_bit_for_bit_even_if_its_addition_is_not_finite():
    attn = cross_attention()
    layer = weights("vision", {"vision": 14}, ("to_q", "to_k", "to_v"))
    states, text, vision = torch.randn(3, 5, WIDTH), torch.randn(3, 4, TEXT_WIDTH), torch.randn(3, 3, 14)
    vision[1] = float("nan")
    stock = AttnProcessor2_0()(attn, states, text)
    conditioning = Conditioning({"vision": Tokens(vision)}, {"vision": torch.tensor([1.0, 0.0, 0.5])})
    out = parallel(attn, layer)(attn, states, text, conditioning=conditioning)
    assert [torch.equal(out[i], stock[i]) for i in range(3)] == [False, True, False]


@pytest.mark.parametrize("padded", [False, True])
def test_training_in_bf16_on_a_cpu_computes_the_same(padded: bool) -> None:
    attn = cross_attention().to(torch.bfloat16)
    layer = weights("vision", {"vision": 14}, ("to_q", "to_k", "to_v")).to(torch.bfloat16)
    states, text, vision = (torch.randn(3, *shape) for shape in ((5, WIDTH), (4, TEXT_WIDTH), (3, 14)))
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]]) if padded else None
    conditioning = Conditioning(
        {"vision": Tokens(vision.bfloat16(), mask)}, {"vision": torch.tensor([1.0, 0.0, 0.5])}
    )  # fmt: skip
    processor, inputs = parallel(attn, layer), (states.bfloat16(), text.bfloat16())
    with torch.no_grad():
        drawn = processor(attn, *inputs, conditioning=conditioning)
    layer.requires_grad_(True)
    trained = processor(attn.requires_grad_(True), *inputs, conditioning=conditioning)
    torch.testing.assert_close(trained, drawn, atol=0.03, rtol=0.03)
    assert torch.equal(trained[1], processor(attn, inputs[0][1:2], inputs[1][1:2])[0])
    trained.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("scale", [0, 0.0, torch.zeros(2)])
def test_zero_for_all_or_no_tokens_is_the_stock_output_bit_for_bit(scale):
    attn = cross_attention()
    processor = parallel(attn, weights("vision", {"vision": 14}, ("to_q", "to_k", "to_v")))
    states, text = torch.randn(2, 5, WIDTH), torch.randn(2, 4, TEXT_WIDTH)
    stock = AttnProcessor2_0()(attn, states, text)
    off = Conditioning({"vision": Tokens(torch.randn(2, 3, 14))}, {"vision": scale})
    assert torch.equal(processor(attn, states, text, conditioning=off), stock)
    assert torch.equal(processor(attn, states, text, conditioning=Conditioning({}, {"vision": 1.0})), stock)
    assert torch.equal(processor(attn, states, text), stock)


def test_item_without_any_counting_token_has_no_branch_and_no_lora():
    attn = cross_attention()
    processor = parallel(attn, weights("vision", {"vision": 14}, ("to_q",)))
    states, text = torch.randn(2, 5, WIDTH), torch.randn(2, 4, TEXT_WIDTH)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    out = processor(attn, states, text, conditioning=Conditioning({"vision": Tokens(torch.randn(2, 3, 14), mask)}))
    stock = AttnProcessor2_0()(attn, states, text)
    assert torch.equal(out[1], stock[1]) and not torch.equal(out[0], stock[0])


def test_padded_tokens_have_no_influence():
    attn = cross_attention()
    processor = parallel(attn, weights("t5", {"t5": 10}))
    states, text, tokens = torch.randn(1, 5, WIDTH), torch.randn(1, 4, TEXT_WIDTH), torch.randn(1, 6, 10)
    mask = torch.tensor([[True, True, True, False, False, False]])
    out = processor(attn, states, text, conditioning=Conditioning({"t5": Tokens(tokens, mask)}))
    scrambled = torch.cat([tokens[:, :3], 100 * torch.randn(1, 3, 10)], dim=1)
    assert torch.equal(out, processor(attn, states, text, conditioning=Conditioning({"t5": Tokens(scrambled, mask)})))
    trimmed = processor(attn, states, text, conditioning=Conditioning({"t5": Tokens(tokens[:, :3])}))
    torch.testing.assert_close(out, trimmed, rtol=1e-6, atol=1e-6)


def test_order_of_attaching_does_not_change_a_bit():
    attn = cross_attention()
    one, two = weights("t5", {"t5": 10}), weights("vision", {"vision": 14}, ("to_q",))
    tokens = {"t5": Tokens(torch.randn(2, 6, 10)), "vision": Tokens(torch.randn(2, 3, 14))}
    states, text = torch.randn(2, 5, WIDTH), torch.randn(2, 4, TEXT_WIDTH)
    first = parallel(attn, one, two)(attn, states, text, conditioning=Conditioning(tokens))
    assert torch.equal(first, parallel(attn, two, one)(attn, states, text, conditioning=Conditioning(tokens)))


def test_self_attention_takes_lora_and_ignores_branches():
    attn = Attention(WIDTH, heads=HEADS, dim_head=HEAD_WIDTH).eval().requires_grad_(False)
    layer = LayerWeights("vision", {"vision": 1.0})
    layer.add_module("to_q", LowRank(WIDTH, WIDTH, RANK))
    states = torch.randn(2, 5, WIDTH)
    conditioning = Conditioning({"vision": Tokens(torch.randn(2, 3, 14))}, {"vision": 0.5})
    out = parallel(attn, randomise(layer))(attn, states, conditioning=conditioning)
    query = states @ attn.to_q.weight.T + 0.5 * lora(layer, "to_q", states)
    mixed = softmax_attention(query, states @ attn.to_k.weight.T, states @ attn.to_v.weight.T)
    torch.testing.assert_close(out, mixed @ attn.to_out[0].weight.T + attn.to_out[0].bias, rtol=1e-5, atol=1e-5)
    scrambled = replace(conditioning, branches={"vision": Tokens(torch.randn(2, 9, 14))})
    assert torch.equal(out, parallel(attn, layer)(attn, states, conditioning=scrambled))


def test_gate_of_a_branch_opens_at_one_or_stays_shut():
    attended = torch.randn(2, 5, WIDTH)
    assert torch.equal(Branch(10, WIDTH, zero_init=False).gated(attended), attended)
    assert not Branch(10, WIDTH, zero_init=True).gated(attended).any()


def test_concatenated_branches_share_the_texts_softmax():
    attn = cross_attention()
    layer = weights("vision", {"vision": 14})
    layer.concatenated = frozenset({"vision"})
    states, text, vision = torch.randn(2, 5, WIDTH), torch.randn(2, 4, TEXT_WIDTH), torch.randn(2, 3, 14)
    text_mask = torch.tensor([[True] * 4, [True, True, False, False]])
    vision_mask = torch.tensor([[True, True, False], [True] * 3])
    scale = torch.tensor([0.5, 2.0])
    branch = layer.branches()["vision"]
    query = states @ attn.to_q.weight.T
    key = torch.cat([text @ attn.to_k.weight.T, vision @ branch.to_k.weight.T], 1)
    strong = scale[:, None, None] * branch.gate * GATE_GAIN
    value = torch.cat([text @ attn.to_v.weight.T, vision @ branch.to_v.weight.T * strong], 1)
    mixed = softmax_attention(query, key, value, torch.cat([text_mask, vision_mask], 1))
    wanted = mixed @ attn.to_out[0].weight.T + attn.to_out[0].bias
    additive = torch.where(text_mask, 0.0, -10_000.0)[:, None]
    conditioning = Conditioning({"vision": Tokens(vision, vision_mask)}, {"vision": scale})
    got = parallel(attn, layer)(attn, states, text, additive, conditioning)
    assert torch.allclose(got, wanted, atol=1e-5)
    apart = weights("vision", {"vision": 14})
    apart.load_state_dict(layer.state_dict())
    assert not torch.allclose(parallel(attn, apart)(attn, states, text, additive, conditioning), wanted, atol=1e-3)


def test_a_concatenated_branch_without_strength_leaves_the_text_alone():
    attn = cross_attention()
    layer = weights("vision", {"vision": 14})
    layer.concatenated = frozenset({"vision"})
    states, text, vision = torch.randn(2, 5, WIDTH), torch.randn(2, 4, TEXT_WIDTH), torch.randn(2, 3, 14)
    conditioning = Conditioning({"vision": Tokens(vision)}, {"vision": torch.tensor([0.0, 1.0])})
    got, base = parallel(attn, layer)(attn, states, text, None, conditioning), AttnProcessor2_0()(attn, states, text)
    assert torch.allclose(got[0], base[0], atol=1e-6) and not torch.allclose(got[1], base[1], atol=1e-3)
    off = replace(conditioning, scales={"vision": 0.0})
    assert torch.equal(parallel(attn, layer)(attn, states, text, None, off), base)


def test_a_layer_shows_its_attention_to_a_branch_and_its_input_without_another_result() -> None:
    attn, layer = cross_attention(), weights("byt5", {"byt5": 10})
    states, text, letters = torch.randn(3, 6, WIDTH), torch.randn(3, 5, TEXT_WIDTH), torch.randn(3, 4, 10)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    plain = Conditioning({"byt5": Tokens(letters, mask)})
    watch: dict[str, dict[str, Any]] = {attention_to("byt5"): {}, "states": {}}
    processor = parallel(attn, layer)
    wanted = processor(attn, states, text, conditioning=plain)
    assert torch.equal(processor(attn, states, text, conditioning=replace(plain, watch=watch)), wanted)
    shown = watch[attention_to("byt5")]["here"]
    assert torch.equal(watch["states"]["here"], states)
    attention = shown.attention()  # (batch, positions, tokens)
    assert torch.allclose(attention.sum(2), torch.ones(3, 6))
    assert not attention[~mask[:, None].expand(3, 6, 4)].any()
    branch = layer.branches()["byt5"]
    query, key = attn.to_q(states), branch.to_k(letters)
    scores = torch.einsum("bqc,bkc->bqk", query[..., :HEAD_WIDTH], key[..., :HEAD_WIDTH]) / HEAD_WIDTH**0.5
    first = scores.masked_fill(~mask[:, None], float("-inf")).softmax(2)
    single = Watched(shown.query[:, :1], shown.key[:, :1], shown.mask)
    assert torch.allclose(single.attention(), first, atol=1e-6)
    assert torch.allclose(shown.value.transpose(1, 2).flatten(2), branch.gated(branch.to_v(letters)), atol=1e-6)
    other: dict[str, dict[str, Any]] = {attention_to("vision"): {}}
    processor(attn, states, text, conditioning=replace(plain, watch=other))
    assert other == {attention_to("vision"): {}}


def test_what_a_layer_shows_can_be_compiled() -> None:
    attn, layer = cross_attention(), weights("byt5", {"byt5": 10})
    states, text, letters = torch.randn(2, 6, WIDTH), torch.randn(2, 5, TEXT_WIDTH), torch.randn(2, 4, 10)
    processor = parallel(attn, layer)

    def call(given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        watch: dict[str, dict[str, Any]] = {attention_to("byt5"): {}, "states": {}}
        conditioning = Conditioning({"byt5": Tokens(letters)}, watch=watch)
        out = processor(attn, given, text, conditioning=conditioning)
        return out, watch[attention_to("byt5")]["here"].attention(), watch["states"]["here"]

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for one, other in zip(compiled(states), call(states), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
