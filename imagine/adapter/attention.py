"""Fully parallel attention: one query, one softmax per branch, outputs summed before the one output projection.

    out = to_out( Attn(q, k_text, v_text) + sum over branches of scale_b * gate_b * Attn(q, k_b, v_b) )

This is section 3.3 of *Imagine yourself* (arXiv 2409.13346): the three text encoders and the vision encoder never share
a softmax, so none can drown another out, and a branch that contributes zero leaves the base's arithmetic untouched.
For the paper's comparison (section 4.3.2) a branch may instead be concatenated: its keys and values stand beside the
text's under one softmax.

An `Adapter` (adapter.py) owns the weights, one `LayerWeights` per attention layer. The denoiser stays a stock diffusers
model: `ParallelAttention` is an attention processor that only refers to those weights, so neither the denoiser's module
tree nor its state dict changes. What a call attends to arrives with the call, as the `conditioning` argument; nothing
is ever stored here between calls, so threads and batch items cannot mix. What does not change between the steps of one
picture is kept in that argument's own memory.
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

from imagine.records import Conditioning, Scale, Tokens

TEXT = "clip"  # the denoiser's own text branch, as a name in Conditioning.memory

# A gate is GATE_GAIN times its parameter. Adam moves a parameter by about one learning rate per step, whatever its
# gradient, so a plain gate at 1e-4 would need ten thousand steps to open; a power of two keeps a gate of 1 exact.
GATE_GAIN = 8.0

# Backends that take a mask; the others get the native one wherever tokens have padding.
MASKED_BACKENDS = (
    AttentionBackendName.NATIVE,
    AttentionBackendName._NATIVE_EFFICIENT,
    AttentionBackendName._NATIVE_MATH,
    AttentionBackendName.XFORMERS,
)

KeysValues = tuple[Tensor, Tensor]  # each (batch, heads, tokens, head width)


class Branch(nn.Module):
    """One branch's key and value projections for one cross-attention layer, and the gate on its output."""

    def __init__(self, token_width: int, inner_width: int, zero_init: bool) -> None:
        super().__init__()
        self.to_k = nn.Linear(token_width, inner_width, bias=False)
        self.to_v = nn.Linear(token_width, inner_width, bias=False)
        # One factor per channel: as strong as the paper's zero convolution where it matters, and it folds into to_v
        # exactly, which is what an IP-Adapter file can hold.
        self.gate = nn.Parameter(torch.full((inner_width,), 0.0 if zero_init else 1.0 / GATE_GAIN))

    def keys_values(self, attn: Attention, tokens: Tensor) -> KeysValues:
        """Return the keys and gated values of tokens (batch, length, token width).

        A gate on values is one on what attention makes of them, but there are far fewer tokens than positions.
        """
        tokens = tokens.to(self.to_k.weight.dtype)
        return _keys(attn, self.to_k(tokens)), _heads(attn, self.gated(self.to_v(tokens)))

    def gated(self, values: Tensor) -> Tensor:
        """Values, or outputs, (batch, length, inner) behind the gate."""
        return values * (self.gate * GATE_GAIN)


class LowRank(nn.Module):
    """A low-rank addition to one linear layer (LoRA, arXiv 2106.09685), with peft's names and initial values.

    It is computed in every call, rather than by peft's layers, because peft keeps its scale on the module: there it
    could differ neither between two threads nor between two people in one batch.
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
    """How strongly a branch acts in a batch: in all rows, or (faster) in a slice of them, the others having none."""

    scale: Scale
    rows: slice | None = None
    active_scale: Scale = 1.0  # the strength within `rows`


def branch_strength(strength: Scale) -> BranchStrength:
    """Find the rows that a strength (batch,) leaves out at either end, as guidance's unconditional ones are.

    It reads the numbers, which waits for the device: once a picture rather than in every step.
    """
    if not isinstance(strength, Tensor):
        return BranchStrength(strength)
    numbers = strength.tolist()
    acts = [row for row, number in enumerate(numbers) if number != 0]
    if not acts:
        return BranchStrength(0.0)
    rows = slice(acts[0], acts[-1] + 1)
    active_scale = 1.0 if all(number == 1 for number in numbers[rows]) else strength[rows]
    return BranchStrength(strength, rows, active_scale)


class LayerWeights(nn.Module):
    """What one adapter adds to one attention layer: branches (cross-attention only) and low-rank additions.

    Children are named after the branches and after the linear layers the LoRA belongs to. `owner` names the branch
    whose strength the LoRA follows; it also fixes the order of summation when several adapters are attached. Branches
    named in `concatenated` share the text's softmax.
    """

    def __init__(
        self, owner: str, default_scales: dict[str, float], concatenated: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        self.owner = owner
        self.default_scales = default_scales
        self.concatenated = concatenated

    def branches(self) -> dict[str, Branch]:
        return {name: child for name, child in self.named_children() if isinstance(child, Branch)}

    def low_rank(self, target: str) -> LowRank | None:
        """Return the addition to the linear layer `target` ("to_q", "to_out.0"), if there is one."""
        module: nn.Module | None = self
        for part in target.split("."):
            module = None if module is None else module._modules.get(part)
        return module if isinstance(module, LowRank) else None

    def strength(self, conditioning: Conditioning, branch: str, name: str) -> BranchStrength | None:
        """Return how strongly a branch acts in this call and layer `name`; None: it is off.

        A batch item none of whose tokens count has no such branch, so its factor is 0.
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
        if tokens.mask is None or conditioning.cache is not None:  # `prepare` has folded the mask in already
            return found
        return BranchStrength(scale * tokens.mask.any(dim=1).to(tokens.values.dtype))


class ParallelAttention:
    """The processor of one attention layer while at least one adapter is attached.

    Immutable but for the attention backend, which `denoiser.set_attention_backend` sets where diffusers keeps it.
    """

    _parallel_config = None

    def __init__(self, name: str, stock: AttnProcessor2_0, layers: Sequence[LayerWeights]) -> None:
        self.name = name
        self.stock = stock  # put back when the last adapter is detached
        self._attention_backend: AttentionBackendName | None = None
        # A fixed order of summation: attaching the same adapters in another order must not change a single bit.
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

        Line by line the arithmetic of diffusers' AttnProcessor2_0, with the additions in between.
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
            concatenated = self._active_branches(attn, query, conditioning, concatenated=True)
            if concatenated:
                key, value, mask = _concatenate_branches(key, value, mask, concatenated)
            mixed = self._attend(query, key, value, mask)
            for each in self._active_branches(attn, query, conditioning, concatenated=False):
                mixed = self._add_branch(mixed, query, each)
        out = self._linear(attn, "to_out.0", mixed.to(query.dtype), conditioning)
        out = attn.to_out[1](out)  # dropout
        if hidden_states.dim() == 4:
            out = out.transpose(-1, -2).reshape(hidden_states.shape)
        if attn.residual_connection:
            out = out + residual
        return cast(Tensor, out / attn.rescale_output_factor)

    def _add_branch(self, mixed: Tensor, query: Tensor, each: "_ActiveBranch") -> Tensor:
        """The outputs so far (batch, positions, inner) with a branch's added, where in the picture it acts."""
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

    def _attend_in(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, region: Tensor) -> Tensor:
        return self._attend(query, key, value, mask) * region

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """One softmax attention; (batch, heads, length, head width) in, (batch, length, inner) out."""
        backend = self._attention_backend
        if mask is not None:  # None is the active one: the environment's, or that of diffusers' attention_backend()
            acts = _AttentionBackendRegistry.get_active_backend()[0] if backend is None else backend
            backend = backend if acts in MASKED_BACKENDS else AttentionBackendName.NATIVE
        rows = [states.transpose(1, 2) for states in (query, key, value)]
        return dispatch_attention_fn(*rows, attn_mask=mask, backend=backend).flatten(2)

    def _text_keys_values(self, attn: Attention, text: Tensor, conditioning: Conditioning) -> KeysValues:
        """The denoiser's own keys and values (LoRA included) of text tokens (batch, length, width)."""
        known = (conditioning.cache or {}).get((self.name, TEXT))
        if known is not None and known[0] is text:  # the same tensor, which the memory keeps alive
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
            acts = None if low_rank is None else layer.strength(conditioning, layer.owner, self.name)
            if low_rank is not None and acts is not None:
                out = _add_scaled_rows(out, acts, low_rank, states).to(out.dtype)
        return out

    def _active_branches(
        self, attn: Attention, query: Tensor, conditioning: Conditioning, concatenated: bool
    ) -> "list[_ActiveBranch]":
        """The branches of one kind that this call attends to, in a fixed order."""
        present = []
        for layer in self.layers:
            for name, branch in layer.branches().items():
                acts = layer.strength(conditioning, name, self.name)
                if acts is None or (name in layer.concatenated) != concatenated:
                    continue
                tokens = conditioning.branches[name]
                key, value = _cached(conditioning, (self.name, name), partial(branch.keys_values, attn, tokens.values))
                mask = tokens.mask if conditioning.cache is not None else usable_mask(tokens)
                regions = _regions_at(conditioning, name, query)
                present.append(_ActiveBranch(acts, key.to(query.dtype), value.to(query.dtype), mask, regions))
        return present


@dataclass(frozen=True)
class _ActiveBranch:
    """A branch in one call: its keys and values (batch, heads, length, head width), and which tokens count."""

    branch_strength: BranchStrength
    key: Tensor
    value: Tensor
    mask: Tensor | None  # (batch, length)
    regions: Tensor | None  # (batch, references, positions)


def _cached(conditioning: Conditioning, key: tuple[str, str], compute: Callable[[], Any]) -> Any:
    """What the call's memory holds under this key; computed, and kept if there is a memory, when it is missing."""
    if conditioning.cache is None:
        return compute()
    if key not in conditioning.cache:
        conditioning.cache[key] = compute()
    return conditioning.cache[key]


def _regions_at(conditioning: Conditioning, branch: str, query: Tensor) -> Tensor | None:
    """A branch's regions (batch, references, positions) at the resolution of a layer's positions, as diffusers has it.

    The work of diffusers' IPAdapterMaskProcessor (image_processor.py), which resizes bicubically.
    """
    regions = conditioning.regions.get(branch)
    if regions is None:
        return None
    batch, _, positions, _ = query.shape

    def resized() -> Tensor:
        each = [IPAdapterMaskProcessor.downsample(one, batch, positions, 1)[..., 0] for one in regions.unbind(1)]
        return torch.stack(each, 1).to(query.device, query.dtype)

    return cast(Tensor, _cached(conditioning, (f"regions of {branch}", str(positions)), resized))


def _concatenate_branches(
    key: Tensor, value: Tensor, mask: Tensor | None, concatenated: Sequence[_ActiveBranch]
) -> tuple[Tensor, Tensor, Tensor]:
    """The text's keys, values and additive mask with those of other branches beside them.

    Strength acts on a branch's values, as its gate did already; where it is 0 its tokens do not count, so that the text
    is alone.
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
    denoiser = getattr(denoiser, "_orig_mod", denoiser)  # torch.compile wraps a module in another, and its paths too
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, Attention)}


def processor_of(attn: Attention) -> object:
    """Return a layer's processor, whoever set it."""
    return attn.processor


def usable_mask(tokens: Tokens) -> Tensor | None:
    """Return the key-padding mask with every token counting in those batch items where none does.

    A softmax over nothing is not a number; such an item's branch has strength 0 (`LayerWeights.strength`), so what it
    would attend to is irrelevant as long as it is finite.
    """
    return None if tokens.mask is None else tokens.mask | ~tokens.mask.any(dim=1, keepdim=True)


def strength_key(branch: str, layer: str = "") -> tuple[str, str]:
    """Where a call's memory keeps what `branch_strength` found of a branch's strength, which may differ by layer."""
    return f"strength of {branch}", layer


def _add_scaled_rows(
    base: Tensor, acts: BranchStrength, addition: Callable[..., Tensor], *inputs: Tensor | None
) -> Tensor:
    """Return base with strength times addition(*inputs), which is not even computed for rows in which it does not act.

    `base` must be the caller's own: without gradients it is changed in place.
    """
    rows = acts.rows
    if rows is None:
        return _add(base, addition(*inputs), acts.scale)
    part = base[rows]
    added = addition(*(each if each is None or len(each) == 1 else each[rows] for each in inputs))
    if not torch.is_grad_enabled():
        part.add_(_scaled(added, acts.active_scale))
        return base
    summed = _add(part, added, acts.active_scale)
    if len(part) == len(base):
        return summed
    return torch.cat((base[: rows.start], summed.to(base.dtype), base[rows.stop :]))


def _add(base: Tensor, addition: Tensor, strength: Scale) -> Tensor:
    """Return base + strength * addition; items whose strength is 0 keep the base bit for bit, whatever the addition."""
    return base + _scaled(addition, strength)


def _scaled(addition: Tensor, strength: Scale) -> Tensor:
    """Strength times an addition, and exactly 0 in the items (batch first) whose strength is 0."""
    if not isinstance(strength, Tensor):
        return addition if strength == 1 else strength * addition
    strength = strength.to(addition.device).view(-1, *[1] * (addition.dim() - 1))
    return torch.where(strength != 0, strength * addition, 0)


def _heads(attn: Attention, states: Tensor) -> Tensor:
    """(batch, length, inner) to (batch, heads, length, head width)."""
    return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _keys(attn: Attention, states: Tensor) -> Tensor:
    keys = _heads(attn, states)
    return keys if attn.norm_k is None else attn.norm_k(keys)


def _stock_mask(attn: Attention, mask: Tensor | None, key: Tensor) -> Tensor | None:
    """Bring diffusers' additive mask (batch, 1, length) to (batch, heads, 1, length)."""
    if mask is None:
        return None
    batch, length = key.shape[0], key.shape[2]
    prepared = attn.prepare_attention_mask(mask, length, batch)
    return prepared.view(batch, attn.heads, -1, prepared.shape[-1])
