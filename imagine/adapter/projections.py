"""The projections of IP-Adapter files, from features of a reference to a branch's tokens, under the files' names.

Their state dicts equal the `image_proj` part of a standard file, so that a branch is imported and exported without
renaming (layouts: shared by https://github.com/tencent-ailab/IP-Adapter and diffusers' loaders/unet.py).

    linear   one pooled embedding to a few tokens                         ("base", ImageProjModel)
    full     every penultimate token through an MLP                       (MLPProjModel), the paper's form
    plus     a few learnt tokens that attend to the penultimate tokens    (Resampler; depth 4, heads of width 64)
    faceid   a face recogniser's embedding to a few tokens                ("FaceID", its MLPProjModel)
    faceid-plus   these tokens, which then attend to the penultimate tokens of the face  ("FaceID Plus", ProjPlusModel)
"""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["linear", "full", "plus", "faceid", "faceid-plus"]

LINEAR_TOKENS = 4  # diffusers accepts no other number
PLUS_TOKENS = 16
PLUS_DEPTH = 4  # diffusers silently ignores further layers
PLUS_HEAD = 64  # diffusers assumes heads of this width

# Text width to inner width of the published Plus files. ComfyUI, sd-webui and InvokeAI support no other sizes.
_PLUS_INNER_WIDTHS = {768: 768, 2048: 1280}


def plus_inner_width(width: int) -> int:
    """Return the inner width of a plus projection to tokens of `width`: the published one, or a multiple of 64."""
    return _PLUS_INNER_WIDTHS.get(width, -(-width // PLUS_HEAD) * PLUS_HEAD)


class LinearProjection(nn.Module):
    """Maps a pooled embedding (batch, images, E) to `tokens` tokens each: (batch, images * tokens, width)."""

    def __init__(self, input_width: int, width: int, tokens: int = LINEAR_TOKENS) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(input_width, width * tokens)
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """Map (batch, images, input width) to (batch, images * tokens, width)."""
        found = self.proj(features).unflatten(-1, (self.tokens, -1)).flatten(1, 2)
        return cast(Tensor, self.norm(found))


class FullProjection(nn.Module):
    """Per-token MLP from vision features to tokens, in the layout of IP-Adapter's MLPProjModel ("Full")."""

    def __init__(self, input_width: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(input_width, input_width), nn.GELU(), nn.Linear(input_width, width), nn.LayerNorm(width)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (batch, length, input width) to (batch, length, width)."""
        return cast(Tensor, self.proj(features))


class PlusProjection(nn.Module):
    """Learnt tokens that attend to one picture's features and to themselves (a Perceiver resampler).

    `inner_width` is the width of its own tokens, `attention_width` that of all its heads together; both are multiples
    of 64.
    """

    def __init__(
        self, input_width: int, width: int, inner_width: int, attention_width: int, tokens: int = PLUS_TOKENS
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, tokens, inner_width) / inner_width**0.5)
        self.proj_in = nn.Linear(input_width, inner_width)
        self.proj_out = nn.Linear(inner_width, width)
        self.norm_out = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.ModuleList([_PerceiverAttention(inner_width, attention_width), _feed_forward(inner_width)])
            for _ in range(PLUS_DEPTH)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map one picture's features (batch, length, input width) to (batch, tokens, width)."""
        tokens = self.latents.expand(len(features), -1, -1)
        features = self.proj_in(features)
        for attention, feed_forward in cast("list[tuple[nn.Module, nn.Module]]", self.layers):
            tokens = attention(features, tokens) + tokens
            tokens = feed_forward(tokens) + tokens
        return cast(Tensor, self.norm_out(self.proj_out(tokens)))


class FaceIdProjection(nn.Module):
    """MLP from a face's embedding (batch, images, E) to `tokens` tokens each: (batch, images * tokens, width).

    `inner_width` is the width of its hidden layer.
    """

    def __init__(self, input_width: int, width: int, inner_width: int, tokens: int = LINEAR_TOKENS) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Sequential(
            nn.Linear(input_width, inner_width), nn.GELU(), nn.Linear(inner_width, width * tokens)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """Map (batch, images, input width) to (batch, images * tokens, width)."""
        found = self.proj(features).unflatten(-1, (self.tokens, -1)).flatten(1, 2)
        return cast(Tensor, self.norm(found))


class FaceIdPlusProjection(nn.Module):
    """The tokens of a face's embedding, which then attend to the vision tokens of the same face.

    One picture's features are (1 + length) rows of one width: the embedding, padded with zeros, and then the vision
    tokens. `shortcut` adds the tokens of the embedding to the result, as FaceID Plus v2 was trained.
    """

    def __init__(
        self, face_width: int, input_width: int, width: int, inner_width: int, attention_width: int,
        tokens: int = LINEAR_TOKENS, shortcut: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.face_width, self.input_width, self.tokens, self.shortcut = face_width, input_width, tokens, shortcut
        self.proj = nn.Sequential(nn.Linear(face_width, inner_width), nn.GELU(), nn.Linear(inner_width, width * tokens))
        self.norm = nn.LayerNorm(width)
        self.perceiver_resampler = _Resampler(input_width, width, attention_width)

    def forward(self, features: Tensor) -> Tensor:
        """Map one picture's features (batch, 1 + length, feature width) to (batch, tokens, width)."""
        embedding, vision = features[:, 0, : self.face_width], features[:, 1:, : self.input_width]
        tokens = self.norm(self.proj(embedding).unflatten(-1, (self.tokens, -1)))
        found = self.perceiver_resampler(vision, tokens)
        return cast(Tensor, tokens + found if self.shortcut else found)


class _Resampler(nn.Module):
    """A Perceiver resampler whose first tokens are given (FacePerceiverResampler)."""

    def __init__(self, input_width: int, width: int, attention_width: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(input_width, width)
        self.proj_out = nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.ModuleList([_PerceiverAttention(width, attention_width), _feed_forward(width)])
            for _ in range(PLUS_DEPTH)
        )

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        features = self.proj_in(features)
        for attention, feed_forward in cast("list[tuple[nn.Module, nn.Module]]", self.layers):
            tokens = attention(features, tokens) + tokens
            tokens = feed_forward(tokens) + tokens
        return cast(Tensor, self.norm_out(self.proj_out(tokens)))


class _PerceiverAttention(nn.Module):
    """Attention from the tokens to the features and the tokens themselves."""

    def __init__(self, width: int, attention_width: int) -> None:
        super().__init__()
        self.heads = attention_width // PLUS_HEAD
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, attention_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * attention_width, bias=False)
        self.to_out = nn.Linear(attention_width, width, bias=False)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        tokens = self.norm2(tokens)
        context = torch.cat((self.norm1(features), tokens), dim=1)
        parts = (self.to_q(tokens), *self.to_kv(context).chunk(2, dim=-1))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return cast(Tensor, self.to_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)))


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
    )
