"""The noise convention: the straight line, the velocity, and agreement with the scheduler used for sampling."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from imagine.networks import diffusion


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def clean() -> torch.Tensor:
    return torch.randn(3, 4, 2, 2, generator=generator(1), dtype=torch.float64)


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(3, 4, 2, 2, generator=generator(2), dtype=torch.float64)


def test_ends_of_the_line(clean, noise):
    assert torch.equal(diffusion.add_noise(clean, noise, torch.zeros(3)), clean)
    assert torch.equal(diffusion.add_noise(clean, noise, torch.ones(3)), noise)


def test_velocity_is_the_derivative_of_the_line(clean, noise):
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    step = 1e-3
    slope = (diffusion.add_noise(clean, noise, t + step) - diffusion.add_noise(clean, noise, t)) / step
    torch.testing.assert_close(slope, diffusion.velocity(clean, noise), rtol=1e-9, atol=1e-9)


def test_velocity_gives_back_both_ends_with_a_time_per_item(clean, noise):
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    noisy, v = diffusion.add_noise(clean, noise, t), diffusion.velocity(clean, noise)
    torch.testing.assert_close(diffusion.clean_from_velocity(noisy, v, t), clean)
    torch.testing.assert_close(diffusion.noise_from_velocity(noisy, v, t), noise)


def test_scheduler_walks_our_line_down_to_the_clean_latent(clean, noise):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=diffusion.TRAIN_TIMESTEPS)
    scheduler.set_timesteps(7)
    sample = noise.float()
    for timestep in scheduler.timesteps:
        t = (timestep / diffusion.TRAIN_TIMESTEPS).expand(3)
        torch.testing.assert_close(sample, diffusion.add_noise(clean, noise, t).float(), rtol=1e-5, atol=1e-5)
        assert torch.allclose(diffusion.timesteps(t), timestep.expand(3))
        sample = scheduler.step(diffusion.velocity(clean, noise).float(), timestep, sample).prev_sample
    torch.testing.assert_close(sample, clean.float(), rtol=1e-5, atol=1e-5)


def test_times_follow_the_generator_and_the_density():
    first, again = (diffusion.sample_times(20_000, generator(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.min() >= 0 and first.max() <= 1
    middle = ((first > 0.25) & (first < 0.75)).float().mean()
    assert abs(middle - 0.728) < 0.02  # P(|N(0, 1)| < logit(0.75))
    uniform = diffusion.sample_times(20_000, generator(3), "uniform")
    assert abs(((uniform > 0.25) & (uniform < 0.75)).float().mean() - 0.5) < 0.02


def test_shift_moves_times_towards_noise_and_keeps_the_ends():
    plain = diffusion.sample_times(1000, generator(4), "uniform")
    shifted = diffusion.sample_times(1000, generator(4), "uniform", shift=3.0)
    assert (shifted >= plain).all() and shifted.max() <= 1
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


def test_unknown_density_is_refused():
    with pytest.raises(ValueError, match="'logit_normal' or 'uniform'"):
        diffusion.sample_times(1, generator(), "cosine")  # type: ignore[arg-type]


def test_loss_is_one_float32_number_per_item(clean, noise):
    loss = diffusion.loss_per_item(clean.half(), noise.half())
    assert loss.shape == (3,) and loss.dtype == torch.float32
    expected = torch.nn.functional.mse_loss(clean[1].half().float(), noise[1].half().float())
    assert loss[1].item() == pytest.approx(expected.item())


def test_guidance_is_the_stated_formula(clean, noise):
    full = clean * noise
    guided = diffusion.guide(clean, noise, full, 3.0, 1.5)
    torch.testing.assert_close(guided, clean + 3.0 * (noise - clean) + 1.5 * (full - noise))
    torch.testing.assert_close(diffusion.guide(clean, noise, full, 1.0, 1.0), full)
    torch.testing.assert_close(diffusion.guide(clean, noise, full, 0.0, 0.0), clean)


def test_full_rescale_restores_the_spread_of_each_item(clean, noise):
    full = clean * noise
    guided = diffusion.guide(clean, noise, full, 5.0, 3.0, rescale=1.0)
    torch.testing.assert_close(guided.flatten(1).std(dim=1), full.flatten(1).std(dim=1))


def test_rescale_of_a_constant_prediction_stays_finite():
    flat = torch.zeros(1, 4, 2, 2)
    assert torch.isfinite(diffusion.guide(flat, flat, flat, 5.0, 3.0, rescale=0.7)).all()


def test_latent_normalisation_is_per_channel_and_undone(clean):
    mean, std = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([2.0, 0.5, 1.0, 4.0])
    normal = diffusion.normalise_latents(clean, mean, std)
    torch.testing.assert_close(normal[:, 3], (clean[:, 3] - 3.0) / 4.0)
    torch.testing.assert_close(diffusion.denormalise_latents(normal, mean, std), clean)


def test_min_snr_weighs_errors_of_the_clean_latent_by_the_clipped_signal_to_noise_ratio():
    t = torch.tensor([0.05, 0.3, 0.5, 0.9])
    clean, noise = torch.randn(4, 3), torch.randn(4, 3)
    guess = diffusion.velocity(clean, noise) + 0.1 * torch.randn(4, 3)
    of_velocity = (guess - diffusion.velocity(clean, noise)).square().mean(1)
    seen = diffusion.add_noise(clean, noise, t) - t[:, None] * guess  # the clean latent that the guess implies
    of_clean = (seen - clean).square().mean(1)
    snr = ((1 - t) / t) ** 2
    assert torch.allclose(diffusion.min_snr_weight(t, 5.0) * of_velocity, snr.clamp(max=5.0) * of_clean, atol=1e-6)
