"""Decode pictures in tiles that are small enough to save memory."""

from typing import Any

TILE = 64  # side of the tiles in latents; diffusers' default would not split a picture of 1024 px


def compression(vae: Any) -> int:
    """Return the number of pixels per latent along a side of an autoencoder's pictures."""
    ratio = getattr(vae, "spatial_compression_ratio", None)
    return int(ratio or 2 ** (len(vae.config.block_out_channels) - 1))


def decode_in_tiles(vae: Any) -> None:
    """Make an autoencoder decode in tiles, and picture by picture; seams may be visible."""
    vae.enable_tiling()
    vae.enable_slicing()
    if hasattr(vae, "tile_latent_min_size"):  # AutoencoderKL: its enable_tiling takes no sizes
        vae.tile_latent_min_size, vae.tile_sample_min_size = TILE, TILE * compression(vae)
