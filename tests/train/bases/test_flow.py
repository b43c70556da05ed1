"""Training times: their distribution, and their shift, which is that of the scheduler's steps."""

import json
from pathlib import Path

import diffusers
import pytest
import torch

from imagine.errors import ConfigError
from train.bases.contract import TransformerSettings
from train.bases.flow import Times, mu_by_tokens, mu_of_flux2, read_scheduler
from train.bases.opening import open_public_base

EVEN = torch.linspace(1, 0.25, 4)


def times_of(scheduler: object, **more: object) -> Times:
    given = {"mu": mu_by_tokens, "mean": 0.0, "std": 1.0, "shift": None, **more}
    return Times(scheduler, **given)  # type: ignore[arg-type]


def test_times_move_as_the_schedulers_steps_do() -> None:
    static = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    static.set_timesteps(sigmas=EVEN.tolist())
    assert torch.allclose(times_of(static).moved(EVEN, 64, 4), static.sigmas[:-1], atol=1e-6)
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for mu in (mu_by_tokens, mu_of_flux2):
        dynamic.set_timesteps(sigmas=EVEN.tolist(), mu=mu(dynamic, 4096, 4))
        assert torch.allclose(times_of(dynamic, mu=mu).moved(EVEN, 4096, 4), dynamic.sigmas[:-1], atol=1e-6)
    sana = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2)
    assert torch.allclose(times_of(sana).moved(EVEN, 64, 4), 2 * EVEN / (1 + EVEN))


def test_times_are_logit_normal_and_larger_pictures_get_more_noise() -> None:
    normal = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    plain = times_of(None, shift=1.0)
    drawn = plain.drawn(normal, 64, 50)
    assert torch.allclose(torch.logit(drawn).mean(), torch.tensor(0.0), atol=0.05)
    assert torch.allclose(torch.logit(times_of(None, shift=1.0, mean=1.0, std=0.5).drawn(normal, 64, 50)).std(),
                          torch.tensor(0.5), atol=0.02)  # fmt: skip
    dynamic = times_of(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    small, large = (dynamic.drawn(normal, tokens, 50).mean() for tokens in (256, 4096))
    assert drawn.mean() < small < large
    assert torch.allclose(torch.logit(times_of(None, shift=3.0).drawn(normal, 64, 50)), torch.logit(drawn) +
                          torch.tensor(3.0).log(), atol=1e-3)  # fmt: skip


def test_a_base_that_cannot_be_trained_on_is_reported_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ConfigError, match="DDIMScheduler without flow matching"):
        read_scheduler(tmp_path)
    index = {"_class_name": "PixArtSigmaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="has no text encoder"):
        open_public_base(str(tmp_path))
    index["text_encoder"] = ["transformers", "T5EncoderModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="has a PixArtTransformer2DModel, which training does not know"):
        open_public_base(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    with pytest.raises(ConfigError, match="has no diffusion transformer"):
        open_public_base(str(tmp_path), TransformerSettings())
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ConfigError, match=r"scheduler_config\.json cannot be read"):
        read_scheduler(tmp_path)
