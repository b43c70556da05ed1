"""Custom Diffusion (arXiv 2212.04488): learn a word, and the keys and values of the cross-attention layers.

Photos are seen at several scales, with words for it, and the padding is left out of the loss. The pictures of the class
are real ones with captions if a folder is given (`prior_photos`), else the base generates them.

Two people learnt apart are merged in closed form (section 3.3): of all weights that map the subjects' words to the
outputs that each tuned model gives them, those that change the outputs of other captions least.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from train.methods.bases.text import TextState
from train.methods.learned.weights import Collected, cross_keys_values
from train.methods.learned.words import LearntWords
from train.methods.task import Sentences, TuningTask
from train.methods.tuned.textual_inversion import FILE, WordSettings, write_embeddings
from train.run.checkpoint import write_tensors
from train.task import Weight

WEIGHTS = "pytorch_custom_diffusion_weights.safetensors"  # the name in diffusers


class CustomDiffusionSettings(WordSettings):
    """Settings of Custom Diffusion, with the paper's weight of the prior."""

    sentences: Sentences = "plain"
    prior: Weight = 1.0
    scales: int = 6


class CustomDiffusion(TuningTask):
    """Learn words, and the keys and values of the cross-attention layers."""

    Settings = CustomDiffusionSettings
    PARTS: ClassVar[tuple[str, ...]] = ("words", "keys_values")
    LEARNS_WORDS: ClassVar[bool] = True
    NAME: ClassVar[str] = "custom_diffusion"

    def build(self) -> None:
        settings = self.settings
        initial = settings.initial or settings.noun or "object"
        self.words = LearntWords(self.base, self.naming.tokens, initial, settings.vectors)
        weights = cross_keys_values(self.base.unet)
        self.untuned = {name: weight.detach().clone() for name, weight in weights.items()}
        self.modules |= {"words": self.words, "keys_values": Collected(weights)}

    def text(self, sentences: Sequence[str], times: Tensor | None = None) -> TextState:
        return self.words.encode(self.base, sentences)

    def write(self, folder: Path) -> None:
        """Write the word, and keys and values under the names of diffusers' `CustomDiffusionAttnProcessor`."""
        tensors = {}
        for name, weight in cross_keys_values(self.base.unet).items():
            layer, part, _ = name.rsplit(".", 2)
            tensors[f"{layer}.processor.{part}_custom_diffusion.weight"] = weight.detach()
        write_tensors(folder / "diffusers" / WEIGHTS, tensors, {})
        write_embeddings(self.words, folder / "diffusers" / FILE)

    @torch.no_grad()
    def detach(self) -> None:
        for name, weight in cross_keys_values(self.base.unet).items():
            weight.copy_(self.untuned[name])


@torch.no_grad()
def merged_weights(
    before: Mapping[str, Tensor],
    tuned: Sequence[tuple[Mapping[str, Tensor], Tensor]],
    others: Tensor,
    ridge: float = 1e-6,
) -> dict[str, Tensor]:
    """Return keys and values that hold several subjects, (Custom Diffusion, equation 4), by name.

    before: the base's weights (out, width). tuned: each subject's weights, and the text features (m, width) of its
    words. others: the text features (r, width) of captions whose outputs should stay. With C all subjects' features and
    V their tuned outputs, W = W0 + (V' - W0 C') (d C')^-1 d and d = C (R'R)^-1, in float64; `ridge` keeps R'R
    invertible.
    """
    targets = torch.cat([features for _, features in tuned]).double()
    square = others.double().T @ others.double()
    square += ridge * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64, device=square.device)
    d = torch.linalg.solve(square, targets.T).T
    merged = {}
    for name, old in before.items():
        values = torch.cat([features.double() @ weights[name].double().T for weights, features in tuned])
        rest = values.T - old.double() @ targets.T
        merged[name] = (old.double() + rest @ torch.linalg.solve(d @ targets.T, d)).to(old.dtype)
    return merged
