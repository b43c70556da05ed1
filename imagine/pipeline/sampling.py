"""Compute guided predictions of the denoiser for a batch of pictures.

This module decides which guidance passes a step needs and what each pass attends to. It sits between the pipeline,
which handles prompts, photos and schedulers, and the denoiser with its adapters. A step needs one, two or three passes
(`imagine.networks.diffusion.guide`); they go through the denoiser as one batch. Keys and values of all branches are
recomputed only when the passes or a strength change, which is usually once per call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imagine.adapter.adapter import prepare
from imagine.errors import WeightsError
from imagine.networks.diffusion import guide
from imagine.networks.encoders import pooled
from imagine.pipeline.controls import Factors, layer_scales
from imagine.records import VISION, Conditioning, Tokens, join, take

TextTokens = tuple[Tokens, dict[str, Tokens]]  # CLIP's tokens, and the tokens of the other text branches
Pass = tuple[bool, bool]  # whether the pass includes the prompt, and whether it includes the people

UNCONDITIONAL, TEXT_ONLY, TEXT_AND_IDENTITY = (False, False), (True, False), (True, True)


@dataclass(frozen=True)
class Guidance:
    """Guidance scales for the prompt and for the identity; 1 or less is off. An identity of None equals the text scale.

    With `balanced` both guidance directions are brought to the same norm (`imagine.networks.diffusion.balance`) before
    their scales apply, which needs a separate pass for each.
    """

    text: float
    identity: float | None = None
    rescale: float = 0.0
    balanced: bool = False

    def passes(self, people: bool) -> tuple[Pass, ...]:
        """Return the passes of one step, for pictures with or without people."""
        full = TEXT_AND_IDENTITY if people else TEXT_ONLY
        together = self.identity in (None, self.text) and not (self.balanced and self.text > 1)
        if together or not people:
            return (full,) if self.text <= 1 else (UNCONDITIONAL, full)
        return UNCONDITIONAL, TEXT_ONLY, TEXT_AND_IDENTITY

    def combine(self, predictions: Sequence[Tensor], people: Tensor | None = None) -> Tensor:
        """Combine the predictions of `passes`, given in the same order.

        people: (pictures,), True for pictures that show a person; None means all.
        """
        if len(predictions) == 1:
            return predictions[0]
        if len(predictions) == 2:
            unconditional, full = predictions
            return guide(unconditional, full, full, self.text, 1.0, self.rescale)
        unconditional, sentence, full = predictions
        identity = self.text if self.identity is None else self.identity
        balanced = None
        if self.balanced:
            balanced = torch.ones(len(full), dtype=torch.bool, device=full.device) if people is None else people
        return guide(unconditional, sentence, full, self.text, identity, self.rescale, balanced)


@dataclass(frozen=True)
class Inputs:
    """The conditioning of all pictures of one call: prompts, negative prompts and people.

    `vision` has one row per picture; in a row without a person every token is masked. None: no picture shows a person.
    `factors` multiply the identity strength per attention layer (`controls.block_factors`); None: all factors are 1.
    `groups` (pictures, people) tells several people in a picture apart (`Conditioning.groups`); None: at most one each.
    """

    text: TextTokens
    negative: TextTokens
    vision: Tokens | None
    factors: Factors | None = None
    groups: Tensor | None = None

    def rows(self, rows: Tensor, vision: Tokens | None) -> "Inputs":
        """Return the prompts of the pictures at the given indices, which may repeat, with another person in each."""
        return Inputs(text_rows(self.text, rows), text_rows(self.negative, rows), vision, self.factors)

    def stacked(self, passes: Sequence[Pass], strength: Tensor) -> tuple[Tokens, Conditioning]:
        """Return CLIP's tokens and the conditioning of one denoiser call over all passes. strength: (pictures,)."""
        sides = [self.text if with_text else self.negative for with_text, _ in passes]
        clip = join([side[0] for side in sides])
        branches = {name: join([side[1][name] for side in sides]) for name in self.text[1]}
        if self.vision is None or not any(with_people for _, with_people in passes):
            return clip, Conditioning(branches)
        scales = torch.cat([strength if with_people else torch.zeros_like(strength) for _, with_people in passes])
        branches[VISION] = join([self.vision] * len(passes))
        groups = {} if self.groups is None else {VISION: self.groups.repeat(len(passes), 1)}
        return clip, Conditioning(branches, {VISION: layer_scales(scales, self.factors)}, groups=groups)


class GuidedDenoiser:
    """A denoiser with attached adapters, prepared for the denoising steps of one call."""

    def __init__(self, unet: nn.Module, inputs: Inputs, arguments: Mapping[str, Any]) -> None:
        self.unet, self.inputs, self.arguments = unet, inputs, dict(arguments)
        self._prepared_for: tuple[tuple[Pass, ...], Tensor] | None = None
        self._last: tuple[Tensor, int | None] | None = None
        self._any_person = False
        self._clip = inputs.text[0]
        self._pooled: Tensor | None = None
        self._conditioning = Conditioning()

    def velocity(self, latents: Tensor, timestep: Tensor, strength: Tensor, guidance: Guidance) -> Tensor:
        """Predict the guided velocity of latents (pictures, ...), with the identity strength (pictures,)."""
        unchanged = self._is_unchanged(strength)
        if not unchanged:
            self._any_person = self.inputs.vision is not None and bool(strength.any())
        passes = guidance.passes(self._any_person)
        self._prepare(passes, strength, unchanged)
        options = {**self.arguments, "conditioning": self._conditioning} if self._conditioning.branches else None
        predicted = self.unet(
            torch.cat([latents] * len(passes)),
            timestep,
            encoder_hidden_states=self._clip.values,
            encoder_attention_mask=self._clip.mask,
            class_labels=self._pooled,
            cross_attention_kwargs=options,
            return_dict=False,
        )[0]
        return guidance.combine(predicted.chunk(len(passes)), strength != 0)

    def _is_unchanged(self, strength: Tensor) -> bool:
        """Return whether this is the previous step's tensor, unmodified. Comparing values would wait for the device."""
        version = None if strength.is_inference() else strength._version  # inference tensors have no version counter
        last, self._last = self._last, (strength, version)
        return version is not None and last is not None and last[0] is strength and last[1] == version

    def _prepare(self, passes: tuple[Pass, ...], strength: Tensor, unchanged: bool) -> None:
        previous = self._prepared_for
        if previous is not None and previous[0] == passes and (unchanged or torch.equal(previous[1], strength)):
            return
        self._clip, conditioning = self.inputs.stacked(passes, strength)
        self._pooled = pooled_text(self.unet, self._clip, conditioning.branches)
        # Cached keys and values may depend on the strength through LoRA, so a new strength needs a new cache.
        self._conditioning = prepare(self.unet, conditioning)
        self._prepared_for = (passes, strength.clone())


def pooled_text(unet: Any, clip: Tokens, branches: Mapping[str, Tokens]) -> Tensor | None:
    """Return one vector per sentence for a denoiser with a projected class embedding (`class_labels`); None for others.

    Raises WeightsError if such a denoiser has no T5 tokens.
    """
    if getattr(unet.config, "class_embed_type", None) != "projection":
        return None
    if "t5" not in branches:
        raise WeightsError(
            "This denoiser also needs the sentence from T5, but no attached adapter reads T5: load its text_adapter."
        )
    return pooled(clip, branches["t5"])


def text_rows(text: TextTokens, rows: "Tensor | Sequence[int]") -> TextTokens:
    """Return the batch items of all text branches at the given indices, which may repeat."""
    return take(text[0], rows), {name: take(tokens, rows) for name, tokens in text[1].items()}
