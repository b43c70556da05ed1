"""Sample with Euler's method along the learned velocity, for sample grids during training.

The guided prediction is the pipeline's (`imagine.pipeline.sampling`); a grid needs no scheduler object.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from imagine.networks.diffusion import timesteps
from imagine.pipeline.sampling import Guidance, GuidedDenoiser, Inputs


@torch.no_grad()
def sample(unet: nn.Module, noise: Tensor, inputs: Inputs, guidance: Guidance, steps: int) -> Tensor:
    """Return latents (B, C, h, w) sampled from noise of that shape, with identity at full strength."""
    denoiser = GuidedDenoiser(unet, inputs, {})
    strength = torch.ones(len(noise), device=noise.device)
    latents = noise
    for now, then in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        t = timesteps(torch.tensor(now, device=noise.device))
        latents = latents + (then - now) * denoiser.velocity(latents, t, strength, guidance)
    return latents
