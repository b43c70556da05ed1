"""A whole pipeline of the real classes at tiny random sizes: 32-pixel pictures, built in well under a second.

Its weights are random but its branches are open, so that the prompt, its quoted text and the person all affect the
picture.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from imagine.adapter.adapter import Adapter, BranchSpec
from imagine.networks.encoders import (
    VisionEncoder,
    build_byt5,
    build_byt5_tokenizer,
    build_clip_text,
    build_t5,
    train_t5_tokenizer,
    trim_clip_vocabulary,
)
from imagine.networks.models import build_autoencoder, build_denoiser
from imagine.people.faces import KnownBoxesFinder
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.records import FaceBox

SIZE = 32  # side of the pictures in pixels
CROP = 16  # side of the vision encoder's crops in pixels
TOKENS = 5  # one global token and four patches
BOX = FaceBox(16.0, 16.0, 32.0, 32.0, 1.0)  # the face box in every photo of 64 x 64 pixels
SENTENCES = (
    "a person smiling on a beach, wearing a red hat",
    'an old woman in a blue shirt with the letters "OK", looking to the left',
)
GROUP_SENTENCES = {2: "{a} smiling, {b} in a red hat", 3: "{a} smiling, {b} in a red hat, {c} in a blue shirt"}


@functools.cache
def tokenizers() -> tuple[Any, Any, Any]:
    """Return CLIP's, T5's and ByT5's tokenizers, built once per test run."""
    folder = Path(tempfile.mkdtemp(prefix="imagine-tiny-"))
    clip = trim_clip_vocabulary(SENTENCES, folder / "clip", max_tokens=16)
    return clip, train_t5_tokenizer(SENTENCES, folder / "t5", vocabulary_size=150), build_byt5_tokenizer()


def denoiser(pooled_width: int | None = None) -> Any:
    """Return a random UNet2DConditionModel on 4 x 4 latents of 4 channels."""
    return build_denoiser(
        sample_size=4, latent_channels=4, widths=(32, 32), text_width=16, head_width=16, pooled_width=pooled_width
    ).eval()


def text_adapter(unet: Any) -> Adapter:
    """Return the branches t5 and byt5 with open gates."""
    return Adapter(unet, [BranchSpec("t5", 16, zero_init=False), BranchSpec("byt5", 12, zero_init=False)])


def identity_adapter(unet: Any, fresh: bool = False) -> Adapter:
    """Return the branch vision with its projection and LoRA: random and open, or fresh as at the start of training."""
    spec = BranchSpec("vision", 16, projection="full", input_width=24)
    adapter = Adapter(unet, [spec], lora_rank=2)
    for name, parameter in adapter.named_parameters():
        if not fresh and (name.endswith("gate") or "lora_B" in name):
            torch.nn.init.normal_(parameter, std=0.3)
    return adapter


def pipeline(seed: int = 0, fresh: bool = False, with_adapter: bool = True, patch: int = 1) -> ImaginePipeline:
    """Return a random pipeline whose face finder returns BOX for every photo; `patch` (1 or 2) packs its latents."""
    torch.manual_seed(seed)
    clip, t5, byt5 = tokenizers()
    unet = denoiser(pooled_width=32)  # CLIP's 16 and T5's 16
    pipe = ImaginePipeline(
        unet=unet,
        vae=(
            build_autoencoder(4, (8, 8, 16), (1,) * 3, (1,) * 3)
            if patch == 1
            else build_autoencoder(1, (8, 8), (1, 1), (1, 1))
        ).eval(),
        text_encoder=build_clip_text(len(clip), 16, 1, 2, 16, clip.bos_token_id, clip.eos_token_id),
        tokenizer=clip,
        text_encoder_2=build_t5(len(t5), 16, 1, 2),
        tokenizer_2=t5,
        text_encoder_3=build_byt5(12, 1, 2),
        tokenizer_3=byt5,
        image_encoder=VisionEncoder(CROP, 8, 24, 2, 2, embed_width=16).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_adapter=text_adapter(unet),
        adapter=identity_adapter(unet, fresh) if with_adapter else None,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
        latents_patch=patch,
        default_steps=3,
    )
    pipe.finder = KnownBoxesFinder([BOX])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def photo(seed: int) -> Image.Image:
    """Return a photo of a stranger: 64 x 64 pixels of smooth colour, different for every seed."""
    colours = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(colours, size=64, mode="bicubic", align_corners=False)[0]
    return Image.fromarray((smooth.clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
