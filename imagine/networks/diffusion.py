"""Rectified flow: the noise convention that training and sampling share.

Time t runs from 0 (a clean latent) to 1 (pure noise) along a straight line, and the denoiser predicts the velocity of
that line (Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206):

    x_t = (1 - t) * x_0 + t * noise          velocity = d x_t / d t = noise - x_0

These are the conventions of diffusers' FlowMatchEulerDiscreteScheduler, whose timesteps are t * 1000.
The module contains only functions of tensors and does not depend on models or data.
"""

from typing import Literal

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000  # the denoiser gets t * TRAIN_TIMESTEPS, as from the scheduler

TimeDensity = Literal["logit_normal", "uniform"]


def per_item(vector: Tensor, like: Tensor) -> Tensor:
    """Reshape one number per batch item, (batch,) to (batch, 1, 1, ...), so that it broadcasts over `like`."""
    return vector.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)


def add_noise(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t for clean latents and noise (batch, ...) and times t (batch,) in [0, 1]."""
    t = per_item(t, clean)
    return (1 - t) * clean + t * noise


def velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity, the denoiser's training target."""
    return noise - clean


def clean_from_velocity(noisy: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
    """Return the clean latent x_0 = x_t - t * v that a prediction at times t (batch,) implies."""
    return noisy - per_item(t, noisy) * predicted


def noise_from_velocity(noisy: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
    """Return the noise x_1 = x_t + (1 - t) * v that a prediction at times t (batch,) implies."""
    return noisy + (1 - per_item(t, noisy)) * predicted


def timesteps(t: Tensor) -> Tensor:
    """Return the denoiser's timestep argument for times t in [0, 1]."""
    return t * TRAIN_TIMESTEPS


def sample_times(
    count: int,
    generator: torch.Generator,
    density: TimeDensity = "logit_normal",
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
) -> Tensor:
    """Draw `count` training times in [0, 1] as float32 on the generator's device.

    "logit_normal" is sigmoid(N(mean, std)) (arXiv 2403.03206, equation 19): times in the middle, where the prediction
    is hardest, are the most frequent. A `shift` above 1 moves times towards noise, as larger pictures need (same paper,
    equation 23).
    """
    if density == "uniform":
        t = torch.rand(count, generator=generator, device=generator.device)
    elif density == "logit_normal":
        t = logit_normal(torch.randn(count, generator=generator, device=generator.device), mean, std)
    else:
        raise ValueError(f"unknown density of times {density!r}; choose 'logit_normal' or 'uniform'")
    return shift * t / (1 + (shift - 1) * t)


def logit_normal(normal: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Return logit-normal times in [0, 1] for standard normal numbers (arXiv 2403.03206, equation 19)."""
    return torch.sigmoid(mean + std * normal)


def min_snr_weight(t: Tensor, gamma: float) -> Tensor:
    """Return min-SNR-gamma weights (arXiv 2303.09556) for errors of the velocity at times t, in t's shape.

    The paper weights errors of x_0 by min(SNR, gamma). On this line SNR = ((1 - t) / t)^2, and an error of x_0 is t
    times the error of the velocity, hence the weight t^2 * min(SNR, gamma) = min((1 - t)^2, gamma * t^2).
    """
    return torch.minimum((1 - t) ** 2, gamma * t**2)


def loss_per_item(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each batch item, (batch,), in float32; the caller weights and reduces it."""
    return (predicted.float() - target.float()).square().flatten(1).mean(dim=1)


def guide(
    unconditional: Tensor,
    text: Tensor,
    full: Tensor,
    text_scale: float,
    identity_scale: float,
    rescale: float = 0.0,
    balanced: Tensor | None = None,
) -> Tensor:
    """Combine three predictions (batch, ...) by classifier-free guidance on the prompt and on the person.

        v = v_unconditional + text_scale * (v_text - v_unconditional) + identity_scale * (v_full - v_text)

    `text` is conditioned on the prompt, `full` on the prompt and the reference. Scales of 1 and 1 give `full`; an
    identity_scale of 0 gives plain guidance on the prompt (the two-condition form of InstructPix2Pix, arXiv 2211.09800,
    equation 3). `rescale` in [0, 1] moves each result's standard deviation towards that of `full` (arXiv 2305.08891,
    equations 15 and 16). For batch items marked in `balanced` (batch,) the two differences are first scaled to one norm
    (see `balance`).
    """
    towards_text, towards_person = text - unconditional, full - text
    if balanced is not None:
        towards_text, towards_person = balance(towards_text, towards_person, balanced)
    guided = unconditional + text_scale * towards_text + identity_scale * towards_person
    if rescale == 0:
        return guided
    wanted = full.flatten(1).std(dim=1)
    actual = guided.flatten(1).std(dim=1).clamp_min(torch.finfo(guided.dtype).tiny)
    return torch.lerp(guided, guided * per_item(wanted / actual, guided), rescale)


def balance(text: Tensor, identity: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Scale two guidance vectors (batch, ...) to the smaller of their norms, for the items marked in `where` (batch,).

        g_text * m / |g_text|,   g_identity * m / |g_identity|   with m = min(|g_text|, |g_identity|)

    This is SynCD's inference (arXiv 2502.01720; `normalized_guidance_image` in its code). Neither the prompt nor the
    person outweighs the other, whatever the adapter's own strength, and high scales do not overexpose the picture.
    SynCD adds the person first and the prompt second; `guide` adds them in the opposite order. An item in which one of
    the two vectors is zero is not changed.
    """
    norms = [vector.float().flatten(1).norm(dim=1) for vector in (text, identity)]
    smaller = torch.minimum(*norms)
    where = where & (smaller > 0)
    factors = [torch.where(where, smaller / norm, 1.0) for norm in norms]
    return text * per_item(factors[0], text), identity * per_item(factors[1], identity)


def normalise_latents(latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Centre and scale latents (batch, channels, height, width) per channel; mean and std are (channels,)."""
    return (latents - _per_channel(mean, latents)) / _per_channel(std, latents)


def denormalise_latents(latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Undo `normalise_latents` before decoding."""
    return latents * _per_channel(std, latents) + _per_channel(mean, latents)


def pack_latents(latents: Tensor, patch: int) -> Tensor:
    """Join `patch` x `patch` positions into one: (batch, c, h, w) to (batch, c * patch**2, h / patch, w / patch).

    A denoiser then sees fewer positions with more channels, at the cost of the smaller grid (as FLUX and DiT do).
    """
    return latents if patch == 1 else torch.nn.functional.pixel_unshuffle(latents, patch)


def unpack_latents(latents: Tensor, patch: int) -> Tensor:
    """Undo `pack_latents`."""
    return latents if patch == 1 else torch.nn.functional.pixel_shuffle(latents, patch)


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(device=like.device, dtype=like.dtype).view(1, -1, 1, 1)
