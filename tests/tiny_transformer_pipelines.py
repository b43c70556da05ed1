"""Pipelines of diffusion transformers, of diffusers' own classes at tiny random sizes, that draw a few pixels."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from imagine.networks.encoders import build_clip_text, build_t5
from imagine.networks.models import build_autoencoder
from imagine.people.faces import KnownBoxesFinder
from imagine.pipeline.pipeline import ImaginePipeline
from tests import tiny, tiny_stock, tiny_transformers
from tests.tiny_models import word_tokenizer

CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
PROMPT = "a person smiling on the beach"


def scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def shifted_scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def chat_tokenizer() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3(whole: bool, layers: int = 4) -> Any:
    """Return a Qwen3 of width 16, with or without its head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        vocab_size=len(chat_tokenizer()), hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=600, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return (Qwen3ForCausalLM if whole else Qwen3Model)(config).eval()


def autoencoder() -> Any:
    """Return an AutoencoderKL with four channels that keeps the size of a picture."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), shift_factor=0.1, scaling_factor=0.5, sample_size=8,
    ).eval()  # fmt: skip


def flux2() -> Any:
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(8,),
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=8,
    ).eval()  # fmt: skip
    return Flux2KleinPipeline(
        shifted_scheduler(), vae, qwen3(True), chat_tokenizer(),
        tiny_transformers.transformer("flux2", joint_attention_dim=48),
    )  # fmt: skip


def z_image() -> Any:
    from diffusers import ZImagePipeline

    return ZImagePipeline(
        scheduler(), autoencoder(), qwen3(False), chat_tokenizer(), tiny_transformers.transformer("z_image")
    )


def _qwen_autoencoder() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


def qwen() -> Any:
    from diffusers import QwenImagePipeline

    return QwenImagePipeline(
        shifted_scheduler(), _qwen_autoencoder(), None, None, tiny_transformers.transformer("qwen")
    )


def _flux(kind: str, **more: Any) -> Any:
    import diffusers

    clip, t5, _ = tiny.tokenizers()
    parts = {
        "scheduler": shifted_scheduler(), "vae": autoencoder(), "tokenizer": clip, "tokenizer_2": t5,
        "text_encoder": build_clip_text(len(clip), 8, 1, 2, 16, clip.bos_token_id, clip.eos_token_id),
        "text_encoder_2": build_t5(len(t5), 16, 1, 2), "transformer": tiny_transformers.transformer("flux"), **more,
    }  # fmt: skip
    return getattr(diffusers, kind)(**parts)


def sd3() -> Any:
    from diffusers import StableDiffusion3Pipeline

    model = tiny_transformers.transformer("sd3", joint_attention_dim=32, pooled_projection_dim=32)
    return StableDiffusion3Pipeline(model, scheduler(), autoencoder(), *[None] * 6)


def sana() -> Any:
    from diffusers import SanaPipeline

    vae = build_autoencoder(4, (8, 8, 16), (1,) * 3, (1,) * 3).eval()
    return SanaPipeline(None, None, vae, tiny_transformers.transformer("sana"), scheduler())


def _embeds(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def words(name: str, count: int, seed: int = 0) -> dict[str, Any]:
    """Return prompts, or encoded prompts for the pipelines whose text encoders are too much for a test."""
    if name in ("flux2", "z_image", "flux", "kontext"):
        given = [PROMPT, "a man laughing in forest", "a woman with red hair"][:count]
        return {"prompt": given, **({"text_encoder_out_layers": (1, 2, 3)} if name == "flux2" else {})}
    if name == "qwen":
        mask = torch.ones(count, 5, dtype=torch.long)
        return {
            "prompt_embeds": _embeds(count, 5, 16, seed=seed), "prompt_embeds_mask": mask,
            "negative_prompt_embeds": _embeds(count, 5, 16, seed=seed + 1), "negative_prompt_embeds_mask": mask,
        }  # fmt: skip
    if name == "sd3":
        return {
            "prompt_embeds": _embeds(count, 5, 32, seed=seed),
            "pooled_prompt_embeds": _embeds(count, 32, seed=seed + 2),
            "negative_prompt_embeds": _embeds(count, 5, 32, seed=seed + 1),
            "negative_pooled_prompt_embeds": _embeds(count, 32, seed=seed + 3),
        }  # fmt: skip
    mask = torch.ones(count, 5, dtype=torch.long)
    return {
        "prompt_embeds": _embeds(count, 5, 16, seed=seed), "prompt_attention_mask": mask, "negative_prompt": None,
        "negative_prompt_embeds": _embeds(count, 5, 16, seed=seed + 1), "negative_prompt_attention_mask": mask,
        "use_resolution_binning": False,
    }  # fmt: skip


IMAGE_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen_edit() -> Any:
    """Return a pipeline of Qwen-Image-Edit with all of its parts, whose autoencoder makes 32 pixels one cell.

    The pipeline enlarges every reference to 1024 x 1024 pixels, which are 256 tokens here.
    """
    from diffusers import AutoencoderKLQwenImage, QwenImageEditPlusPipeline
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(list(IMAGE_TOKENS), special_tokens=True)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=start, vision_end_token_id=end,
        image_token_id=image, video_token_id=video,
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=2, z_dim=4, dim_mult=[1] * 6, num_res_blocks=1, temperal_downsample=[False] * 5,
        latents_mean=[0.1] * 4, latents_std=[0.02] * 4,
    ).eval()  # fmt: skip
    return QwenImageEditPlusPipeline(
        shifted_scheduler(), vae, Qwen2_5_VLForConditionalGeneration(config).eval(), tokenizer,
        Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT),
        tiny_transformers.transformer("qwen"),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {
    "flux2": flux2, "z_image": z_image, "qwen": qwen, "flux": partial(_flux, "FluxPipeline"),
    "kontext": partial(_flux, "FluxKontextPipeline"), "sd3": sd3, "sana": sana,
}  # fmt: skip
SIDES = {"qwen": 16, "sana": 32}  # of the pictures in pixels; 8 elsewhere
GUIDED = {
    "qwen": "true_cfg_scale",
    "flux": "true_cfg_scale",
    "kontext": "true_cfg_scale",
}


def stock(name: str) -> Any:
    """Return diffusers' own pipeline."""
    torch.manual_seed(0)
    pipe = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def personal(pipe: Any, **spec: Any) -> Any:
    """Return our pipeline around a stock one, with a random identity adapter on the same transformer."""
    made = ImaginePipeline.from_pipe(pipe, vision_encoder=tiny_stock.encoder())
    made.finder = KnownBoxesFinder([tiny.BOX])
    made.load_adapter(tiny_transformers.adapter(made.transformer, spec=spec))
    made.set_progress_bar_config(disable=True)
    return made


def native(name: str) -> dict[str, Any]:
    """Return the picture that an editing pipeline cannot do without."""
    return {"image": tiny.photo(5).resize((16, 16)), "_auto_resize": False, "max_area": 64} if name == "kontext" else {}


def arguments(name: str, count: int = 1, seed: int = 7, guided: bool = True, **options: Any) -> dict[str, Any]:
    """Return the arguments of a call for `count` prompts: two steps, with guidance."""
    side = SIDES.get(name, 8)
    given = {"height": side, "width": side, "num_inference_steps": 2, "output_type": "pt", **words(name, count)}
    given[GUIDED.get(name, "guidance_scale")] = 3.0 if guided else 1.0
    if guided and name in ("flux", "kontext"):
        given["negative_prompt"] = [""] * count
    copies = int(options.get("num_images_per_prompt", 1))
    given["generator"] = [tiny.generator(seed + number) for number in range(count * copies)]
    return {**given, **options}


def draw(pipe: Any, name: str, count: int = 1, seed: int = 7, guided: bool = True, **options: Any) -> Tensor:
    """Return `count` pictures (count, 3, H, W), or more with num_images_per_prompt, after two steps, with guidance."""
    pictures = pipe(**arguments(name, count, seed, guided, **options)).images
    copies = int(options.get("num_images_per_prompt", 1))
    assert isinstance(pictures, Tensor) and pictures.isfinite().all() and len(pictures) == count * copies
    return pictures
