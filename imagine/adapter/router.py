"""The router: decides, at each position of an attention layer, which of several people is shown there, or nobody.

With several people in a picture, a branch attends to each person with a softmax of its own:

    out = sum over people of share_p * Attn(q, k_p, v_p)

The shares (batch, people, positions) come from a softmax over the people present and "nobody", whose output is zero.
Its logits come from the layer's query and from each person's summary, which is the mean of the person's tokens. They
may be guided by a layout: regions that the caller gives. With a layout but without a router, the regions are the
shares.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagine.errors import ConfigError
from imagine.records import Tokens

MAX_PEOPLE = 4  # people that a router tells apart by their number in the sentence
ROUTER_WIDTH = 64
LAYOUT_FLOOR = 1e-4  # a region of 0 lowers a person's logit by log(LAYOUT_FLOOR) and does not exclude the person

# Scale, weights and bias are ROUTER_GAIN times their parameters, for the same reason as a branch's gate: Adam changes a
# parameter by about one learning rate per step.
ROUTER_GAIN = 8.0
_NOBODY_AT_FIRST = -6.0  # nobody's first logit, so that two people first get 0.4994 each


class Router(nn.Module):
    """The router of one branch in one attention layer.

        logit of person p = scale * <norm(W_q q), norm(W_k s_p) + order_p>
        logit of nobody = a linear function of norm(W_q q)

    `order_p` belongs to the person's number, because the sentence says "the first person" and "the second person". The
    scale starts at zero: a new router gives all people of a picture equal shares, and almost nothing to nobody.
    """

    def __init__(self, query_width: int, token_width: int, width: int = ROUTER_WIDTH) -> None:
        super().__init__()
        self.to_q = nn.Linear(query_width, width, bias=False)
        self.to_k = nn.Linear(token_width, width, bias=False)
        self.order = nn.Parameter(torch.randn(MAX_PEOPLE, width))
        self.scale = nn.Parameter(torch.zeros(1))
        self.nobody = nn.Linear(width, 1)
        nn.init.zeros_(self.nobody.weight)
        nn.init.constant_(self.nobody.bias, _NOBODY_AT_FIRST / ROUTER_GAIN)

    def keys(self, tokens: Tokens, people: int) -> Tensor:
        """Return a key per person and, last, nobody's, (batch, people + 1, width), which include the scale.

        tokens: a branch's, (batch, people * length, token width). Raises ConfigError for more than MAX_PEOPLE people.
        """
        if people > MAX_PEOPLE:
            raise ConfigError(f"A picture can show {MAX_PEOPLE} people, not {people}: leave some of them out.")
        values = tokens.values.unflatten(1, (people, -1)).to(self.to_k.weight.dtype)
        if tokens.mask is None:
            summary = values.mean(2)
        else:
            mask = tokens.mask.unflatten(1, (people, -1)).to(values.dtype)
            summary = torch.einsum("bpl,bplw->bpw", mask, values) / mask.sum(2, keepdim=True).clamp(min=1)
        keys = (_normalised(self.to_k(summary)) + self.order[:people]) * (self.scale / math.sqrt(self.order.shape[1]))
        nobody = self.nobody.weight[None].expand(len(keys), -1, -1)
        return torch.cat((keys, nobody), 1) * ROUTER_GAIN

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return the float32 logits (batch, people + 1, positions) of all people and of nobody, who is last.

        query: (batch, positions, query width). keys: what `keys` returned.
        """
        seen = _normalised(self.to_q(query.to(self.to_q.weight.dtype)))
        logits = (keys @ seen.transpose(1, 2)).float()
        bias = F.pad(self.nobody.bias.float() * ROUTER_GAIN, (keys.shape[1] - 1, 0))
        return logits + bias[:, None]


def log_shares(logits: Tensor, present: Tensor, regions: Tensor | None = None) -> Tensor:
    """Return the log-probabilities (batch, people + 1, positions) of a router's logits; -inf where there is no choice.

    present: (batch, people), whether the item has this person. An item with one person has no choice: that person's
    probability is exactly 1, and nobody's is 0. regions: (batch, people, positions) in 0..1, the caller's layout.
    """
    if regions is not None:
        guide = torch.log(regions.float().clamp(min=0) + LAYOUT_FLOOR)
        logits = torch.cat((logits[:, :-1] + guide, logits[:, -1:]), 1)
    allowed = torch.cat((present, present.sum(1, keepdim=True) != 1), 1)
    return logits.masked_fill(~allowed[:, :, None], -torch.inf).log_softmax(1)


def shares_of(log_probabilities: Tensor | None, present: Tensor, regions: Tensor | None) -> Tensor:
    """Return each person's share (batch, people, positions) of a branch's output, from a router, a layout, or both.

    Without a router, the regions are the shares, divided by their sum where it exceeds 1. An item with one person gets
    what it gets in a batch of its own: that person's region, or 1.
    """
    alone = present.float()[:, :, None] if regions is None else present[:, :, None] * regions
    if log_probabilities is not None:
        several = log_probabilities[:, :-1].exp()
    else:
        assert regions is not None
        several = alone / alone.sum(1, keepdim=True).clamp(min=1)
    if log_probabilities is not None and regions is None:
        return several  # exact for one person too
    return torch.where((present.sum(1) == 1)[:, None, None], alone, several)


def _normalised(states: Tensor) -> Tensor:
    """Return states whose last dimension has a mean square of 1, so that a dot product measures an angle."""
    return F.rms_norm(states, states.shape[-1:], eps=1e-6)
