"""The captions' states by a base's own text encoders (Qwen3, T5, Mistral-class ...), through its stock pipeline.

Each family's `encode_prompt` is called as its pipeline calls it, so that training sees the states that drawing sees.
They are cached in bfloat16, in which these encoders compute on a GPU: states from inside a language model can exceed
the range of float16.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from imagine.networks.weights import dtype_argument, quiet_libraries
from imagine.records import Tokens
from train.cache.shortening import shorten
from train.data.public_base import LoadedEncoder, fingerprint_of, variant_of

TEXT, POOLED = "text", "pooled"
# a stock pipeline, sentences, the most tokens per sentence, the device -> states by name
Encode = Callable[[Any, list[str], int, torch.device], dict[str, Tokens]]


@dataclass(frozen=True)
class StockTextEncoders:
    """The text encoders of a base's folder.

    pipeline: the name of the stock class. encode: as the family does it. shapes: as in `FrozenTextEncoder`. limit: most
    tokens of a sentence. counted: the tokenizer whose tokens count against it, of which a template takes `overhead`.
    """

    folder: Path
    pipeline: str
    components: tuple[str, ...]
    encode: Encode
    shapes: Mapping[str, tuple[int, int]]
    limit: int
    counted: str
    overhead: int
    device: torch.device
    precision: ClassVar[torch.dtype] = torch.bfloat16

    @property
    def mark(self) -> str:
        """A fingerprint of everything that the states depend on besides their sentence."""
        return f"{fingerprint_of(*(self.folder / name for name in self.components))}-{self.limit}"

    def load(self) -> LoadedEncoder:
        import diffusers

        kind = getattr(diffusers, self.pipeline)
        # bfloat16 on a GPU, because these encoders have up to 24 billion parameters
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        with quiet_libraries():
            pipe = kind.from_pretrained(
                self.folder, transformer=None, vae=None, use_safetensors=True, local_files_only=True,
                variant=variant_of(self.folder / "text_encoder"), **{dtype_argument(kind): dtype},
            )  # fmt: skip
        pipe.to(self.device)
        tokenizer = getattr(pipe, self.counted) or pipe.tokenizer
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor

        def encode(texts: Sequence[str]) -> dict[str, Tokens]:
            with quiet_libraries():
                return self.encode(pipe, list(texts), self.limit, self.device)

        def fits(text: str) -> bool:
            return len(tokenizer(text, verbose=False)["input_ids"]) + self.overhead <= self.limit

        return LoadedEncoder(encode, lambda text: shorten(text, fits))


def encode_flux2(pipe: Any, texts: list[str], limit: int, device: torch.device) -> dict[str, Tokens]:
    """FLUX.2 attends to the padding too, so all tokens are kept."""
    return {TEXT: Tokens(pipe.encode_prompt(texts, device=device, max_sequence_length=limit)[0])}


def encode_flux(pipe: Any, texts: list[str], limit: int, device: torch.device) -> dict[str, Tokens]:
    """FLUX.1 reads T5's states, with the padding, and CLIP's pooled vector."""
    states, pooled, _ = pipe.encode_prompt(texts, device=device, max_sequence_length=limit)
    return {TEXT: Tokens(states), POOLED: Tokens(pooled.unsqueeze(1))}


def encode_sd3(pipe: Any, texts: list[str], limit: int, device: torch.device) -> dict[str, Tokens]:
    """Stable Diffusion 3 reads CLIP's states, then T5's, with the padding, and the pooled vectors of both CLIPs."""
    states, _, pooled, _ = pipe.encode_prompt(
        texts, None, None, device=device, max_sequence_length=limit, do_classifier_free_guidance=False
    )
    return {TEXT: Tokens(states), POOLED: Tokens(pooled.unsqueeze(1))}


def encode_z_image(pipe: Any, texts: list[str], limit: int, device: torch.device) -> dict[str, Tokens]:
    """Z-Image reads the tokens of the sentence alone."""
    found, _ = pipe.encode_prompt(texts, device=device, do_classifier_free_guidance=False, max_sequence_length=limit)
    return {TEXT: _padded(found)}


def encode_qwen(pipe: Any, texts: list[str], limit: int, device: torch.device) -> dict[str, Tokens]:
    """Qwen-Image reads the tokens of the sentence alone."""
    states, mask = pipe.encode_prompt(texts, device=device, max_sequence_length=limit)
    return {TEXT: Tokens(states, None if mask is None else mask.bool())}


def encode_sana(pipe: Any, texts: list[str], limit: int, device: torch.device) -> dict[str, Tokens]:
    """Sana puts an instruction before a sentence, but not before the empty one."""
    instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    states, masks = [], []
    for text in texts:
        found, mask, *_ = pipe.encode_prompt(
            [text], False, device=device, max_sequence_length=limit,
            complex_human_instruction=instruction if text else None,
        )  # fmt: skip
        states.append(found)
        masks.append(mask.bool())
    return {TEXT: Tokens(torch.cat(states), torch.cat(masks))}


def _padded(sentences: Sequence[Tensor]) -> Tokens:
    """Return the states of sentences of unequal length as one batch with its mask."""
    longest = max(len(each) for each in sentences)
    values = sentences[0].new_zeros(len(sentences), longest, sentences[0].shape[1])
    mask = torch.zeros(len(sentences), longest, dtype=torch.bool, device=values.device)
    for row, each in enumerate(sentences):
        values[row, : len(each)], mask[row, : len(each)] = each, True
    return Tokens(values, mask)
