"""Third-party models of the real classes at tiny random sizes, saved in the folder layout in which they are published.

A language model, a vision-language model, a Stable Diffusion pipeline, and an IP-Adapter for it.
"""

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data_synth.records import Candidate, Reference, TargetSpec
from tests import tiny

WORDS = "a person man woman with red black hair smiling laughing looking left right on the beach in forest hat . ,"
SIDE = 32  # side of the vision-language model's input in pixels
LICENCE = "---\nlicense: apache-2.0\n---\nA tiny model.\n"


def word_tokenizer(image_token: str | None = None) -> Any:
    """Return a tokenizer with one token per word of WORDS; all other words are unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", *([image_token] if image_token else [])]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS.split()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=[image_token] if image_token else [],
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def llama_config(vocabulary: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def language_model(folder: Path, chat: bool = True) -> Path:
    """Save a random Llama, which cannot follow instructions but has a chat template."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    LlamaForCausalLM(llama_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(LICENCE)
    return folder


def vision_language_model(folder: Path) -> Path:
    """Save a random LLaVA: CLIP's vision tower and a Llama."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers import LlavaProcessor as Processor

    torch.manual_seed(0)
    tokenizer = word_tokenizer("<image>")
    eyes = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=16, projection_dim=16, initializer_range=0.5,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=eyes,
        text_config=llama_config(len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        image_seq_length=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    template = (
        "{% for m in messages %}{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    Processor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer, patch_size=16, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def stable_diffusion(folder: Path) -> Path:
    """Save a random Stable Diffusion of 32 x 32 pixels, on 16 x 16 latents."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    from imagine.networks.encoders import build_clip_text

    torch.manual_seed(0)
    clip = tiny.tokenizers()[0]
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=build_clip_text(len(clip), 16, 1, 2, 16, clip.bos_token_id, clip.eos_token_id),
        tokenizer=clip, scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                                clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    (folder / "README.md").write_text(LICENCE)
    return folder


def ip_adapter(folder: Path, pipeline: Path) -> Path:
    """Save a random IP-Adapter of the base kind with its image encoder, in the layout of published repositories."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * 16, 8),
        "image_proj.proj.bias": torch.randn(4 * 16),
        "image_proj.norm.weight": torch.ones(16),
        "image_proj.norm.bias": torch.zeros(16),
    }
    cross = [name for name in unet.attn_processors if "attn2" in name]
    for number, name in enumerate(cross):
        module = unet.get_submodule(name.removesuffix(".processor"))
        for kind in ("to_k", "to_v"):
            shape = getattr(module, kind).weight.shape
            tensors[f"ip_adapter.{2 * number + 1}.{kind}_ip.weight"] = torch.randn(shape)
    (folder / "models").mkdir(parents=True)
    save_file(tensors, folder / "models" / "ip-adapter.safetensors")
    eyes = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=8,
    )  # fmt: skip
    CLIPVisionModelWithProjection(eyes).save_pretrained(folder / "models" / "image_encoder")
    return folder


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pixels(candidate: Candidate) -> Any:
    """Return a candidate's picture as an array (H, W, 3) of bytes."""
    import numpy as np

    return np.asarray(Image.open(io.BytesIO(candidate.image)).convert("RGB"))


def reference(seed: int) -> Reference:
    return Reference(f"r{seed}", png(tiny.photo(seed)), person=f"p{seed}")


def spec(of: Reference, number: int = 0, prompt: str = tiny.SENTENCES[0]) -> TargetSpec:
    return TargetSpec(f"{of.key}-{number}", of.key, "a person", prompt, {"expression": "smiling"}, seed=100 + number)
