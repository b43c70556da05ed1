"""The four encoders: three for the prompt and one for the face.

Three encoders read a prompt, because each captures what the others miss (*Imagine yourself*, section 3.3, and Movie
Gen, arXiv 2410.13720, section 3.1.3). CLIP text is aligned with pictures, T5 (in place of UL2) captures the meaning of
sentences, and ByT5 encodes the letters to draw, so it reads only the text between double quotes. A CLIP vision tower
reads the photo; its penultimate tokens carry the identity.

    prompts -> TextEncoders.encode -> CLIP tokens and {"t5": tokens, "byt5": tokens}
    face crops -> VisionEncoder    -> vision features (global + patches), which the adapter projects to tokens

The builders take plain numbers and return randomly initialised networks, by default at the portrait world's size.
Public weights use the same classes. The pipeline and the trainer both encode through `TextEncoders`, so their windows,
padding and masks always agree. transformers and open_clip are imported inside the functions that need them, because
they are slow to import and much of the package does not need them.
"""

import gzip
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from imagine.errors import PromptError
from imagine.records import Tokens

CLIP_WINDOWS = 4  # the most CLIP windows that a prompt may fill; a longer prompt is refused
T5_TOKENS = 512  # T5's positions are relative, so the model has no limit; this one bounds the run time
QUOTED_BYTES = 128  # the same kind of limit for ByT5
T5_STEP = 64  # sequences are padded to multiples of these, so that padding rarely depends on the rest of the batch
BYT5_STEP = 16
_T5_TOO_LONG = "The prompt is {length} T5 tokens long"
_QUOTED_TOO_LONG = "The text between quotes is {length} bytes long"

# open_clip's constants (open_clip/constants.py), copied here because importing open_clip takes seconds.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_QUOTED = re.compile(r'"([^"]*)"|“([^“”]*)”|„([^„“”]*)[“”]|«([^«»]*)»')


class VisionEncoder(ModelMixin, ConfigMixin):
    """open_clip's VisionTransformer for face crops, saved and loaded like any diffusers model.

    The sizes are plain numbers, stored in config.json. `embed_width` is the width of the contrastive embedding. The
    default equals the small CLIP text model's width, so that the text's pooled output needs no projection.
    `quick_gelu` selects the activation of OpenAI's CLIP weights; OpenCLIP's weights use the exact one.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        patch_size: int = 8,
        width: int = 160,
        layers: int = 5,
        heads: int = 5,
        mlp_ratio: float = 4.0,
        embed_width: int = 192,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        from open_clip.transformer import QuickGELU, VisionTransformer

        if layers < 2:
            raise ValueError(f"features come from the penultimate layer, so {layers} layers are too few; use 2 or more")
        self.tower = VisionTransformer(
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            layers=layers,
            heads=heads,
            mlp_ratio=mlp_ratio,
            output_dim=embed_width,
            act_layer=QuickGELU if quick_gelu else nn.GELU,
        )
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1), persistent=False)

    @property
    def tokens(self) -> int:
        """Return the number of tokens per crop: one global token and one per patch."""
        return 1 + (self.config.image_size // self.config.patch_size) ** 2

    def forward(self, crops: Tensor) -> Tensor:
        """Map crops (B, 3, S, S) in 0..1 to the penultimate layer's tokens (B, 1 + patches, width), global first.

        This is IP-Adapter's `hidden_states[-2]`: the output of the last block but one, before any final normalisation.
        """
        found = self.tower.forward_intermediates(
            self._normalised(crops),
            indices=[self.config.layers - 2],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1)

    def embed(self, crops: Tensor) -> Tensor:
        """Map crops (B, 3, S, S) in 0..1 to pooled, projected embeddings (B, embed_width), not normalised."""
        embedding: Tensor = self.tower(self._normalised(crops))
        return embedding

    def _normalised(self, crops: Tensor) -> Tensor:
        size = self.config.image_size
        if crops.shape[1:] != (3, size, size):
            raise ValueError(f"crops of shape {tuple(crops.shape)} do not fit: give (B, 3, {size}, {size})")
        return (crops.to(self.mean.dtype) - self.mean) / self.std


def build_clip_text(
    vocabulary: int,
    width: int = 192,
    layers: int = 3,
    heads: int = 6,
    max_tokens: int = 64,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> Any:
    """Build a transformers CLIPTextModel; it pools at the end token, by default the last one of the vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    end = vocabulary - 1 if eos_token_id is None else eos_token_id
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_tokens,
        projection_dim=width,
        bos_token_id=vocabulary - 2 if bos_token_id is None else bos_token_id,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModel(config).eval()


def build_t5(vocabulary: int, width: int = 128, layers: int = 2, heads: int = 4) -> Any:
    """Build a transformers T5EncoderModel (gated GELU, as T5 1.1 and UL2 have)."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // heads,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config).eval()


def build_byt5(width: int = 96, layers: int = 2, heads: int = 3) -> Any:
    """Build a T5EncoderModel over ByT5's 384 symbols: 3 special tokens, 256 bytes and 125 unused ones."""
    return build_t5(384, width, layers, heads)


def build_byt5_tokenizer() -> Any:
    """Build a transformers ByT5Tokenizer; it needs no files."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def trim_clip_vocabulary(sentences: Iterable[str], folder: str | os.PathLike[str], max_tokens: int = 64) -> Any:
    """Build and save to folder a CLIPTokenizer that splits `sentences` as CLIP's does, with only the pieces they need.

    A byte-pair merge that any word uses is kept, in its original rank, so every word of the sentences is split exactly
    as by the full vocabulary. All 256 bytes, alone and word-final, are also kept: every prompt can be tokenised, and a
    new word is split into smaller pieces. CLIP's 49,408 embeddings shrink to a few thousand.
    """
    from transformers import CLIPTokenizer

    ranks = _clip_merges()
    used: set[tuple[str, str]] = set()
    splitter = CLIPTokenizer(max_tokens=max_tokens).backend_tokenizer
    words = {word for sentence in sentences for word in _clip_words(splitter, sentence)}
    for word in words:
        used.update(_merges_of(word, ranks))
    merges = sorted(used, key=ranks.__getitem__)
    alphabet = _byte_symbols()
    pieces = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_tokens)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def train_t5_tokenizer(
    sentences: Iterable[str], folder: str | os.PathLike[str], vocabulary_size: int = 1000, max_tokens: int = T5_TOKENS
) -> Any:
    """Train a SentencePiece unigram model on `sentences` and save it to folder as a transformers T5Tokenizer.

    Ids follow T5 (<pad> 0, </s> 1, <unk> 2). SentencePiece is trained with byte fallback, but T5's own class has none
    and would lose it on loading. Every printable ASCII character is therefore made a piece, and any other character
    is <unk>, as in T5 itself. Spelling is left to ByT5.
    """
    import io

    import sentencepiece
    from transformers import T5Tokenizer

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=trained,
        vocab_size=vocabulary_size,
        hard_vocab_limit=False,
        model_type="unigram",
        character_coverage=1.0,
        required_chars="".join(map(chr, range(33, 127))),
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    pieces = [(model.id_to_piece(index), model.get_score(index)) for index in range(model.get_piece_size())]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_tokens)
    tokenizer.save_pretrained(folder)
    return T5Tokenizer.from_pretrained(folder, local_files_only=True)


def pooled(clip: Tokens, t5: Tokens) -> Tensor:
    """Return each prompt as one vector (B, CLIP width + T5 width): CLIP's last token and the mean of T5's tokens.

    CLIP's last token is the end token, at which CLIP itself pools; of several windows it is that of the last one.
    """
    return torch.cat((_last_token(clip), _mean_token(t5)), dim=1)


def _last_token(tokens: Tokens) -> Tensor:
    if tokens.mask is None:
        return tokens.values[:, -1]
    positions = torch.arange(tokens.mask.shape[1], device=tokens.mask.device)
    ends = (tokens.mask * positions).amax(1)
    return tokens.values[torch.arange(len(ends), device=ends.device), ends]


def _mean_token(tokens: Tokens) -> Tensor:
    if tokens.mask is None:
        return tokens.values.mean(1)
    weight = tokens.mask.unsqueeze(2).to(tokens.values.dtype)
    return (tokens.values * weight).sum(1) / weight.sum(1).clamp(min=1)


def quoted(prompt: str) -> str:
    """Return the text between double quotes, straight or typographic, the parts joined by a space; "" if none.

    A quote that is not closed is ignored.
    """
    found = ("".join(part or "" for part in match) for match in _QUOTED.findall(prompt))
    return " ".join(text.strip() for text in found if text.strip())


@dataclass(frozen=True)
class TextEncoders:
    """The three text encoders with their tokenizers: CLIP's, T5's and ByT5's, in the pipeline's order.

    `device` is where they compute, by default the device of their weights; give it while they are offloaded.
    """

    clip: Any
    clip_tokenizer: Any
    t5: Any
    t5_tokenizer: Any
    byt5: Any
    byt5_tokenizer: Any
    device: torch.device | None = None

    def encode(self, prompts: Sequence[str]) -> tuple[Tokens, dict[str, Tokens]]:
        """Encode prompts to CLIP tokens (B, L, width) and {"t5": ..., "byt5": ...}, each with its key-padding mask.

        "" is the unconditional prompt. CLIP reads windows of its own length (`encode_clip`), T5 the whole prompt, and
        ByT5 only the text between double quotes. Raises PromptError if a prompt is too long for any of them.
        """
        return self.encode_clip(prompts), {"t5": self.encode_t5(prompts), "byt5": self.encode_byt5(prompts)}

    def fits(self, branch: str, prompt: str) -> bool:
        """Return whether the encoder of a branch, "clip", "t5" or "byt5", takes the whole prompt."""
        try:
            if branch == "clip":
                self._clip_windows(prompt, int(self.clip.config.max_position_embeddings))
            elif branch == "t5":
                self._ids(self.t5_tokenizer, [prompt], T5_TOKENS, _T5_TOO_LONG)
            else:
                self._ids(self.byt5_tokenizer, [quoted(prompt)], QUOTED_BYTES, _QUOTED_TOO_LONG)
        except PromptError:
            return False
        return True

    @property
    def pooled_width(self) -> int:
        """Return the width of the vector that `pooled` computes from these encoders' tokens."""
        return int(self.clip.config.hidden_size + self.t5.config.d_model)

    def encode_clip(self, prompts: Sequence[str]) -> Tokens:
        """Encode prompts in as many CLIP windows as the longest needs, each with its start and end, concatenated."""
        window = int(self.clip.config.max_position_embeddings)
        windows = [self._clip_windows(prompt, window) for prompt in prompts]
        count = max(map(len, windows))
        # Only the windows that a prompt has are encoded; those missing in shorter prompts are zeros and masked.
        ids, mask = self._padded(
            [piece for pieces in windows for piece in pieces], window, self.clip_tokenizer, self.clip
        )
        states = self.clip(input_ids=ids, attention_mask=mask).last_hidden_state
        values = states.new_zeros(len(prompts), count * window, states.shape[-1])
        masks = mask.new_zeros(len(prompts), count * window, dtype=torch.bool)
        start = 0
        for row, pieces in enumerate(windows):
            length, stop = len(pieces) * window, start + len(pieces)
            values[row, :length] = states[start:stop].flatten(0, 1)
            masks[row, :length] = mask[start:stop].flatten().bool()
            start = stop
        return Tokens(values, masks)

    def encode_t5(self, prompts: Sequence[str]) -> Tokens:
        """Encode whole prompts with T5, padded to a multiple of 64 tokens."""
        ids = self._ids(self.t5_tokenizer, prompts, T5_TOKENS, _T5_TOO_LONG)
        return self._encode(self.t5, self.t5_tokenizer, ids, T5_STEP)

    def encode_byt5(self, prompts: Sequence[str]) -> Tokens:
        """Encode the bytes between double quotes, padded to a multiple of 16; without quotes, the end token alone."""
        quoted_texts = [quoted(prompt) for prompt in prompts]
        unique_texts = list(dict.fromkeys(quoted_texts))  # most prompts quote nothing; encode that text once
        ids = self._ids(self.byt5_tokenizer, unique_texts, QUOTED_BYTES, _QUOTED_TOO_LONG)
        read = self._encode(self.byt5, self.byt5_tokenizer, ids, BYT5_STEP)
        if len(unique_texts) == len(quoted_texts):
            return read
        rows = torch.tensor([unique_texts.index(text) for text in quoted_texts], device=read.values.device)
        return Tokens(read.values[rows], None if read.mask is None else read.mask[rows])

    def _clip_windows(self, prompt: str, window: int) -> list[list[int]]:
        tokenizer = self.clip_tokenizer
        # verbose=False, because the tokenizer would warn that the text exceeds one window.
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        inside = window - 2
        if len(ids) > CLIP_WINDOWS * inside:
            raise PromptError(
                f"The prompt is {len(ids)} tokens long and {CLIP_WINDOWS * inside} fit: "
                f"shorten it to about {CLIP_WINDOWS * inside * 2 // 3} words."
            )
        pieces = [ids[start : start + inside] for start in range(0, max(len(ids), 1), inside)]
        return [[tokenizer.bos_token_id, *piece, tokenizer.eos_token_id] for piece in pieces]

    @staticmethod
    def _ids(tokenizer: Any, texts: Sequence[str], limit: int, message: str) -> list[list[int]]:
        ids: list[list[int]] = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
        longest = max(map(len, ids))
        if longest > limit:
            raise PromptError(f"{message.format(length=longest - 1)} and {limit - 1} fit: shorten it.")
        return ids

    def _encode(self, model: Any, tokenizer: Any, ids: list[list[int]], step: int) -> Tokens:
        length = -(-max(map(len, ids)) // step) * step
        padded, mask = self._padded(ids, length, tokenizer, model)
        return Tokens(model(input_ids=padded, attention_mask=mask).last_hidden_state, mask.bool())

    def _padded(
        self, ids: Sequence[Sequence[int]], length: int, tokenizer: Any, model: nn.Module
    ) -> tuple[Tensor, Tensor]:
        padded = torch.full((len(ids), length), int(tokenizer.pad_token_id))
        mask = torch.zeros(len(ids), length, dtype=torch.long)
        for row, sequence in enumerate(ids):
            padded[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        device = next(model.parameters()).device
        if device.type == "meta":  # offloaded: accelerate's hooks move the inputs to the execution device
            return padded, mask
        return padded.to(device), mask.to(device)


def _byte_symbols() -> list[str]:
    """Return the printable characters that stand for the 256 bytes in byte-level BPE, in CLIP's order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return [*map(chr, plain), *(chr(256 + index) for index in range(len(others)))]


def _clip_merges() -> dict[tuple[str, str], int]:
    """Return CLIP's byte-pair merges with their ranks, from the vocabulary in the open_clip package."""
    import importlib.util

    spec = importlib.util.find_spec("open_clip")  # located without the slow import
    assert spec is not None and spec.origin is not None
    text = gzip.decompress((Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges: list[tuple[str, str]] = []
    for line in text.split("\n")[1 : 49152 - 256 - 2 + 1]:  # without the header; CLIP uses this many merges
        first, second = line.split()
        merges.append((first, second))
    return {pair: rank for rank, pair in enumerate(merges)}


def _clip_words(splitter: Any, sentence: str) -> list[str]:
    normal = splitter.normalizer.normalize_str(sentence)
    return [word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(normal)]


def _merges_of(word: str, ranks: Mapping[tuple[str, str], int]) -> Iterable[tuple[str, str]]:
    """Yield the merges that byte-pair encoding applies to one word, lowest rank first (Sennrich et al., 2016)."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        best = min(pairwise(pieces), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            return
        yield best
        merged: list[str] = []
        for piece in pieces:
            if merged and (merged[-1], piece) == best:
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged
