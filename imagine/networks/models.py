"""Build the two stock diffusers networks at this project's sizes, randomly initialised, from plain numbers.

The trainer passes numbers rather than configuration objects, and the built networks store their sizes in their own
config.json. The defaults are those of the portrait world, chosen for two CPU cores: nearly all arithmetic is done on
8x8 latents, because the time of a training step is proportional to parameters times positions.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, UNet2DConditionModel
from diffusers.models.autoencoders.autoencoder_dc import ResBlock
from torch import nn

from imagine.errors import WeightsError


def build_autoencoder(
    latent_channels: int = 32,
    widths: Sequence[int] = (16, 64, 128, 256),
    encoder_layers: Sequence[int] | None = None,
    decoder_layers: Sequence[int] | None = None,
) -> AutoencoderDC:
    """Build the deep-compression autoencoder (arXiv 2410.10733) without attention.

    `widths` are the channels at 1/2, 1/4, ... of the picture's side, with one layer each by default. The latent has the
    resolution of the last one, so the default maps (B, 3, 128, 128) to (B, 32, 8, 8). There are no layers at full
    resolution: one convolution with pixel (un)shuffle maps it directly to half resolution, which keeps the encoder near
    0.6 and the decoder near 0.9 GFLOP at 128 px.
    Raises ValueError if the lists differ in length, if a resolution has no layer, or if widths cannot be halved and
    doubled by averaging and repeating channels.
    """
    encoder_layers = [1] * len(widths) if encoder_layers is None else encoder_layers
    decoder_layers = [1] * len(widths) if decoder_layers is None else decoder_layers
    if not len(widths) == len(encoder_layers) == len(decoder_layers):
        raise ValueError(f"widths {widths}, encoder_layers and decoder_layers need the same length")
    if min(*encoder_layers, *decoder_layers) < 1:
        raise ValueError("every resolution needs at least one layer, or it would have no down- and upsampling; add one")
    if any(4 * shallow % deep for shallow, deep in pairwise(widths)) or widths[-1] % latent_channels:
        raise ValueError(f"each of widths {widths} must divide four times the one before, and latent_channels the last")
    # diffusers ignores the first width if there are no layers at full resolution.
    channels, blocks = (widths[0], *widths), len(widths) + 1
    autoencoder = AutoencoderDC(
        latent_channels=latent_channels,
        attention_head_dim=32,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(0, *encoder_layers),
        decoder_layers_per_block=(0, *decoder_layers),
        encoder_qkv_multiscales=((),) * blocks,
        decoder_qkv_multiscales=((),) * blocks,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        scaling_factor=1.0,  # latents are normalised per channel by the pipeline's latents_mean and latents_std
    )
    # Each block normalises its residual. With a gain of 1 a new network outputs mostly noise. With 0 it consists of its
    # shortcuts, which already pass the picture through, and it learns twice as fast (docs/experiments.md).
    for module in autoencoder.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.norm.weight)
    return autoencoder


def build_denoiser(
    sample_size: int = 8,
    latent_channels: int = 32,
    widths: Sequence[int] = (128, 192),
    layers: int = 1,
    text_width: int = 192,
    head_width: int = 32,
    pooled_width: int | None = None,
    middle_attention: bool = True,
) -> UNet2DConditionModel:
    """Build a U-Net with self- and cross-attention at every resolution and, unless disabled, in the middle.

    It maps latents (B, latent_channels, S, S), timesteps (B,) and CLIP text tokens (B, L, text_width) to a velocity of
    the latents' shape. `head_width` is the width of one attention head at every resolution. With `pooled_width` the
    prompt is also given as one vector (B, pooled_width), in class_labels, that scales and shifts every residual block
    together with the time, as the pooled text of SDXL and of SD3 does (arXiv 2403.03206, section 4). The network then
    follows the prompt as a whole long before its attention has learnt to use single words.
    The default has 11.2 million parameters and 0.6 GFLOP per call; widths (128, 256) have 17.0 million and 0.8.
    Without `middle_attention` the middle is one residual block, 1.7 million parameters less at the default widths.
    Raises ValueError if a width is not a multiple of `head_width`.
    """
    if any(width % head_width for width in widths):
        raise ValueError(f"each of widths {tuple(widths)} must be a multiple of head_width {head_width}")
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(widths),
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
        mid_block_type="UNetMidBlock2DCrossAttn" if middle_attention else "UNetMidBlock2D",
        layers_per_block=layers,
        cross_attention_dim=text_width,
        # Despite its name, this argument is the NUMBER of heads: https://github.com/huggingface/diffusers/issues/2011
        attention_head_dim=tuple(width // head_width for width in widths),
        use_linear_projection=True,
        resnet_time_scale_shift="default" if pooled_width is None else "scale_shift",
        class_embed_type=None if pooled_width is None else "projection",
        projection_class_embeddings_input_dim=pooled_width,
    )


def empty_denoiser(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Return the denoiser of a configuration on the meta device, without weights; its layers suffice for an adapter."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config({**config})


def read_empty_denoiser(folder: Path) -> UNet2DConditionModel:
    """Return the `empty_denoiser` of a folder's config.json. Raises WeightsError if there is none."""
    file = folder / "config.json"
    try:
        return empty_denoiser(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read as JSON; copy or download the weights again.") from error
