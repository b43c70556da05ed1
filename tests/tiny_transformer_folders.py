"""Folders of diffusion transformers as they are downloaded from the hub, at tiny random sizes, with adapters for them.

Unlike the pipelines of `tiny_transformer_pipelines`, these have all text encoders, so that they take sentences.
"""

from pathlib import Path
from typing import Any

import torch

from imagine.networks.encoders import build_t5
from imagine.networks.models import build_autoencoder
from tests import tiny, tiny_stock, tiny_transformers
from tests import tiny_transformer_pipelines as pipelines

FACTS = dict.fromkeys(("base", "encoder", "feature_layer", "tokens", "licence"), "test")
# Short names of public bases, and the tiny folder that stands for each.
SHORT_NAMES = {
    "flux2-klein-4b": "flux2", "z-image": "z_image", "qwen-image": "qwen", "flux1-dev": "flux", "sd35-medium": "sd3",
    "sana": "sana",
}  # fmt: skip


def pipeline(name: str) -> Any:
    """Return diffusers' own pipeline of a family, with its text encoders."""
    torch.manual_seed(0)
    if name == "flux2":
        pipe = pipelines.flux2()
        pipe.text_encoder = pipelines.qwen3(True, layers=28)  # the pipeline reads layers 9, 18 and 27
        return pipe
    pipe = pipelines.PIPELINES[name]()
    if name == "qwen":
        pipe.register_modules(text_encoder=_qwen_vl(), tokenizer=pipelines.chat_tokenizer())
    elif name == "sd3":
        parts = tiny_stock.components(xl=True)
        clip, t5, _ = tiny.tokenizers()
        pipe.register_modules(
            transformer=tiny_transformers.transformer("sd3", joint_attention_dim=48, pooled_projection_dim=48),
            text_encoder=parts["text_encoder_2"], text_encoder_2=parts["text_encoder_2"],
            text_encoder_3=build_t5(len(t5), 48, 1, 2), tokenizer=clip, tokenizer_2=clip, tokenizer_3=t5,
        )  # fmt: skip
    elif name == "sana":
        pipe.register_modules(
            text_encoder=_gemma(), tokenizer=pipelines.chat_tokenizer(),
            transformer=tiny_transformers.transformer("sana", sample_size=16),  # draws 512 px
            vae=build_autoencoder(4, (8, 8, 8, 8, 16), (1,) * 5, (1,) * 5).eval(),
        )  # fmt: skip
    return pipe


def save_base(folder: Path, name: str) -> Path:
    """Save the pipeline of a family as its publishers do."""
    pipe = pipeline(name)
    pipe.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, name: str, **options: Any) -> Path:
    """Save a random adapter for the pipeline of a family, with its vision encoder beside it."""
    transformer = tiny_transformers.transformer(name, **_SIZES.get(name, {}))
    tiny_transformers.adapter(transformer, **options).save(folder / "adapter", FACTS)
    tiny_stock.encoder().save_pretrained(folder / "vision_encoder")
    return folder


_SIZES: dict[str, dict[str, int]] = {
    "flux2": {"joint_attention_dim": 48}, "sd3": {"joint_attention_dim": 48, "pooled_projection_dim": 48},
    "sana": {"sample_size": 16},
}  # fmt: skip


def _qwen_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": len(pipelines.chat_tokenizer()), "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def _gemma() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(pipelines.chat_tokenizer()), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8, initializer_range=0.3,
        )
    ).eval()  # fmt: skip
