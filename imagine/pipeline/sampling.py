"""Compute guided predictions of the denoiser for a batch of pictures.

This module decides which guidance passes a step needs and what each pass attends to. It sits between the pipeline,
which handles prompts, photos and schedulers, and the denoiser with its adapters. A step needs one, two or three passes
(`imagine.networks.diffusion.guide`); they go through the denoiser as one batch, and so do the pictures of several calls
(`imagine.pipeline.stepping`), each at its own noise level and with its own guidance. Keys and values of all branches
are recomputed only when the pictures, the passes or a strength change, which is usually once per call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    `regions` (pictures, people, h, w) says where the people are (`layout.call_regions`); None: anywhere.
    """

    text: TextTokens
    negative: TextTokens
    vision: Tokens | None
    factors: Factors | None = None
    groups: Tensor | None = None
    regions: Tensor | None = None

    def rows(self, rows: Tensor, vision: Tokens | None) -> "Inputs":
        """Return the prompts of the pictures at the given indices, which may repeat, with another person in each."""
        return Inputs(text_rows(self.text, rows), text_rows(self.negative, rows), vision, self.factors)

    def pictures(self, rows: Tensor) -> "Inputs":
        """Return the inputs of the pictures at the given indices, which may repeat, with their own people."""
        return replace(
            self,
            text=text_rows(self.text, rows),
            negative=text_rows(self.negative, rows),
            vision=None if self.vision is None else take(self.vision, rows),
            groups=None if self.groups is None else self.groups[rows],
            regions=None if self.regions is None else self.regions[rows],
        )

    def stacked(self, passes: Sequence[Pass], strength: Tensor) -> tuple[Tokens, Conditioning]:
        """Return CLIP's tokens and the conditioning of one denoiser call over all passes. strength: (pictures,)."""
        return stack([_Rows(0, which, self, strength) for which in passes])

    def fits(self, other: "Inputs") -> bool:
        """Return whether pictures with these and with the other inputs can share a pass of the denoiser."""
        return self.factors == other.factors and (self.regions is None) == (other.regions is None)


@dataclass(frozen=True, eq=False)
class NoisyPictures:
    """The pictures of one call at one noise level, whose velocity is wanted.

    latents: (pictures, channels, h, w). timestep: the denoiser's, a number as a tensor. strength: of the identity,
    (pictures,).
    """

    inputs: Inputs
    latents: Tensor
    timestep: Tensor
    strength: Tensor
    guidance: Guidance


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of one denoiser call: one pass of the pictures with number `call` among those that are asked for."""

    call: int
    which: Pass
    inputs: Inputs
    strength: Tensor

    @property
    def shows_people(self) -> bool:
        return self.which[1] and self.inputs.vision is not None


class GuidedDenoiser:
    """A denoiser with attached adapters, prepared for the denoising steps of one call, or of several calls together."""

    def __init__(self, unet: nn.Module, arguments: Mapping[str, Any] | None = None) -> None:
        self.unet, self.arguments = unet, dict(arguments or {})
        self._prepared_for: list[_Rows] = []
        self._last: list[tuple[Tensor, int | None]] = []
        self._shows_people: list[bool] = []
        self._clip: Tokens | None = None
        self._pooled: Tensor | None = None
        self._conditioning = Conditioning()

    def velocity(self, pictures: NoisyPictures) -> Tensor:
        """Predict the guided velocity of the pictures of one call."""
        return self.velocities([pictures])[0]

    def velocities(self, calls: Sequence[NoisyPictures]) -> list[Tensor]:
        """Predict the guided velocities of the pictures of several calls in one pass. Their inputs must fit."""
        unchanged = self._is_unchanged([call.strength for call in calls])
        if not unchanged:
            self._shows_people = [call.inputs.vision is not None and bool(call.strength.any()) for call in calls]
        rows = _rows_of(calls, self._shows_people)
        self._prepare(rows, unchanged)
        assert self._clip is not None
        options = {**self.arguments, "conditioning": self._conditioning} if self._conditioning.branches else None
        predicted = self.unet(
            torch.cat([calls[each.call].latents for each in rows]),
            _timesteps([calls[each.call] for each in rows]),
            encoder_hidden_states=self._clip.values,
            encoder_attention_mask=self._clip.mask,
            class_labels=self._pooled,
            cross_attention_kwargs=options,
            return_dict=False,
        )[0]
        parts = predicted.split([len(each.strength) for each in rows])
        return [
            call.guidance.combine(
                [part for each, part in zip(rows, parts, strict=True) if each.call == number], call.strength != 0
            )
            for number, call in enumerate(calls)
        ]

    def _is_unchanged(self, strengths: Sequence[Tensor]) -> bool:
        """Return whether these are the previous step's tensors, unmodified. Comparing values would wait for the device.

        Inference tensors have no version counter, and count as changed.
        """
        last = self._last
        self._last = [(each, None if each.is_inference() else each._version) for each in strengths]
        return len(last) == len(strengths) and all(
            version is not None and before[0] is each and before[1] == version
            for before, (each, version) in zip(last, self._last, strict=True)
        )

    def _prepare(self, rows: Sequence[_Rows], unchanged: bool) -> None:
        before = self._prepared_for
        if len(before) == len(rows) and all(
            old.inputs is new.inputs
            and old.which == new.which
            and (unchanged or (len(old.strength) == len(new.strength) and torch.equal(old.strength, new.strength)))
            for old, new in zip(before, rows, strict=True)
        ):
            return
        self._clip, conditioning = stack(rows)
        self._pooled = pooled_text(self.unet, self._clip, conditioning.branches)
        # Cached keys and values may depend on the strength through LoRA, so a new strength needs a new cache.
        self._conditioning = prepare(self.unet, conditioning)
        self._prepared_for = [replace(each, strength=each.strength.clone()) for each in rows]


def _rows_of(calls: Sequence[NoisyPictures], shows_people: Sequence[bool]) -> list[_Rows]:
    """Return the passes of all calls, those without people first, so that these skip the identity branch."""
    rows = [
        _Rows(number, which, call.inputs, call.strength)
        for number, call in enumerate(calls)
        for which in call.guidance.passes(shows_people[number])
    ]
    return sorted(rows, key=lambda each: each.which)  # False before True


def _timesteps(rows: Sequence[NoisyPictures]) -> Tensor:
    """Return the timestep of one call, or one timestep for each row of several calls."""
    if all(each is rows[0] for each in rows):
        return rows[0].timestep
    return torch.cat([each.timestep.reshape(1).expand(len(each.latents)) for each in rows])


def stack(rows: Sequence[_Rows]) -> tuple[Tokens, Conditioning]:
    """Return CLIP's tokens and the conditioning of one denoiser call over all rows."""
    sides = [each.inputs.text if each.which[0] else each.inputs.negative for each in rows]
    clip = join([side[0] for side in sides])
    branches = {name: join([side[1][name] for side in sides]) for name in sides[0][1]}
    if not any(each.shows_people for each in rows):
        return clip, Conditioning(branches)
    scales = torch.cat([each.strength if each.shows_people else torch.zeros_like(each.strength) for each in rows])
    people = _aligned([each.inputs for each in rows], [len(each.strength) for each in rows])
    branches[VISION] = join([each.tokens for each in people])
    groups = {VISION: torch.cat([each.groups for each in people])} if people[0].most > 1 else {}
    regions = {} if people[0].regions is None else {VISION: torch.cat([each.regions for each in people])}
    scale = layer_scales(scales, rows[0].inputs.factors)
    return clip, Conditioning(branches, {VISION: scale}, regions=regions, groups=groups)


@dataclass(frozen=True, eq=False)
class _People:
    """The people of some pictures, at most `most` in each: their tokens, which of them each picture has, and where."""

    most: int
    tokens: Tokens
    groups: Tensor
    regions: Any  # a tensor, or None


def _aligned(inputs: Sequence[Inputs], counts: Sequence[int]) -> list[_People]:
    """Return the people of each of the inputs, with as many places and tokens for a person in all of them.

    counts: the number of pictures of each. Absent people, and all of a picture without people, are masked.
    """
    most = max(1 if each.groups is None else each.groups.shape[1] for each in inputs)
    like = next(each.vision for each in inputs if each.vision is not None)
    lengths = [
        each.vision.values.shape[1] // (1 if each.groups is None else each.groups.shape[1])
        for each in inputs
        if each.vision is not None
    ]
    made: dict[int, _People] = {}  # the passes of a call share its inputs
    for each, count in zip(inputs, counts, strict=True):
        if id(each) not in made:
            made[id(each)] = _padded(each, count, most, max(lengths), like)
    return [made[id(each)] for each in inputs]


def _padded(inputs: Inputs, count: int, most: int, longest: int, like: Tokens) -> _People:
    """Return the people of one call's pictures with `most` places of `longest` tokens each."""
    device = like.values.device
    groups = torch.zeros(count, most, dtype=torch.bool, device=device)
    regions = inputs.regions
    if regions is not None:
        regions = F.pad(regions, (0, 0, 0, 0, 0, max(0, most - regions.shape[1])))
    if inputs.vision is None:
        values = like.values.new_zeros(count, most * longest, like.values.shape[2])
        return _People(
            most, Tokens(values, torch.zeros(values.shape[:2], dtype=torch.bool, device=device)), groups, regions
        )
    people = 1 if inputs.groups is None else inputs.groups.shape[1]
    groups[:, :people] = True if inputs.groups is None else inputs.groups
    values, mask = inputs.vision.values, inputs.vision.mask
    if values.shape[1] == most * longest:
        return _People(most, inputs.vision, groups, regions)
    length = values.shape[1] // people
    mask = torch.ones(values.shape[:2], dtype=torch.bool, device=device) if mask is None else mask
    values = F.pad(values.unflatten(1, (people, length)), (0, 0, 0, longest - length, 0, most - people)).flatten(1, 2)
    mask = F.pad(mask.unflatten(1, (people, length)), (0, longest - length, 0, most - people)).flatten(1, 2)
    return _People(most, Tokens(values, mask), groups, regions)


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
