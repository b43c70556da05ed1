"""Several people in one layer: a softmax each, mixed by the router or a layout; one person as without a router."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from imagine.adapter.attention import Branch, LayerWeights, ParallelAttention
from imagine.adapter.router import LAYOUT_FLOOR, MAX_PEOPLE, ROUTER_GAIN, ROUTER_WIDTH, Router
from imagine.errors import ConfigError
from imagine.records import Conditioning, Tokens

WIDTH, TEXT_WIDTH, TOKEN_WIDTH, HEADS, HEAD_WIDTH, LENGTH, POSITIONS = 16, 12, 14, 2, 8, 3, 16
NAME, RECORDED = "here", "router here"


class Layer:
    """One cross-attention layer with a vision branch, and inputs for three batch items with up to two people each."""

    def __init__(self, router: bool = True, joint: bool = False, fresh: bool = False) -> None:
        torch.manual_seed(0)
        self.attn = Attention(WIDTH, cross_attention_dim=TEXT_WIDTH, heads=HEADS, dim_head=HEAD_WIDTH)
        self.attn.eval().requires_grad_(False)
        layer = LayerWeights("vision", {"vision": 1.0}, joint=frozenset({"vision"} if joint else ()))
        self.branch = Branch(TOKEN_WIDTH, HEADS * HEAD_WIDTH, zero_init=False, router=router)
        if not fresh:
            for parameter in self.branch.parameters():
                torch.nn.init.normal_(parameter, std=0.4)
        layer.add_module("vision", self.branch)
        self.processor = ParallelAttention(NAME, AttnProcessor2_0(), [layer])
        self.states, self.text = torch.randn(3, POSITIONS, WIDTH), torch.randn(3, 4, TEXT_WIDTH)
        self.people = torch.randn(3, 2, LENGTH, TOKEN_WIDTH)

    @property
    def router(self) -> Router:
        assert self.branch.router is not None
        return self.branch.router

    def conditioning(self, present: Tensor | None = None, **others: object) -> Conditioning:
        """Return a conditioning with two people in every item, or those of `present` (3, 2), the others masked."""
        groups = torch.ones(3, 2, dtype=torch.bool) if present is None else present
        mask = None if present is None else present.repeat_interleave(LENGTH, 1)
        tokens = Tokens(self.people.flatten(1, 2), mask)
        return Conditioning({"vision": tokens}, groups={"vision": groups}, **others)  # type: ignore[arg-type]

    def alone(self, person: int, **others: object) -> Tensor:
        """Return the output for one of the two people in every item, without groups."""
        tokens = {"vision": Tokens(self.people[:, person].contiguous())}
        return self(Conditioning(tokens, **others))  # type: ignore[arg-type]

    def __call__(self, conditioning: Conditioning | None) -> Tensor:
        return self.processor(self.attn, self.states, self.text, conditioning=conditioning)


def normalised(states: Tensor) -> Tensor:
    return states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute the textbook formula, head by head, on (length, inner) each."""
    parts = []
    for head in range(HEADS):
        columns = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
        scores = query[:, columns] @ key[:, columns].T / HEAD_WIDTH**0.5
        parts.append(scores.softmax(-1) @ value[:, columns])
    return torch.cat(parts, -1)


PRESENT = torch.tensor([[True, True], [True, False], [False, False]])


@torch.no_grad()
def test_equals_the_explicit_formula() -> None:
    layer = Layer()
    router, branch, attn = layer.router, layer.branch, layer.attn
    mask = torch.ones(3, 2 * LENGTH, dtype=torch.bool)
    mask[0, 2], mask[2, 4:] = False, False  # the first person of item 0 and the second of item 2 have fewer tokens
    conditioning = replace(layer.conditioning(), branches={"vision": Tokens(layer.people.flatten(1, 2), mask)})
    found = layer(conditioning)
    for item in range(3):
        query = layer.states[item] @ attn.to_q.weight.T
        text = layer.text[item]
        mixed = softmax_attention(query, text @ attn.to_k.weight.T, text @ attn.to_v.weight.T)
        seen = normalised(query @ router.to_q.weight.T)
        logits, outputs = [], []
        for person in range(2):
            tokens = layer.people[item, person][mask[item].view(2, LENGTH)[person]]
            key = normalised(tokens.mean(0) @ router.to_k.weight.T) + router.order[person]
            logits.append(router.scale * ROUTER_GAIN / ROUTER_WIDTH**0.5 * (seen @ key))
            value = tokens @ branch.to_v.weight.T * branch.gate * 8
            outputs.append(softmax_attention(query, tokens @ branch.to_k.weight.T, value))
        logits.append(ROUTER_GAIN * (seen @ router.nobody.weight[0] + router.nobody.bias))
        shares = torch.stack(logits).softmax(0)
        for share, output in zip(shares, outputs, strict=False):
            mixed = mixed + share[:, None] * output
        wanted = mixed @ attn.to_out[0].weight.T + attn.to_out[0].bias
        assert torch.allclose(found[item], wanted, atol=1e-5)


@torch.no_grad()
def test_a_new_router_gives_people_equal_shares() -> None:
    layer = Layer(fresh=True)
    record: dict[str, list[Tensor]] = {}
    found = layer(layer.conditioning(record=record))
    shares = record[RECORDED][0].exp()
    assert torch.allclose(shares[:, :2], torch.full_like(shares[:, :2], 0.5), atol=1e-3)
    assert 0 < shares[:, 2].max() < 2e-3
    base = layer(None)
    mean = (layer.alone(0) + layer.alone(1)) / 2
    assert torch.allclose(found - base, mean - base, atol=2e-3)


@torch.no_grad()
def test_one_person_does_not_evaluate_the_router() -> None:
    layer = Layer()
    for parameter in layer.router.parameters():
        parameter.fill_(torch.nan)
    tokens = {"vision": Tokens(layer.people[:, 0])}
    record: dict[str, list[Tensor]] = {}
    one = Conditioning(tokens, groups={"vision": torch.ones(3, 1, dtype=torch.bool)}, record=record)
    assert torch.equal(layer(one), layer(Conditioning(tokens))) and not record
    assert layer(layer.conditioning()).isnan().all()  # two people do


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "without a mask"])
@pytest.mark.parametrize("place", [0, 1])
def test_in_a_mixed_batch_a_row_with_one_person_is_as_without_others(masked: bool, place: int) -> None:
    layer = Layer()
    present = PRESENT.clone()
    present[1] = torch.arange(2) == place
    conditioning = layer.conditioning(present)
    if not masked:  # as a caller may leave the mask out where it only marks absent people
        conditioning = replace(conditioning, branches={"vision": Tokens(layer.people.flatten(1, 2))})
    found = layer(conditioning)
    assert torch.equal(found[1], layer.alone(place)[1])
    assert not torch.allclose(found[0], layer.alone(place)[0], atol=1e-3)
    assert torch.equal(found[2], layer(None)[2])  # nobody: the base


@torch.no_grad()
def test_people_exchanged_with_their_order_exchange_their_shares() -> None:
    layer = Layer()
    before: dict[str, list[Tensor]] = {}
    found = layer(layer.conditioning(record=before))
    layer.people = layer.people.flip(1)
    other = layer(layer.conditioning())
    assert not torch.allclose(other, found, atol=1e-3)  # the order matters
    layer.router.order[:2] = layer.router.order[:2].flip(0)
    after: dict[str, list[Tensor]] = {}
    assert torch.allclose(layer(layer.conditioning(record=after)), found, atol=1e-5)
    assert torch.allclose(after[RECORDED][0], before[RECORDED][0][:, [1, 0, 2]], atol=1e-5)


@torch.no_grad()
def test_where_nobody_is_chosen_the_branch_adds_nothing() -> None:
    layer = Layer()
    layer.router.nobody.bias.fill_(100.0)
    assert torch.allclose(layer(layer.conditioning()), layer(None), atol=1e-6)
    assert torch.equal(layer(layer.conditioning(PRESENT))[1], layer.alone(0)[1])  # one person has no such choice


@torch.no_grad()
def test_masked_tokens_and_absent_people_count_for_nothing() -> None:
    layer = Layer()
    mask = PRESENT.repeat_interleave(LENGTH, 1)
    mask[0, 5] = False
    conditioning = replace(layer.conditioning(PRESENT), branches={"vision": Tokens(layer.people.flatten(1, 2), mask)})
    found = layer(conditioning)
    changed = torch.where(mask[..., None], layer.people.flatten(1, 2), 50.0)
    assert torch.equal(layer(replace(conditioning, branches={"vision": Tokens(changed, mask)})), found)
    assert not torch.allclose(layer(layer.conditioning(PRESENT))[0], found[0], atol=1e-4)


def halves() -> Tensor:
    """Return regions (1, 2, 4, 4): the first person on the left, the second one on the right."""
    regions = torch.zeros(1, 2, 4, 4)
    regions[0, 0, :, :2], regions[0, 1, :, 2:] = 1, 1
    return regions


@torch.no_grad()
def test_a_layout_guides_the_router() -> None:
    layer = Layer(fresh=True)
    record: dict[str, list[Tensor]] = {}
    layer(layer.conditioning(record=record, regions={"vision": halves()}))
    shares = record[RECORDED][0].exp().unflatten(2, (4, 4))
    inside, outside = shares[:, 0, :, :2], shares[:, 0, :, 2:]
    nobody = torch.exp(torch.tensor(-6.0))
    assert torch.allclose(outside, LAYOUT_FLOOR / (1 + 2 * LAYOUT_FLOOR + nobody) * torch.ones(()), rtol=1e-3)
    assert torch.allclose(inside, (1 + LAYOUT_FLOOR) / (1 + 2 * LAYOUT_FLOOR + nobody) * torch.ones(()), rtol=1e-5)
    trained = Layer()
    trained.router.scale.fill_(20.0)  # a sure router may overrule the layout
    record.clear()
    trained(trained.conditioning(record=record, regions={"vision": halves()}))
    assert (record[RECORDED][0].exp().unflatten(2, (4, 4))[:, 0, :, 2:] > 0.5).any()


@torch.no_grad()
def test_a_layout_without_a_router_is_the_shares() -> None:
    layer = Layer(router=False)
    base, first, second = layer(None), layer.alone(0), layer.alone(1)
    regions = torch.zeros(1, 2, 4, 4)
    regions[0, 0], regions[0, 1, :, 2:] = 0.5, 1
    found = layer(layer.conditioning(regions={"vision": regions})).unflatten(1, (4, 4))
    left, right = base + 0.5 * (first - base), base + (0.5 * (first - base) + (second - base)) / 1.5
    assert torch.allclose(found[:, :, :2], left.unflatten(1, (4, 4))[:, :, :2], atol=1e-5)
    assert torch.allclose(found[:, :, 2:], right.unflatten(1, (4, 4))[:, :, 2:], atol=1e-5)
    disjoint = layer(layer.conditioning(regions={"vision": halves()}))
    ungrouped = replace(layer.conditioning(regions={"vision": halves()}), groups={})
    assert torch.allclose(disjoint, layer(ungrouped), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("router", [True, False], ids=["router", "no router"])
def test_a_layout_limits_one_person_as_in_a_batch_of_its_own(router: bool) -> None:
    layer = Layer(router)
    regions = halves() * 0.7
    found = layer(layer.conditioning(PRESENT, regions={"vision": regions}))
    assert torch.equal(found[1], layer.alone(0, regions={"vision": regions[:, :1]})[1])


@torch.no_grad()
@pytest.mark.parametrize("joint", [True, False], ids=["people=concatenate", "no router"])
def test_without_a_router_people_share_one_softmax(joint: bool) -> None:
    layer = Layer(router=False, joint=joint)
    conditioning = layer.conditioning(PRESENT)
    assert torch.equal(layer(conditioning), layer(replace(conditioning, groups={})))
    regions = {"vision": torch.ones(1, 2, 4, 4)}
    in_regions = layer(layer.conditioning(regions=regions))
    as_ungrouped = torch.allclose(in_regions, layer(replace(layer.conditioning(regions=regions), groups={})), atol=1e-6)
    assert as_ungrouped == joint


def test_gradients_reach_the_router() -> None:
    layer = Layer()
    layer(layer.conditioning()).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.router.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads.values()), grads
    assert (layer.router.order.grad[2:] == 0).all()  # type: ignore[index]  # nobody is third or fourth


def test_a_new_router_and_rows_without_a_choice_have_finite_gradients() -> None:
    layer = Layer(fresh=True)
    record: dict[str, list[Tensor]] = {}
    layer.people.requires_grad_()
    layer(layer.conditioning(PRESENT, record=record)).square().sum().backward()
    for parameter in (*layer.branch.parameters(), layer.people):
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    assert layer.router.scale.grad.abs() > 0 and layer.router.nobody.weight.grad.abs().sum() > 0  # type: ignore[union-attr]
    assert (layer.people.grad[1, 1] == 0).all() and (layer.people.grad[2] == 0).all()  # type: ignore[index]


def test_the_record_has_the_log_probabilities_of_every_call() -> None:
    layer = Layer()
    record: dict[str, list[Tensor]] = {}
    conditioning = layer.conditioning(PRESENT, record=record, scales={"vision": torch.tensor([0.0, 1.0, 1.0])})
    for _ in range(2):
        layer(conditioning)
    assert list(record) == [RECORDED] and [each.shape for each in record[RECORDED]] == [(3, 3, POSITIONS)] * 2
    first = record[RECORDED][0]
    assert torch.allclose(first.exp().sum(1), torch.ones(3, POSITIONS)) and first.requires_grad
    assert first[0].isfinite().all()
    assert torch.equal(first[1].exp(), torch.tensor([1.0, 0.0, 0.0])[:, None].expand(3, POSITIONS))
    assert torch.equal(first[2].exp(), torch.tensor([0.0, 0.0, 1.0])[:, None].expand(3, POSITIONS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_keeps_one_person_exact(dtype: torch.dtype) -> None:
    layer = Layer()
    layer.attn.to(dtype), layer.branch.to(dtype)
    layer.states, layer.text, layer.people = (each.to(dtype) for each in (layer.states, layer.text, layer.people))
    found = layer(layer.conditioning(PRESENT))
    assert found.dtype == dtype and found.isfinite().all()
    assert torch.equal(found[1], layer.alone(0)[1])


def test_five_people_are_one_too_many() -> None:
    router = Router(WIDTH, TOKEN_WIDTH)
    assert router.keys(Tokens(torch.randn(1, 8, TOKEN_WIDTH)), MAX_PEOPLE).shape == (1, MAX_PEOPLE + 1, ROUTER_WIDTH)
    with pytest.raises(ConfigError, match="4 people, not 5"):
        router.keys(Tokens(torch.randn(1, 10, TOKEN_WIDTH)), 5)
