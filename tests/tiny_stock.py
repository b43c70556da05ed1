"""Stable Diffusion 1.5 and XL of diffusers' own classes at tiny random sizes: 16-pixel pictures, unequal widths."""

from typing import Any

import torch

from imagine.adapter.adapter import Adapter, BranchSpec
from imagine.networks.encoders import VisionEncoder, build_byt5, build_clip_text, build_t5
from imagine.people.faces import KnownBoxesFinder
from imagine.stock.pipelines import personalised_class
from tests import tiny

SIDE = 16  # pixels
PROMPT = "a person smiling on a beach"
OTHER = 'an old woman in a blue shirt with the letters "OK"'


def unet(xl: bool, channels: int = 4) -> Any:
    from diffusers import UNet2DConditionModel

    more: dict[str, Any] = {}
    if xl:
        more = {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True,
            "projection_class_embeddings_input_dim": 6 * 4 + 24, "transformer_layers_per_block": (1, 2),
        }  # fmt: skip
    return UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, cross_attention_dim=40 if xl else 16, attention_head_dim=2, **more,
    ).eval()  # fmt: skip


def components(xl: bool, seed: int = 0) -> dict[str, Any]:
    """Return the components of a text-to-image pipeline."""
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    clip = tiny.tokenizers()[0]
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    parts: dict[str, Any] = {
        "unet": unet(xl), "vae": vae, "tokenizer": clip,
        "text_encoder": build_clip_text(len(clip), 16, 2, 2, 16, clip.bos_token_id, clip.eos_token_id),
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
    }  # fmt: skip
    if not xl:
        return {**parts, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    wider = {"hidden_size": 24, "intermediate_size": 96, "projection_dim": 24, "hidden_act": "gelu"}
    config = CLIPTextConfig(**{**parts["text_encoder"].config.to_dict(), **wider})
    return {**parts, "tokenizer_2": clip, "text_encoder_2": CLIPTextModelWithProjection(config).eval()}


def stock(xl: bool = False, kind: str = "", **more: Any) -> Any:
    """Return diffusers' own pipeline: kind is "", "Img2Img", "ControlNet" and so on."""
    import diffusers

    cls = getattr(diffusers, f"StableDiffusion{'XL' if xl else ''}{kind}Pipeline")
    pipe = cls(**components(xl), **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlnet(xl: bool) -> Any:
    """Return a random ControlNet whose outputs are not zero."""
    from diffusers import ControlNetModel

    torch.manual_seed(5)
    net = ControlNetModel.from_unet(unet(xl), conditioning_embedding_out_channels=(4, 8), load_weights_from_unet=False)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def encoder() -> VisionEncoder:
    torch.manual_seed(3)
    return VisionEncoder(tiny.CROP, 8, 24, 2, 2, embed_width=16).eval()


def readers() -> dict[str, Any]:
    """Return T5 and ByT5 with their tokenizers, as components."""
    _, t5, byt5 = tiny.tokenizers()
    torch.manual_seed(4)
    return {
        "t5_encoder": build_t5(len(t5), 16, 1, 2), "t5_tokenizer": t5,
        "byt5_encoder": build_byt5(12, 1, 2), "byt5_tokenizer": byt5,
    }  # fmt: skip


def identity(denoiser: Any, seed: int = 1, **spec: Any) -> Adapter:
    """Return a random, open identity adapter with LoRA."""
    torch.manual_seed(seed)
    given = {"projection": "full", "input_width": 24, **spec}
    adapter = Adapter(denoiser, [BranchSpec("vision", 16, **given)], lora_rank=2)
    for name, parameter in adapter.named_parameters():
        if name.endswith("gate") or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapter


def personal(pipe: Any, **more: Any) -> Any:
    """Return our personalised pipeline around a stock one, with an identity adapter."""
    made = personalised_class(type(pipe)).from_pipe(pipe, vision_encoder=encoder(), **more)
    made.finder = KnownBoxesFinder([tiny.BOX])
    made.load_adapter(identity(made.unet))
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, prompt: Any = PROMPT, seed: int = 7, **options: Any) -> torch.Tensor:
    """Return pictures (B, 3, H, W) in 0..1, after two steps unless `options` sets another number."""
    generator = options.pop("generator", None) or tiny.generator(seed)
    steps = options.pop("num_inference_steps", 2)
    pictures = pipe(prompt, generator=generator, num_inference_steps=steps, output_type="pt", **options).images
    assert isinstance(pictures, torch.Tensor) and pictures.isfinite().all()
    return pictures


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether both are equal up to rounding, by which a batch may differ from a single picture."""
    return one.shape == other.shape and bool((one - other).abs().max() < 1e-4)
