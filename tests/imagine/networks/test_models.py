"""The built networks: shapes, budgets, and that they are stock diffusers models that store their own sizes."""

import pytest
import torch
from diffusers import AutoencoderDC, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from imagine.networks.models import build_autoencoder, build_denoiser


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def test_autoencoder_maps_portraits_to_8x8_latents_within_its_budget():
    model = build_autoencoder().eval()
    with FlopCounterMode(display=False) as encoding:
        latent = model.encode(torch.zeros(2, 3, 128, 128)).latent
    with FlopCounterMode(display=False) as decoding:
        picture = model.decode(latent).sample
    assert latent.shape == (2, 32, 8, 8) and picture.shape == (2, 3, 128, 128)
    assert encoding.get_total_flops() / 2 < 0.65e9 and decoding.get_total_flops() / 2 < 0.95e9
    assert not any("attn" in name for name, _ in model.named_modules())


@torch.no_grad()
def test_autoencoder_takes_other_widths_and_depths():
    model = build_autoencoder(latent_channels=4, widths=(8, 16), encoder_layers=(1, 2), decoder_layers=(2, 1))
    latent = model.encode(torch.zeros(1, 3, 16, 24)).latent
    assert latent.shape == (1, 4, 4, 6) and model.decode(latent).sample.shape == (1, 3, 16, 24)


@torch.no_grad()
def test_denoiser_predicts_the_latent_shape_within_its_budget():
    model = build_denoiser().eval()
    with FlopCounterMode(display=False) as counter:
        velocity = model(torch.zeros(1, 32, 8, 8), torch.zeros(1), torch.zeros(1, 9, 192)).sample
    assert velocity.shape == (1, 32, 8, 8)
    assert parameters(model) < 12e6 and counter.get_total_flops() < 0.7e9


@torch.no_grad()
def test_a_denoiser_can_take_the_whole_prompt_as_one_vector():
    model = build_denoiser(widths=(32, 64), latent_channels=4, text_width=24, pooled_width=10).eval()
    inputs = torch.randn(1, 4, 8, 8), torch.full((1,), 500.0), torch.randn(1, 5, 24)
    one, other = (model(*inputs, class_labels=torch.randn(1, 10)).sample for _ in range(2))
    assert one.shape == (1, 4, 8, 8) and not torch.equal(one, other)
    with pytest.raises(ValueError, match="class_labels"):
        model(*inputs)


def test_every_attention_head_has_the_given_width():
    model = build_denoiser(widths=(64, 96), head_width=32, text_width=24)
    layers = {name: module for name, module in model.named_modules() if name.endswith(("attn1", "attn2"))}
    assert {module.inner_dim // module.heads for module in layers.values()} == {32}
    assert {name.split(".")[0] for name in layers} == {"down_blocks", "mid_block", "up_blocks"}


def test_saved_networks_are_stock_and_rebuild_themselves(tmp_path):
    torch.manual_seed(0)
    denoiser = build_denoiser(widths=(32, 64), latent_channels=4, text_width=24).eval()
    autoencoder = build_autoencoder(latent_channels=4, widths=(8, 16), encoder_layers=(1, 1), decoder_layers=(1, 1))
    denoiser.save_pretrained(tmp_path / "unet")
    autoencoder.save_pretrained(tmp_path / "vae")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    inputs = torch.randn(1, 4, 8, 8), torch.full((1,), 500.0), torch.randn(1, 5, 24)
    assert torch.equal(again(*inputs).sample, denoiser(*inputs).sample)
    loaded = AutoencoderDC.from_pretrained(tmp_path / "vae")
    picture = torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded.encode(picture).latent, autoencoder.encode(picture).latent)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"widths": (8, 16), "encoder_layers": (1,), "decoder_layers": (1, 1)}, "same length"),
        ({"widths": (8, 16), "encoder_layers": (1, 0), "decoder_layers": (1, 1)}, "at least one layer"),
        ({"widths": (8, 24), "encoder_layers": (1, 1), "decoder_layers": (1, 1)}, "must divide"),
    ],
)
def test_impossible_autoencoder_sizes_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        build_autoencoder(latent_channels=8, **arguments)


def test_impossible_head_width_is_refused():
    with pytest.raises(ValueError, match="multiple of head_width 32"):
        build_denoiser(widths=(64, 80))
