"""The small text encoders of the portrait world: tokenizers trained on its captions, and the three models."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from imagine.networks import encoders
from imagine.world import captions, sample_contexts, sample_people

_SENTENCES = 3_000  # captions of each style that the vocabularies are made from
_BYT5_FOLDER = "tokenizer_3"
_FOLDERS = ("tokenizer", "tokenizer_2", _BYT5_FOLDER)
_READY = "ready"  # a file that exists once all three are written


def make_tokenizers(folder: Path, sentences: int = _SENTENCES) -> None:
    """Write tokenizer/ (CLIP, trimmed), tokenizer_2/ (T5) and tokenizer_3/ (ByT5) into `folder`, unless it has them."""
    if (folder / _READY).exists():
        return
    seeds = range(sentences)
    with torch.device("cpu"):  # a plan builds on the meta device, but captions need real values
        people, contexts = sample_people(seeds), sample_contexts(seeds)
        styles = ("dense", "terse", "rewritten")
        written = [text for style in styles for text in captions(people, contexts, style, seeds)]
    encoders.trim_clip_vocabulary(written, folder / "tokenizer")
    encoders.train_t5_tokenizer(written, folder / "tokenizer_2", vocabulary_size=600)
    encoders.build_byt5_tokenizer().save_pretrained(folder / _BYT5_FOLDER)
    (folder / _READY).touch()


def copy_tokenizers(sources: Sequence[Path], folder: Path) -> bool:
    """Copy the tokenizers of the last source that holds all three into `folder`; return whether it holds any now.

    Text encoders only understand the numbers of the tokenizers that they were trained with.
    """
    held = [source for source in sources if all((source / name).is_dir() for name in _FOLDERS)]
    if held and not (folder / _READY).exists():
        for name in _FOLDERS:
            shutil.copytree(held[-1] / name, folder / name, dirs_exist_ok=True)
        (folder / _READY).touch()
    return bool(held)


def build_text_encoders(folder: Path) -> encoders.TextEncoders:
    """Return newly initialised encoders with the tokenizers in `folder`."""
    from transformers import ByT5Tokenizer, CLIPTokenizer, T5Tokenizer

    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    t5 = T5Tokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True)
    byt5 = ByT5Tokenizer.from_pretrained(folder / _BYT5_FOLDER, local_files_only=True)
    return encoders.TextEncoders(
        encoders.build_clip_text(len(clip), bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id),
        clip,
        encoders.build_t5(len(t5)),
        t5,
        encoders.build_byt5(),
        byt5,
    )


def load_text_encoders(folder: Path) -> encoders.TextEncoders:
    """Load the encoders that `save_text_encoders` wrote, in float32."""
    from transformers import ByT5Tokenizer, CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

    def model(kind: Any, name: str) -> Any:
        return kind.from_pretrained(folder / name, local_files_only=True, dtype=torch.float32).eval()

    def tokenizer(kind: Any, name: str) -> Any:
        return kind.from_pretrained(folder / name, local_files_only=True)

    return encoders.TextEncoders(
        model(CLIPTextModel, "text_encoder"),
        tokenizer(CLIPTokenizer, "tokenizer"),
        model(T5EncoderModel, "text_encoder_2"),
        tokenizer(T5Tokenizer, "tokenizer_2"),
        model(T5EncoderModel, "text_encoder_3"),
        tokenizer(ByT5Tokenizer, _BYT5_FOLDER),
    )


def save_text_encoders(text: encoders.TextEncoders, folder: Path) -> None:
    """Write models and tokenizers under the folder names of the pipeline."""
    pairs = (("text_encoder", text.clip), ("text_encoder_2", text.t5), ("text_encoder_3", text.byt5))
    for name, model in pairs:
        cast(Any, model).save_pretrained(folder / name)
    for name, tokenizer in (("tokenizer", text.clip_tokenizer), ("tokenizer_2", text.t5_tokenizer)):
        tokenizer.save_pretrained(folder / name)
    text.byt5_tokenizer.save_pretrained(folder / _BYT5_FOLDER)


def parameters(*modules: nn.Module) -> list[nn.Parameter]:
    """Return all parameters of these modules, in order."""
    return [parameter for module in modules for parameter in module.parameters()]
