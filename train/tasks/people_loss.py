"""An auxiliary loss that trains the routers of several people against masks, and the measure of how well they agree.

Both read what the layers recorded (`Conditioning.record`) and the masks of the same batch, and compare them at each
layer's own resolution. Rows with one person or none are left out, because there a router has no choice.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Recorded = Mapping[str, Sequence[Tensor]]  # log-probabilities (batch, people + 1, positions) per layer, nobody's last
_LEAST_KNOWN = 1e-6  # share of a position below which it does not count


def router_loss(recorded: Recorded, masks: Tensor, known: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy between the masks and the recorded probabilities, a scalar.

    masks: (batch, people, height, width) in 0..1, on a canvas of the shape of the layers'. They are averaged over the
    area of each position. What no mask covers is nobody's; where masks overlap, a position is shared in proportion. An
    absent person has an empty mask. Every layer has the same weight. The loss is 0 if no row has several people.
    known: (batch, height, width) in 0..1, where it is known who is shown, as inside the box of a face. The other
    positions do not count. None: everywhere.
    """
    losses = []
    for log_probabilities in _calls(recorded):
        wanted, weights = _shares(masks, log_probabilities, known)
        rows = _rows_with_a_choice(log_probabilities)
        possible = log_probabilities.masked_fill(log_probabilities == -torch.inf, 0.0)  # 0 * -inf would be NaN
        each = -(wanted * possible).sum(1)
        each = each.mean(1) if weights is None else (each * weights).sum(1) / weights.sum(1).clamp(min=_LEAST_KNOWN)
        losses.append((each * rows).sum() / rows.sum().clamp(min=1))
    return torch.stack(losses).mean() if losses else masks.new_zeros((), dtype=torch.float32)


@torch.no_grad()
def router_iou(recorded: Recorded, masks: Tensor, known: Tensor | None = None) -> float:
    """Return the mean intersection over union of the recorded choices and the masks, over people and layers.

    A position belongs to whoever is most probable there, or covers most of it; nobody's positions count as one person's
    misses only. People who cover no position of a layer are left out. NaN if nobody is left. Positions of which less
    than half is `known` (as in `router_loss`) do not count.
    """
    found = []
    for log_probabilities in _calls(recorded):
        people = log_probabilities.shape[1] - 1
        chosen = F.one_hot(log_probabilities.argmax(1), people + 1).bool()[..., :people]
        shares, weights = _shares(masks, log_probabilities, known)
        wanted = F.one_hot(shares.argmax(1), people + 1).bool()[..., :people]
        if weights is not None:
            chosen, wanted = (each & (weights >= 0.5)[..., None] for each in (chosen, wanted))
        shared, either = (chosen & wanted).sum(1), (chosen | wanted).sum(1)  # (batch, people)
        counted = wanted.any(1) & _rows_with_a_choice(log_probabilities)[:, None]
        found.append((shared / either.clamp(min=1))[counted])
    return float(torch.cat(found).mean()) if found else math.nan


def _calls(recorded: Recorded) -> list[Tensor]:
    return [each for calls in recorded.values() for each in calls]


def _rows_with_a_choice(log_probabilities: Tensor) -> Tensor:
    """Return which rows (batch,) have several people: those where two people and nobody can be chosen."""
    possible = (log_probabilities > -torch.inf).any(2)
    return possible[:, -1] & (possible[:, :-1].sum(1) > 1)


def _shares(masks: Tensor, log_probabilities: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return what each person and, last, nobody covers of a layer's positions, (batch, people + 1, positions).

    Also return how much of each position is known, (batch, positions), or None for all of it. Raises ValueError if
    masks and record do not fit together.
    """
    batch, classes, positions = log_probabilities.shape
    if masks.shape[:2] != (batch, classes - 1):
        raise ValueError(f"masks {list(masks.shape)} do not fit the record {list(log_probabilities.shape)}")
    size = _size_of(positions, *masks.shape[2:])
    device = log_probabilities.device
    people = F.adaptive_avg_pool2d(masks.float(), size).flatten(2).to(device)
    covered = people.sum(1, keepdim=True)
    if known is None:
        return torch.cat((people / covered.clamp(min=1), 1 - covered.clamp(max=1)), 1), None
    weights = F.adaptive_avg_pool2d(known[:, None].float(), size).flatten(2).to(device)
    whole = torch.maximum(covered, weights).clamp(min=_LEAST_KNOWN)
    return torch.cat((people / whole, 1 - covered / whole), 1), weights[:, 0]


def _size_of(positions: int, height: int, width: int) -> tuple[int, int]:
    """Return the height and width of a layer with so many positions on a canvas of this shape."""
    rows = round(math.sqrt(positions * height / width))
    if not rows or positions % rows or not math.isclose(rows / (positions // rows), height / width, rel_tol=0.15):
        raise ValueError(f"a layer with {positions} positions does not fit masks of {height} x {width}")
    return rows, positions // rows
