"""Euler's method along the learned velocity, for sample sheets while training (the pipeline has diffusers' own)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from imagine.adapter import project
from imagine.diffusion import timesteps
from imagine.records import Conditioning, Tokens

Text = tuple[Tokens, dict[str, Tokens]]


@torch.no_grad()
def sample(
    unet: nn.Module,
    noise: Tensor,
    conditions: Sequence[tuple[Text, Tokens | None]],
    weights: Sequence[float],
    steps: int,
) -> Tensor:
    """Latents from noise (B, C, h, w); each step is the weighted sum of the predictions under each condition.

    A condition is a sentence's tokens and vision tokens or None; conditions of weight 0 are left out.
    """
    ready = []
    for (text, vision), weight in zip(conditions, weights, strict=True):
        if weight:
            branches = dict(text[1]) | ({"vision": vision} if vision is not None else {})
            ready.append((text[0], project(unet, Conditioning(branches), text[0].values), weight))
    latents = noise
    times = torch.linspace(1, 0, steps + 1).tolist()
    for now, then in pairwise(times):
        t = timesteps(torch.full((len(noise),), now, device=noise.device))
        guess = sum(
            weight
            * unet(
                latents, t, encoder_hidden_states=clip.values, encoder_attention_mask=clip.mask,
                cross_attention_kwargs={"conditioning": conditioning},
            ).sample
            for clip, conditioning, weight in ready
        )  # fmt: skip
        latents = latents + (then - now) * guess
    return latents
