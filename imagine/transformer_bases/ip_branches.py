"""Branches of published IP-Adapters for transformers, computed as their authors and diffusers compute them.

    XLabs (FLUX.1)       double blocks only. The transformer's own queries, before rotation, attend to the tokens. The
                         result is added after the block's feed-forward network, without a gate or an output projection.
    InstantX (SD 3.5)    the transformer's own queries, normalised anew, attend to its image keys and to the tokens
                         together, in a second softmax. The result passes the transformer's output projection. Tokens
                         are resampled, and normalised, for each noise level.

Their formulas are those of `FluxIPAdapterAttnProcessor` and `SD3IPAdapterJointAttnProcessor2_0` in diffusers. A fresh
adapter has our own branch (`branch`), which works for all families.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from diffusers.models.normalization import AdaLayerNorm, RMSNorm
from torch import Tensor, nn

from imagine.adapter.attention import Branch, BranchStrength, KeysValues
from imagine.errors import WeightsError
from imagine.records import Tokens
from imagine.transformer_bases.branch import QUERIES, add_to_first
from imagine.transformer_bases.passing import Pass, current_pass

Layout = Literal["own", "xlabs", "instantx"]
OWN: Layout = "own"
XLABS: Layout = "xlabs"
INSTANTX: Layout = "instantx"


class XLabsBranch(Branch):
    """One double block's keys and values, with biases, in the layout of XLabs."""

    changes_per_step = False

    def __init__(self, token_width: int, heads: int, head_width: int) -> None:
        super().__init__(token_width, heads * head_width, zero_init=False)
        self.heads = heads
        self.to_k = nn.Linear(token_width, heads * head_width)
        self.to_v = nn.Linear(token_width, heads * head_width)

    def image_keys_values(self, tokens: Tokens, _: Pass) -> KeysValues:
        """Return keys and values, each (batch, heads, length, head width), of a branch's tokens."""
        values = tokens.values.to(self.to_k.weight.dtype)
        return _heads(self.to_k(values), self.heads), _heads(self.gated(self.to_v(values)), self.heads)

    def queries(self, attention: Any, states: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the transformer's own queries of image tokens, before their rotation.

        kept: what `keep_queries` has kept of them, (batch, positions, heads, head width); None in compiled blocks.
        """
        if kept is not None:
            return kept.transpose(1, 2)
        fused = getattr(attention, "fused_projections", False)
        query = attention.to_qkv(states).chunk(3, dim=-1)[0] if fused else attention.to_q(states)
        return cast(Tensor, attention.norm_q(query.unflatten(-1, (self.heads, -1))).transpose(1, 2))

    def attend(
        self, attention: Any, states: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Return the output (batch, positions, inner width) of one softmax over all tokens."""
        return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)

    def project(self, _: Any, mixed: Tensor) -> Tensor:
        """Return the output unchanged."""
        return mixed

    def add(self, output: Any, part: slice, strength: BranchStrength, addition: Callable[[slice], Tensor]) -> Any:
        """Return the site's output with the addition as a third item, which the block adds at its end."""
        image, text, *more = output
        third = more[0] if more else torch.zeros_like(image)
        return image, text, add_to_first(third, part, strength, addition)


class InstantXBranch(Branch):
    """One block's norms, keys and values in the layout of InstantX.

    width: of the image tokens and of the resampled tokens. time_width: of the resampler's embedding of the timestep.
    """

    changes_per_step = True

    def __init__(self, width: int, heads: int, head_width: int, time_width: int) -> None:
        super().__init__(width, heads * head_width, zero_init=False)
        self.heads = heads
        self.norm_ip = AdaLayerNorm(time_width, output_dim=2 * width, norm_eps=1e-6, chunk_dim=1)
        self.norm_q, self.norm_k, self.norm_ip_k = (RMSNorm(head_width, 1e-6) for _ in range(3))
        self._resampler: tuple[nn.Module, ...] = ()  # in a tuple, because it is a part of the adapter and not of this

    def use(self, resampler: nn.Module) -> None:
        """Set the resampler, which all blocks share."""
        self._resampler = (resampler,)

    def image_keys_values(self, tokens: Tokens, current: Pass) -> KeysValues:
        """Return keys and values, each (batch, heads, length, head width), of the encoder's features."""
        resampled, time = current.once("resampled tokens", lambda: self._resample(tokens.values, current.timestep))
        states = self.norm_ip(resampled, temb=time)
        key = self.norm_ip_k(_heads(self.to_k(states), self.heads))
        return key, _heads(self.gated(self.to_v(states)), self.heads)

    def _resample(self, features: Tensor, timestep: Tensor | None) -> tuple[Tensor, Tensor]:
        assert timestep is not None
        rows = timestep.expand(len(features))
        return cast("tuple[Tensor, Tensor]", self._resampler[0](features.to(self.to_k.weight.dtype), rows))

    def queries(self, attention: Any, states: Tensor, _: Tensor | None = None) -> Tensor:
        """Return the transformer's own queries of image tokens, normalised anew."""
        return cast(Tensor, self.norm_q(_heads(attention.to_q(states), self.heads)))

    def attend(
        self, attention: Any, states: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Return the output (batch, positions, inner width) of one softmax over image keys and tokens.

        The mask is of the features before they are resampled. A row has all of them or, at strength 0, none.
        """
        image_key = self.norm_k(_heads(attention.to_k(states), self.heads))
        image_value = _heads(attention.to_v(states), self.heads)
        keys, values = torch.cat((image_key, key), 2), torch.cat((image_value, value), 2)
        return F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(2)

    def project(self, attention: Any, mixed: Tensor) -> Tensor:
        """Return the output after the transformer's own output projection, without its bias, which it has added."""
        linear = attention.to_out[0]
        out = linear(mixed)
        return cast(Tensor, out if linear.bias is None else out - linear.bias)

    def add(self, output: Any, part: slice, strength: BranchStrength, addition: Callable[[slice], Tensor]) -> Any:
        """Return the site's output with the addition in its image tokens."""
        return add_to_first(output, part, strength, addition)


def keep_queries(_: nn.Module, __: Any, output: Tensor) -> None:
    """Forward hook of a double block's norm of queries: keep its output in the pass, instead of computing it again."""
    current = current_pass()
    if current is not None and not torch.compiler.is_compiling():
        current.computed[QUERIES] = output


def make_resampler(sizes: Mapping[str, int]) -> nn.Module:
    """Return diffusers' resampler of InstantX files. Raises WeightsError if sizes are missing."""
    needed = ("embed_dim", "output_dim", "hidden_dim", "heads", "num_queries", "timestep_in_dim")
    if missing := [name for name in needed if name not in sizes]:
        raise WeightsError(f"The adapter does not say the {missing[0]} of its resampler: save it again.")
    return cast(nn.Module, IPAdapterTimeImageProjection(**sizes))


def _heads(states: Tensor, heads: int) -> Tensor:
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)
