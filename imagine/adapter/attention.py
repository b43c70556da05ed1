"""Fully parallel attention: one query, one softmax per branch, outputs summed before the one output projection.

    out = to_out( Attn(q, k_text, v_text) + sum over branches of scale_b * gate_b * Attn(q, k_b, v_b) )

This is section 3.3 of *Imagine yourself* (arXiv 2409.13346). The three text encoders and the vision encoder never share
a softmax, so none can suppress another, and a branch with a zero contribution does not change the base's arithmetic.
For the paper's comparison (section 4.3.2) a branch may instead be concatenated: its keys and values are appended to the
text's, under one softmax.

Where a picture has several people, a branch gives each of them a softmax of its own, and mixes the outputs per position
(router.py). With one person this is the formula above, bit for bit.

An `Adapter` (adapter.py) owns the weights, one `LayerWeights` per attention layer. The denoiser stays a stock diffusers
model: `ParallelAttention` is an attention processor that only refers to those weights, so neither the denoiser's module
tree nor its state dict changes. The tokens to attend to are passed with each call, in the `conditioning` argument. The
processor stores nothing between calls, so threads and batch items cannot mix. Values that are constant over the steps
of one picture are cached in the `conditioning` argument itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from imagine.adapter.router import Router, log_shares, shares_of
from imagine.errors import WeightsError
from imagine.records import Conditioning, Scale, Tokens, Watched, attention_to

TEXT = "clip"  # the denoiser's own text branch, as a name in Conditioning.cache

# A gate is GATE_GAIN times its parameter. Adam changes a parameter by about one learning rate per step, whatever its
# gradient, so a plain gate at 1e-4 would need ten thousand steps to open. A power of two keeps a gate of 1 exact.
GATE_GAIN = 8.0

# Attention backends that accept a mask; where tokens have padding, the others are replaced by the native one.
MASKED_BACKENDS = (
    AttentionBackendName.NATIVE,
    AttentionBackendName._NATIVE_EFFICIENT,
    AttentionBackendName._NATIVE_MATH,
    AttentionBackendName.XFORMERS,
)

KeysValues = tuple[Tensor, Tensor]  # each (batch, heads, tokens, head width)


class Branch(nn.Module):
    """One branch in one cross-attention layer: key and value projections, the gate on its output, perhaps a router."""

    def __init__(self, token_width: int, inner_width: int, zero_init: bool, router: bool = False) -> None:
        super().__init__()
        self.to_k = nn.Linear(token_width, inner_width, bias=False)
        self.to_v = nn.Linear(token_width, inner_width, bias=False)
        # One factor per channel is as expressive as the paper's zero convolution where it matters, and it can be folded
        # into to_v exactly, which is the only form that an IP-Adapter file can hold.
        self.gate = nn.Parameter(torch.full((inner_width,), 0.0 if zero_init else 1.0 / GATE_GAIN))
        self.router = Router(inner_width, token_width) if router else None

    def keys_values(self, attn: Attention, tokens: Tensor) -> KeysValues:
        """Return the keys and gated values of tokens (batch, length, token width).

        Gating the values equals gating the attention output, but there are far fewer tokens than positions.
        """
        tokens = tokens.to(self.to_k.weight.dtype)
        return _keys(attn, self.to_k(tokens)), _heads(attn, self.gated(self.to_v(tokens)))

    def gated(self, values: Tensor) -> Tensor:
        """Return values, or outputs, (batch, length, inner) multiplied by the gate."""
        return values * (self.gate * GATE_GAIN)


class LowRank(nn.Module):
    """A low-rank addition to one linear layer (LoRA, arXiv 2106.09685), with peft's names and initial values.

    It is not one of peft's layers, because peft stores its scale on the module, where it could not differ between two
    threads or between two people in one batch.
    """

    def __init__(self, in_width: int, out_width: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Linear(in_width, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_width, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, states: Tensor) -> Tensor:
        return cast(Tensor, self.lora_B(self.lora_A(states.to(self.lora_A.weight.dtype))))


@dataclass(frozen=True)
class BranchStrength:
    """The strength of a branch in a batch: in all rows, or (faster) in a slice of the rows and 0 in the others."""

    scale: Scale
    rows: slice | None = None
    active_scale: Scale = 1.0  # the strength within `rows`


def branch_strength(strength: Scale) -> BranchStrength:
    """Find the rows at either end where a strength (batch,) is 0, such as the unconditional rows of guidance.

    This reads the numbers, which waits for the device; call it once per picture rather than in every step.
    """
    if not isinstance(strength, Tensor):
        return BranchStrength(strength)
    numbers = strength.tolist()
    active_rows = [row for row, number in enumerate(numbers) if number != 0]
    if not active_rows:
        return BranchStrength(0.0)
    rows = slice(active_rows[0], active_rows[-1] + 1)
    active_scale = 1.0 if all(number == 1 for number in numbers[rows]) else strength[rows]
    return BranchStrength(strength, rows, active_scale)


def _presence(strength: BranchStrength) -> BranchStrength:
    """Return a strength of 1 where the given one is not 0."""

    def ones(scale: Scale) -> Scale:
        return (scale != 0).to(scale.dtype) if isinstance(scale, Tensor) else float(scale != 0)

    return BranchStrength(ones(strength.scale), strength.rows, ones(strength.active_scale))


class LayerWeights(nn.Module):
    """The weights that one adapter adds to one attention layer: branches (cross-attention only) and low-rank additions.

    Children are named after the branches and after the linear layers that the LoRA belongs to. `owner` names the branch
    whose strength the LoRA follows; it also fixes the order of summation when several adapters are attached. Branches
    named in `concatenated` share the text's softmax. In branches named in `joint`, all people share one softmax. With
    `lora_by_presence` the LoRA is fully on wherever the owner's strength is not 0.
    """

    def __init__(
        self,
        owner: str,
        default_scales: dict[str, float],
        concatenated: frozenset[str] = frozenset(),
        joint: frozenset[str] = frozenset(),
        lora_by_presence: bool = False,
    ) -> None:
        super().__init__()
        self.owner = owner
        self.default_scales = default_scales
        self.concatenated = concatenated
        self.joint = concatenated | joint
        self.lora_by_presence = lora_by_presence

    def branches(self) -> dict[str, Branch]:
        return {name: child for name, child in self.named_children() if isinstance(child, Branch)}

    def low_rank(self, target: str) -> LowRank | None:
        """Return the addition to the linear layer `target` ("to_q", "to_out.0"), if there is one."""
        module: nn.Module | None = self
        for part in target.split("."):
            module = None if module is None else module._modules.get(part)
        return module if isinstance(module, LowRank) else None

    def strength(self, conditioning: Conditioning, branch: str, name: str) -> BranchStrength | None:
        """Return the strength of a branch in this call and layer `name`; None if it is off.

        The strength is 0 for a batch item whose tokens are all masked.
        """
        tokens = conditioning.branches.get(branch)
        if tokens is None:
            return None
        scale = conditioning.scales.get(branch, self.default_scales[branch])
        key = strength_key(branch, name if isinstance(scale, Mapping) else "")
        if isinstance(scale, Mapping):
            scale = scale.get(name, 0.0)
        if not isinstance(scale, Tensor):
            found = BranchStrength(scale)
        elif (known := (conditioning.cache or {}).get(key)) is not None and known[0] is scale:
            found = known[1]
        else:
            found = BranchStrength(scale)
        if not isinstance(found.scale, Tensor) and found.scale == 0:
            return None
        if tokens.mask is None or conditioning.cache is not None:  # `prepare` has already applied the mask
            return found
        return BranchStrength(scale * tokens.mask.any(dim=1).to(tokens.values.dtype))


class ParallelAttention:
    """The processor of one attention layer while at least one adapter is attached.

    Immutable except for the attention backend, which `denoiser.set_attention_backend` sets where diffusers stores it.
    """

    _parallel_config = None

    def __init__(
        self, name: str = "", stock: AttnProcessor2_0 | None = None, layers: Sequence[LayerWeights] = ()
    ) -> None:
        if stock is None:  # diffusers creates a new processor of the same class when it loads or removes an IP-Adapter
            raise WeightsError(
                "An adapter of imagine is attached to this denoiser, and diffusers' own IP-Adapters would remove it: "
                "call load_ip_adapter and unload_ip_adapter of imagine's pipeline, or unload_adapter() first."
            )
        self.name = name
        self.stock = stock  # restored when the last adapter is detached
        self._attention_backend: AttentionBackendName | None = None
        # A fixed order of summation, so that the order in which adapters are attached does not change the result.
        self.layers = tuple(sorted(layers, key=lambda layer: layer.owner))

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        """Return the layer's output for states (batch, positions, width) or (batch, width, height, width).

        The arithmetic is that of diffusers' AttnProcessor2_0, line by line, with the additions in between.
        """
        conditioning = conditioning or Conditioning()
        residual = hidden_states
        states = hidden_states.flatten(2).transpose(1, 2) if hidden_states.dim() == 4 else hidden_states
        if attn.group_norm is not None:
            states = attn.group_norm(states.transpose(1, 2)).transpose(1, 2)
        query = _heads(attn, self._linear(attn, "to_q", states, conditioning))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if encoder_hidden_states is None:
            key, value = self._keys_values(attn, states, conditioning)
            mixed = self._attend(query, key, value, _stock_mask(attn, attention_mask, key))
        else:
            key, value = self._text_keys_values(attn, encoder_hidden_states, conditioning)
            mask = _stock_mask(attn, attention_mask, key)
            if conditioning.watch is not None and "text" in conditioning.watch:
                conditioning.watch["text"][self.name] = Watched(query, key, mask)
            if conditioning.watch is not None and "states" in conditioning.watch:
                conditioning.watch["states"][self.name] = states
            concatenated = self._active_branches(attn, query, conditioning, concatenated=True)
            if concatenated:
                key, value, mask = _concatenate_branches(key, value, mask, concatenated)
            mixed = self._attend(query, key, value, mask)
            for each in self._active_branches(attn, query, conditioning, concatenated=False):
                mixed = self._add_watched(mixed, query, each, conditioning)
        out = self._linear(attn, "to_out.0", mixed.to(query.dtype), conditioning)
        out = attn.to_out[1](out)  # dropout
        if hidden_states.dim() == 4:
            out = out.transpose(-1, -2).reshape(hidden_states.shape)
        if attn.residual_connection:
            out = out + residual
        return cast(Tensor, out / attn.rescale_output_factor)

    def _add_watched(self, mixed: Tensor, query: Tensor, each: "_ActiveBranch", conditioning: Conditioning) -> Tensor:
        """Add a branch as `_add_branch` does, and show its attention or its output's mean square if asked to."""
        if conditioning.watch is not None and (key := attention_to(each.name)) in conditioning.watch:
            shown = Watched(query, each.key, _added_mask(each.mask, query), each.value)
            conditioning.watch[key][self.name] = shown
        if conditioning.watch is None or each.name not in conditioning.watch:
            return self._add_branch(mixed, query, each)
        before = mixed.clone()  # without gradients the sum is made in place
        mixed = self._add_branch(mixed, query, each)
        conditioning.watch[each.name][self.name] = (mixed - before).square().mean(2)
        return mixed

    def _add_branch(self, mixed: Tensor, query: Tensor, each: "_ActiveBranch") -> Tensor:
        """Return the outputs `mixed` (batch, positions, inner) plus a branch's output, limited to its regions."""
        if each.people is not None:
            return self._add_people(mixed, query, each, each.people)
        mask = None if each.mask is None else each.mask[:, None, None]
        if each.regions is None:
            return _add_scaled_rows(mixed, each.branch_strength, self._attend, query, each.key, each.value, mask)
        count = each.regions.shape[1]
        masks: Sequence[Tensor | None] = [None] * count if mask is None else mask.chunk(count, -1)
        per_region = zip(each.key.chunk(count, 2), each.value.chunk(count, 2), masks, strict=True)
        for number, (key, value, counted) in enumerate(per_region):
            region = each.regions[:, number, :, None]
            mixed = _add_scaled_rows(mixed, each.branch_strength, self._attend_in, query, key, value, counted, region)
        return mixed

    def _add_people(self, mixed: Tensor, query: Tensor, each: "_ActiveBranch", people: "_People") -> Tensor:
        """Return the outputs `mixed` (batch, positions, inner) plus a branch's output for several people."""
        strength = each.branch_strength
        if people.record is not None:
            strength = BranchStrength(strength.scale)  # all rows, so that the record has all of them
        addition = partial(self._attend_people, people)
        inputs = (query, each.key, each.value, each.mask, people.present, people.keys, each.regions)
        return _add_scaled_rows(mixed, strength, addition, *inputs)

    def _attend_people(
        self, people: "_People", query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        present: Tensor, router_keys: Tensor | None, regions: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attend to each person separately, all in one call, and return the mixed output (batch, positions, inner)."""
        chosen = None
        if people.router is not None and router_keys is not None:
            chosen = log_shares(people.router(query.transpose(1, 2).flatten(2), router_keys), present, regions)
            if people.record is not None:
                people.record.setdefault(f"router {self.name}", []).append(chosen)
        shares = shares_of(chosen, present, regions).to(query.dtype)
        count = present.shape[1]
        key, value = (states.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1) for states in (key, value))
        mask = None if mask is None else mask.unflatten(1, (count, -1)).flatten(0, 1)[:, None, None]
        outputs = self._attend(query.repeat_interleave(count, 0), key, value, mask).unflatten(0, (-1, count))
        mixed = outputs[:, 0] * shares[:, 0, :, None]
        for person in range(1, count):
            mixed = torch.addcmul(mixed, outputs[:, person], shares[:, person, :, None])
        return mixed

    def _attend_in(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, region: Tensor) -> Tensor:
        return self._attend(query, key, value, mask) * region

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Compute one softmax attention from (batch, heads, length, head width) to (batch, length, inner)."""
        if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad:
            return _products(query, key, value, mask).transpose(1, 2).flatten(2)
        backend = self._attention_backend
        if mask is not None:  # a backend of None is the active one, from the environment or attention_backend()
            active = _AttentionBackendRegistry.get_active_backend()[0] if backend is None else backend
            backend = backend if active in MASKED_BACKENDS else AttentionBackendName.NATIVE
        rows = [states.transpose(1, 2) for states in (query, key, value)]
        return dispatch_attention_fn(*rows, attn_mask=mask, backend=backend).flatten(2)

    def _text_keys_values(self, attn: Attention, text: Tensor, conditioning: Conditioning) -> KeysValues:
        """Return the denoiser's own keys and values (LoRA included) of text tokens (batch, length, width)."""
        known = (conditioning.cache or {}).get((self.name, TEXT))
        if known is not None and known[0] is text:  # the same tensor object, which the cache keeps alive
            return cast(KeysValues, known[1])
        read = text if attn.norm_cross is None else attn.norm_encoder_hidden_states(text)
        found = self._keys_values(attn, read, conditioning)
        if conditioning.cache is not None:
            conditioning.cache[self.name, TEXT] = (text, found)
        return found

    def _keys_values(self, attn: Attention, source: Tensor, conditioning: Conditioning) -> KeysValues:
        key = _keys(attn, self._linear(attn, "to_k", source, conditioning))
        return key, _heads(attn, self._linear(attn, "to_v", source, conditioning))

    def _linear(self, attn: Attention, target: str, states: Tensor, conditioning: Conditioning) -> Tensor:
        out: Tensor = attn.get_submodule(target)(states)
        for layer in self.layers:
            low_rank = layer.low_rank(target)
            strength = None if low_rank is None else layer.strength(conditioning, layer.owner, self.name)
            if strength is not None and layer.lora_by_presence:
                strength = _presence(strength)
            if low_rank is not None and strength is not None:
                out = _add_scaled_rows(out, strength, low_rank, states).to(out.dtype)
        return out

    def _active_branches(
        self, attn: Attention, query: Tensor, conditioning: Conditioning, concatenated: bool
    ) -> "list[_ActiveBranch]":
        """Return the branches of one kind, concatenated or not, that are on in this call, in a fixed order."""
        present = []
        for layer in self.layers:
            for name, branch in layer.branches().items():
                strength = layer.strength(conditioning, name, self.name)
                if strength is None or (name in layer.concatenated) != concatenated:
                    continue
                tokens = conditioning.branches[name]
                key, value = cached(conditioning, (self.name, name), partial(branch.keys_values, attn, tokens.values))
                regions = regions_at(conditioning, name, len(query), query.shape[2], query)
                people = self._people(layer, name, branch, conditioning)
                if people is not None:
                    mask = mask_of_people(conditioning, name)
                else:
                    mask = tokens.mask if conditioning.cache is not None else usable_mask(tokens)
                key, value = key.to(query.dtype), value.to(query.dtype)
                present.append(_ActiveBranch(strength, key, value, mask, regions, people, name))
        return present

    def _people(self, layer: LayerWeights, name: str, branch: Branch, conditioning: Conditioning) -> "_People | None":
        """Return what a branch needs to keep several people apart; None for one person, or if they share a softmax."""
        groups, router = conditioning.groups.get(name), branch.router
        if groups is None or groups.shape[1] == 1 or name in layer.joint:
            return None
        if router is None:
            return None if name not in conditioning.regions else _People(groups)
        compute = partial(router.keys, conditioning.branches[name], groups.shape[1])
        keys = cached(conditioning, (self.name, f"router of {name}"), compute)
        return _People(groups, router, keys, conditioning.record)


def _added_mask(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return a mask (batch, length) of attended tokens as what is added to scores, (batch, 1, 1, length)."""
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)[:, None, None]


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention as two products and a softmax: shapes as `_attend`, but (batch, heads, length, head width).

    PyTorch's kernels train slowly on a CPU in bf16: per layer of 64 positions forwards and backwards, the fused one
    takes five times as long as this, and its own plain one twice as long.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    return scores.softmax(-1) @ value


@dataclass(frozen=True)
class _ActiveBranch:
    """A branch in one call: its keys and values (batch, heads, length, head width), its mask and its regions."""

    branch_strength: BranchStrength
    key: Tensor
    value: Tensor
    mask: Tensor | None  # (batch, length)
    regions: Tensor | None  # (batch, references, positions)
    people: "_People | None" = None  # None: one softmax per region, or one in all
    name: str = ""


@dataclass(frozen=True)
class _People:
    """The people of a branch in one call, of whom at least one item may have several, and what shares them out."""

    present: Tensor  # (batch, people)
    router: Router | None = None
    keys: Tensor | None = None  # the router's keys, (batch, people + 1, width)
    record: dict[str, list[Tensor]] | None = None


def cached(conditioning: Conditioning, key: tuple[str, str], compute: Callable[[], Any]) -> Any:
    """Return the cache entry of this key. If it is missing, compute it and, if there is a cache, store it."""
    if conditioning.cache is None:
        return compute()
    if key not in conditioning.cache:
        conditioning.cache[key] = compute()
    return conditioning.cache[key]


def mask_of_people(conditioning: Conditioning, branch: str) -> Tensor | None:
    """Return a branch's mask (batch, people * length) with all tokens unmasked of people who are not there.

    With a cache, None if every token is then unmasked, as with one person (`adapter.prepare`).
    """
    tokens, groups = conditioning.branches[branch], conditioning.groups[branch]

    def usable() -> Tensor | None:
        if tokens.mask is None:
            return None
        each = tokens.mask.unflatten(1, (groups.shape[1], -1))
        each = each | ~each.any(dim=2, keepdim=True)
        return None if conditioning.cache is not None and bool(each.all()) else each.flatten(1)

    return cast("Tensor | None", cached(conditioning, (f"people of {branch}", ""), usable))


def regions_at(conditioning: Conditioning, branch: str, batch: int, positions: int, like: Tensor) -> Tensor | None:
    """Return a branch's regions (batch, references, positions) at the resolution of a layer's positions.

    diffusers' IPAdapterMaskProcessor (image_processor.py) resizes them, bicubically. They have the device and the dtype
    of `like`.
    """
    regions = conditioning.regions.get(branch)
    if regions is None:
        return None

    def resized() -> Tensor:
        each = [IPAdapterMaskProcessor.downsample(one, batch, positions, 1)[..., 0] for one in regions.unbind(1)]
        return torch.stack(each, 1).to(like.device, like.dtype)

    return cast(Tensor, cached(conditioning, (f"regions of {branch}", str(positions)), resized))


def _concatenate_branches(
    key: Tensor, value: Tensor, mask: Tensor | None, concatenated: Sequence[_ActiveBranch]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the text's keys, values and additive mask with those of the concatenated branches appended.

    The strength multiplies a branch's values, as its gate already did. Where the strength is 0 its tokens are masked,
    so that only the text remains.
    """
    batch, heads = key.shape[:2]
    text = key.new_zeros(batch, 1, 1, key.shape[2]) if mask is None else mask
    keys, values, masks = [key], [value], [text.expand(batch, heads, 1, -1)]
    for each in concatenated:
        strength = torch.as_tensor(each.branch_strength.scale, dtype=key.dtype, device=key.device).expand(batch)
        keys.append(each.key)
        values.append(each.value * strength.view(-1, 1, 1, 1))
        counts = (strength != 0)[:, None] & (each.mask if each.mask is not None else each.key.new_ones(()).bool())
        bias = torch.zeros(batch, each.key.shape[2], dtype=key.dtype, device=key.device)
        bias = bias.masked_fill(~counts, -torch.inf)
        masks.append(bias[:, None, None].expand(batch, heads, 1, -1))
    return torch.cat(keys, 2), torch.cat(values, 2), torch.cat(masks, -1)


def attention_layers(denoiser: nn.Module) -> dict[str, Attention]:
    """Return the denoiser's attention layers by module path, in the order in which diffusers enumerates processors."""
    denoiser = getattr(denoiser, "_orig_mod", denoiser)  # torch.compile wraps the module and prefixes its paths
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, Attention)}


def processor_of(attn: Attention) -> object:
    """Return a layer's processor, of any type."""
    return attn.processor


def usable_mask(tokens: Tokens) -> Tensor | None:
    """Return the key-padding mask, with every token unmasked in batch items where all are masked.

    A softmax over no tokens is NaN. The branch of such an item has strength 0 (`LayerWeights.strength`), so what it
    attends to is irrelevant as long as it is finite.
    """
    return None if tokens.mask is None else tokens.mask | ~tokens.mask.any(dim=1, keepdim=True)


def strength_key(branch: str, layer: str = "") -> tuple[str, str]:
    """Return the cache key for the result of `branch_strength` of a branch, which may differ by layer."""
    return f"strength of {branch}", layer


def _add_scaled_rows(
    base: Tensor, strength: BranchStrength, addition: Callable[..., Tensor], *inputs: Tensor | None
) -> Tensor:
    """Return base + strength * addition(*inputs), without computing the addition for rows where the strength is 0.

    The caller must own `base`: without gradients it is changed in place.
    """
    rows = strength.rows
    if rows is None:
        return _add(base, addition(*inputs), strength.scale)
    part = base[rows]
    added = addition(*(each if each is None or len(each) == 1 else each[rows] for each in inputs))
    if not torch.is_grad_enabled():
        part.add_(scaled(added, strength.active_scale))
        return base
    summed = _add(part, added, strength.active_scale)
    if len(part) == len(base):
        return summed
    return torch.cat((base[: rows.start], summed.to(base.dtype), base[rows.stop :]))


def _add(base: Tensor, addition: Tensor, strength: Scale) -> Tensor:
    """Return base + strength * addition; items whose strength is 0 keep the base bit-identical.

    In bf16 with gradients this takes one pass over memory. It assumes a finite addition: bf16 has the range of fp32.
    """
    if isinstance(strength, Tensor) and addition.dtype == torch.bfloat16 and addition.requires_grad:
        return torch.addcmul(base, addition, _per_item(strength, addition).to(addition.dtype))
    return base + scaled(addition, strength)


def scaled(addition: Tensor, strength: Scale) -> Tensor:
    """Return strength * addition, exactly 0 in the items (batch first) whose strength is 0."""
    if not isinstance(strength, Tensor):
        return addition if strength == 1 else strength * addition
    strength = _per_item(strength, addition)
    return torch.where(strength != 0, strength * addition, 0)


def _per_item(strength: Tensor, like: Tensor) -> Tensor:
    """Return the strengths (batch,) in a shape that multiplies the items of `like` (batch first), on its device."""
    return strength.to(like.device).view(-1, *[1] * (like.dim() - 1))


def _heads(attn: Attention, states: Tensor) -> Tensor:
    """Reshape (batch, length, inner) to (batch, heads, length, head width)."""
    return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _keys(attn: Attention, states: Tensor) -> Tensor:
    keys = _heads(attn, states)
    return keys if attn.norm_k is None else attn.norm_k(keys)


def _stock_mask(attn: Attention, mask: Tensor | None, key: Tensor) -> Tensor | None:
    """Expand diffusers' additive mask (batch, 1, length) to (batch, heads, 1, length)."""
    if mask is None:
        return None
    batch, length = key.shape[0], key.shape[2]
    prepared = attn.prepare_attention_mask(mask, length, batch)
    return prepared.view(batch, attn.heads, -1, prepared.shape[-1])
