"""Whole pipelines of diffusion transformers at tiny random sizes, with the text encoders of their family."""

from typing import Any

from tests import tiny, tiny_transformer_pipelines
from tests.tiny_transformer_pipelines import chat_tokenizer

NAMES = ("flux2", "z_image", "qwen", "flux", "sd3", "sana")
SIDES = {"sana": 32}  # of the pictures in pixels; 16 elsewhere
# As real templates, it gives tokens to an empty sentence too.
CHAT = "person {% for m in messages %}{{ m['content'] }} {% endfor %}"


def pipeline(name: str) -> Any:
    """Return diffusers' own pipeline of a family with everything that training needs."""
    pipe = tiny_transformer_pipelines.stock(name)
    if name == "flux2":  # its pipeline reads the layers 9, 18 and 27
        pipe.register_modules(text_encoder=tiny_transformer_pipelines.qwen3(True, 28))
    if name in ("flux2", "z_image"):
        pipe.tokenizer.chat_template = CHAT
    if name == "qwen":
        pipe.register_modules(text_encoder=_qwen_vl(), tokenizer=chat_tokenizer())
    if name == "sd3":
        _add_sd3_encoders(pipe)
    if name == "sana":
        pipe.register_modules(text_encoder=_gemma(), tokenizer=chat_tokenizer())
    return pipe


def side(name: str) -> int:
    """Return the side in pixels of the pictures that a family is tested with."""
    return SIDES.get(name, 16)


def _qwen_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": len(chat_tokenizer()), "initializer_range": 0.3, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def _gemma() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(
        vocab_size=len(chat_tokenizer()), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, pad_token_id=0, initializer_range=0.3,
        max_position_embeddings=1024,
    )).eval()  # fmt: skip


def _add_sd3_encoders(pipe: Any) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from imagine.networks.encoders import build_t5

    clip, t5, _ = tiny.tokenizers()
    config = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, max_position_embeddings=16, bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
    )  # fmt: skip
    pipe.register_modules(
        text_encoder=CLIPTextModelWithProjection(config).eval(), tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(config).eval(), tokenizer_2=clip,
        text_encoder_3=build_t5(len(t5), 32, 1, 2), tokenizer_3=t5,
    )  # fmt: skip
    pipe.tokenizer_max_length = clip.model_max_length
