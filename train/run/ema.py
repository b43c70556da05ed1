"""Exponential moving average (EMA) of the trained weights, used for validation and for a stage's final weights.

The half-life is in images, not steps, so that it does not depend on the batch size. At the start it is limited to a
share of the images seen (EDM2, Karras et al. 2024, training_loop: ema_rampup_ratio), because the average would
otherwise keep too much of the random initial weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

RAMP_UP = 0.05  # the half-life is at most this share of the images seen


class Average:
    """An exponential moving average of named parameters, in float32 on their device; none with half_life 0."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], half_life: float) -> None:
        self.half_life = half_life
        self.parameters = dict(parameters) if half_life else {}
        self.values = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, images_seen: int, batch_size: int) -> None:
        """Update the average after a step of `batch_size` images that ended at `images_seen`."""
        if not self.parameters:
            return
        half_life = min(self.half_life, images_seen * RAMP_UP)
        weight = 1 - 0.5 ** (batch_size / half_life)
        torch._foreach_lerp_(list(self.values.values()), [p.float() for p in self.parameters.values()], weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged weights into the modules for the block, then restore the trained ones bit for bit."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
