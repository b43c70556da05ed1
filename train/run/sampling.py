"""Sample with Euler's method along the learned velocity, for sample grids during training.

The guided prediction is the pipeline's (`imagine.pipeline.sampling`); a grid needs no scheduler object.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from imagine.networks.diffusion import timesteps
from imagine.pipeline.sampling import Guidance, GuidedDenoiser, Inputs, NoisyPictures


@torch.no_grad()
def sample(unet: nn.Module, noise: Tensor, inputs: Inputs, guidance: Guidance, steps: int) -> Tensor:
    """Return latents (B, C, h, w) sampled from noise of that shape, with identity at full strength."""
    denoiser = GuidedDenoiser(unet)
    strength = torch.ones(len(noise), device=noise.device)
    latents = noise
    for now, then in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        t = timesteps(torch.tensor(now, device=noise.device))
        velocity = denoiser.velocity(NoisyPictures(inputs, latents, t, strength, guidance))
        latents = latents + (then - now) * velocity
    return latents
