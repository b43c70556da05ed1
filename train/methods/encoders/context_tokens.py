"""Write tokens into encoded sentences, behind the text encoder."""

from dataclasses import replace

import torch
from torch import Tensor

from imagine.records import Tokens
from train.methods.bases.text import TextState


def appended(text: TextState, tokens: Tensor, there: Tensor) -> TextState:
    """Append tokens (B, n, width) to sentences; those of rows where `there` (B,) is False are masked."""
    if not tokens.shape[1]:
        return text
    values, mask = text.clip.values, text.clip.mask
    if mask is None:
        mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    more = there[:, None].expand(-1, tokens.shape[1])
    joined = Tokens(torch.cat((values, tokens.to(values.dtype)), 1), torch.cat((mask, more), 1))
    return replace(text, clip=joined, places=None)


def overwritten(text: TextState, tokens: Tensor, there: Tensor) -> TextState:
    """Write tokens (B, n, width) over the last positions, in rows where `there` (B,) is True.

    Where the sentence's padding is masked, as in the portrait world, the tokens are appended instead.
    """
    if text.clip.mask is not None:
        return appended(text, tokens, there)
    values, count = text.clip.values, tokens.shape[1]
    tail = torch.where(there[:, None, None], tokens.to(values.dtype), values[:, -count:])
    return replace(text, clip=Tokens(torch.cat((values[:, :-count], tail), 1)))
