"""The branch at one site of a transformer: its own queries, keys and values, and a gate that starts at zero.

    out = attention(x, ...)
    out[target] += strength * W_out( gate * Attn(norm(W_q x[target]), norm(W_k tokens), W_v tokens) )

`x` is the modulated input of the attention, and `out` what it returns, so that the block's own gate, which depends on
the noise level, acts on the branch too. The branch has its own queries because not every transformer has a `to_q` that
could be shared: single blocks of FLUX.2 and fused or sharded projections have none. Sparse cross-attention on the image
tokens alone is the design of PuLID-FLUX (arXiv 2404.16022); queries and keys are normalised as in the transformers
themselves. Several people get a softmax each, mixed by the router of `imagine.adapter.router`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagine.adapter.attention import (
    Branch,
    BranchStrength,
    KeysValues,
    LayerWeights,
    cached,
    mask_of_people,
    regions_at,
    scaled,
    usable_mask,
)
from imagine.adapter.router import log_shares, shares_of
from imagine.records import Conditioning, Tokens
from imagine.transformer_bases.families import Site
from imagine.transformer_bases.passing import Pass

NORM_EPSILON = 1e-6
QUERIES = "queries"  # the transformer's own queries at the site under way, in `Pass.computed`


class ImageBranch(Branch):
    """A branch of one site: Branch's keys, values, gate and router, with its own queries and output projection.

    state_width: the width of the image tokens. heads, head_width: of its own attention, which is narrower than the
    transformer's, because its queries and output projection are what it costs.
    """

    changes_per_step = False  # whether keys and values depend on the noise level

    def __init__(
        self, state_width: int, token_width: int, heads: int, head_width: int, zero_init: bool, router: bool = False
    ) -> None:
        super().__init__(token_width, heads * head_width, zero_init, router)
        self.heads = heads
        self.to_q = nn.Linear(state_width, heads * head_width, bias=False)
        self.norm_q = nn.RMSNorm(head_width, eps=NORM_EPSILON)
        self.norm_k = nn.RMSNorm(head_width, eps=NORM_EPSILON)
        self.to_out = nn.Linear(heads * head_width, state_width, bias=False)

    def image_keys_values(self, tokens: Tokens, _: Pass) -> KeysValues:
        """Return keys and gated values, each (batch, heads, length, head width), of a branch's tokens."""
        values = tokens.values.to(self.to_k.weight.dtype)
        key, value = self.to_k(values), self.gated(self.to_v(values))
        return _normalised(self.norm_k, self._heads(key)), self._heads(value)

    def queries(self, _: Any, states: Tensor, __: Tensor | None = None) -> Tensor:
        """Return queries (batch, heads, positions, head width) of image tokens (batch, positions, width)."""
        return _normalised(self.norm_q, self._heads(self.to_q(states.to(self.to_q.weight.dtype))))

    def attend(
        self, attention: Any, states: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Return the output (batch, positions, inner width) of one softmax over all tokens."""
        return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)

    def project(self, _: Any, mixed: Tensor) -> Tensor:
        """Return what is added to the site's output, (batch, positions, width), from all heads side by side."""
        return cast(Tensor, self.to_out(mixed))

    def add(self, output: Any, part: slice, strength: BranchStrength, addition: Callable[[slice], Tensor]) -> Any:
        """Return the site's output with the addition in its target tokens."""
        return add_to_first(output, part, strength, addition)

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _normalised(norm: nn.RMSNorm, states: Tensor) -> Tensor:
    """Normalise in the precision of the weights, which under autocast is not that of the projected states."""
    return cast(Tensor, norm(states.to(norm.weight.dtype)))


class SiteHook:
    """The forward hook of one site: adds the branches of all attached adapters that are on in the current pass."""

    def __init__(
        self, site: Site, layers: tuple[LayerWeights, ...], current: Callable[[], Pass | None], number: int = 0
    ) -> None:
        self.name, self.joint, self.current = site.name, site.joint, current
        self.number = torch.tensor([number])  # a tensor, because compiled code is made again for every other number
        # A fixed order of summation, so that the order in which adapters are attached does not change the result.
        self.layers = tuple(sorted(layers, key=lambda layer: layer.owner))

    def __call__(self, attention: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Return the output of the attention with the branches added; None leaves it as it is."""
        current = self.current()
        if current is None:
            return None
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        part = current.target.joint if self.joint else current.target.image
        for layer in self.layers:
            for name, branch in layer.branches().items():
                strength = self._strength(layer, current, name)
                if strength is not None:
                    made = _SiteBranch(self, name, cast(ImageBranch, branch), name in layer.joint, part, current)
                    output = made.add_to(output, attention, states[:, part], strength)
        return output

    def _strength(self, layer: LayerWeights, current: Pass, branch: str) -> BranchStrength | None:
        """Return the strength of a branch here; None if it is off.

        Compiled code that reads the name of one site is compiled again for each other site, so the name is read only
        where strengths differ by site, and compiled blocks have them in one tensor (sites, rows) instead (`passing`).
        """
        scale = current.conditioning.scales.get(branch)
        if isinstance(scale, Tensor) and scale.dim() == 2 and branch in current.conditioning.branches:
            return BranchStrength(scale.index_select(0, self.number.to(scale.device))[0])
        return layer.strength(current.conditioning, branch, self.name if isinstance(scale, Mapping) else "")


class _SiteBranch:
    """One branch that is on at one site in one pass."""

    def __init__(
        self, site: SiteHook, name: str, branch: ImageBranch, one_softmax: bool, part: slice, current: Pass
    ) -> None:
        self.site, self.name, self.branch, self.one_softmax = site, name, branch, one_softmax
        self.part, self.current = part, current

    def add_to(self, output: Any, attention: Any, states: Tensor, strength: BranchStrength) -> Any:
        """Return the site's output with the branch's added. states: of the target tokens."""
        current = self.current
        conditioning = current.conditioning
        tokens = conditioning.branches[self.name]
        compute = partial(self.branch.image_keys_values, tokens, current)
        key, value = self._once_per_picture(conditioning, self.name, compute)
        regions = regions_at(conditioning, self.name, len(states), states.shape[1], value)
        groups = conditioning.groups.get(self.name)
        separate = groups is not None and groups.shape[1] > 1 and not self.one_softmax
        if separate and (self.branch.router is not None or regions is not None):
            addition = self._several_people(attention, states, key, value, regions, current)
        elif regions is not None:
            addition = self._regions(attention, states, key, value, regions, tokens)
        else:
            mask = tokens.mask if conditioning.cache is not None else usable_mask(tokens)
            addition = self._one_softmax(attention, states, key, value, mask)
        return self.branch.add(output, self.part, strength, addition)

    def _attend(
        self, attention: Any, states: Tensor, rows: slice, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        query = self._queries(attention, states, rows)
        return self.branch.attend(attention, states[rows], query, key, value, mask)

    def _queries(self, attention: Any, states: Tensor, rows: slice) -> Tensor:
        kept = self.current.computed.get(QUERIES)
        return self.branch.queries(attention, states[rows], None if kept is None else kept[rows, self.part])

    def _once_per_picture(self, conditioning: Conditioning, what: str, compute: Callable[[], Any]) -> Any:
        """Return what `compute` computes, from the cache if there is one; compiled blocks have none (`passing`)."""
        if conditioning.cache is None or self.branch.changes_per_step:
            return compute()
        return cached(conditioning, (self.site.name, what), compute)

    def _one_softmax(
        self, attention: Any, states: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Callable[[slice], Tensor]:
        def addition(rows: slice) -> Tensor:
            each = None if mask is None else mask[rows, None, None]
            return self.branch.project(attention, self._attend(attention, states, rows, key[rows], value[rows], each))

        return addition

    def _regions(
        self, attention: Any, states: Tensor, key: Tensor, value: Tensor, regions: Tensor, tokens: Tokens
    ) -> Callable[[slice], Tensor]:
        """Attend to each reference separately, within its region."""
        count = regions.shape[1]
        masks = [None] * count if tokens.mask is None else usable_mask(tokens).chunk(count, -1)  # type: ignore[union-attr]

        def addition(rows: slice) -> Tensor:
            mixed = None
            for number, each in enumerate(zip(key.chunk(count, 2), value.chunk(count, 2), masks, strict=True)):
                mask = None if each[2] is None else each[2][rows, None, None]
                out = self._attend(attention, states, rows, each[0][rows], each[1][rows], mask)
                out = out * regions[rows, number, :, None]
                mixed = out if mixed is None else mixed + out
            return self.branch.project(attention, cast(Tensor, mixed))

        return addition

    def _several_people(
        self, attention: Any, states: Tensor, key: Tensor, value: Tensor, regions: Tensor | None, current: Pass
    ) -> Callable[[slice], Tensor]:
        """Attend to each person separately, and mix their outputs per position by the router, the regions, or both."""
        conditioning, router = current.conditioning, self.branch.router
        present, count = conditioning.groups[self.name], conditioning.groups[self.name].shape[1]
        mask = mask_of_people(conditioning, self.name)
        keys = None
        if router is not None:
            compute = partial(router.keys, conditioning.branches[self.name], count)
            keys = self._once_per_picture(conditioning, f"router of {self.name}", compute)

        def addition(rows: slice) -> Tensor:
            query = self._queries(attention, states, rows)
            chosen, here = None, None if regions is None else regions[rows]
            if router is not None:
                chosen = log_shares(
                    router(query.transpose(1, 2).flatten(2), cast(Tensor, keys)[rows]), present[rows], here
                )
                if conditioning.record is not None:
                    conditioning.record.setdefault(f"router {self.site.name}", []).append(chosen)
            shares = shares_of(chosen, present[rows], here).to(query.dtype)
            mixed: Tensor | None = None
            for person, (one, other) in enumerate(zip(key.chunk(count, 2), value.chunk(count, 2), strict=True)):
                each = None if mask is None else mask.chunk(count, 1)[person][rows, None, None]
                out = self.branch.attend(attention, states[rows], query, one[rows], other[rows], each)
                out = out * shares[:, person, :, None]
                mixed = out if mixed is None else mixed + out
            return self.branch.project(attention, cast(Tensor, mixed))

        return addition


def add_to_first(output: Any, part: slice, strength: BranchStrength, addition: Callable[[slice], Tensor]) -> Any:
    """Add to the image part of a site's output, which is the output itself or the first of a tuple.

    Only the rows whose strength is not 0 are computed, and the others stay bit-identical. Without gradients, the output
    is changed in place: it is a new tensor of the attention.
    """
    several = isinstance(output, (tuple, list))
    whole: Tensor = output[0] if several else output
    rows = slice(None) if strength.rows is None else strength.rows
    added = scaled(addition(rows), strength.scale if strength.rows is None else strength.active_scale).to(whole.dtype)
    if torch.is_grad_enabled():
        whole = whole.clone()  # the caller's tensor may be needed in its backward pass
    whole[rows, part] += added
    return (whole, *output[1:]) if several else whole
