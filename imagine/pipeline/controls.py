"""Limit the identity branch to a window of denoising steps and to some blocks of the denoiser.

This module turns the call's arguments `identity_window` and `identity_blocks` into factors that `sampling` puts into
the conditioning. Both are plain values that belong to one call, and both multiply `identity_scale`, even if a callback
changes it between steps.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from imagine.adapter.attention import attention_layers
from imagine.errors import ConfigError
from imagine.records import Scale
from imagine.request import finite

ALL = "all"
# InstantStyle (arXiv 2404.02733, section 3.2) found these blocks by experiment; they are valid for SDXL only.
SDXL_PRESETS = {"style": ("up_blocks.0.attentions.1",), "layout": ("down_blocks.2.attentions.1",)}
SDXL_RESOLUTIONS = 3

Blocks = str | Mapping[str, Any]  # a preset's name, or diffusers' form {"down": {"block_2": [0.0, 1.0]}, "mid": 1.0}
Factors = Mapping[str, float]  # attention layer -> factor; a layer that is not named gets 0

_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.\d+")


@dataclass(frozen=True)
class Window:
    """The steps in which the identity branch acts, as fractions of all steps: `start` included, `end` excluded."""

    start: float = 0.0
    end: float = 1.0

    @classmethod
    def read(cls, given: "Window | Sequence[float]") -> "Window":
        """Read a call's identity_window. Raises ConfigError unless 0 <= start <= end <= 1."""
        if isinstance(given, Window):
            return given
        if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 2:
            raise ConfigError(f"identity_window={given!r} must be two fractions of the steps, such as (0.0, 0.8).")
        start, end = (finite("identity_window", share) for share in given)
        if not 0 <= start <= end <= 1:
            raise ConfigError(f"identity_window={given!r} must hold a start and an end with 0 <= start <= end <= 1.")
        return cls(start, end)

    def contains(self, share: float) -> bool:
        """Return whether the identity branch acts in a step that begins after this fraction of all steps."""
        return self.start <= share < self.end

    def steps(self, count: int) -> list[bool]:
        """Return `contains` for each of `count` steps."""
        return [self.contains(number / count) for number in range(count)]


def block_factors(denoiser: nn.Module, blocks: Blocks) -> Factors | None:
    """Return the factor on the identity strength for every attention layer; None if all factors are 1.

    `blocks` is a preset (see `presets`) or diffusers' own mapping, in which a block that is not named gets 0. Its keys
    are sides ("down", "mid", "up"). A value is a number, a list with one number per attention block, or a mapping from
    "block_N" to either. Raises ConfigError, listing the valid names, for a name that this denoiser does not have.
    """
    if blocks == ALL:
        return None
    names = {layer: found[0] for layer in attention_layers(denoiser) if (found := _BLOCK.match(layer))}
    every = list(dict.fromkeys(names.values()))
    if isinstance(blocks, Mapping):
        factors = strengths_of(blocks, _places(every))
    else:
        factors = dict.fromkeys(chosen_preset(blocks, presets(denoiser), "{'down': {'block_1': 1.0}}"), 1.0)
    return {layer: factors[block] for layer, block in names.items() if factors.get(block)}


def chosen_preset(blocks: Any, known: Mapping[str, Sequence[str]], example: str) -> Sequence[str]:
    """Return the blocks of a preset. Raises ConfigError, listing the presets and an example of strengths."""
    if not isinstance(blocks, str) or blocks not in known:
        raise ConfigError(
            f"This denoiser has no identity_blocks {blocks!r}: choose {_listed([ALL, *known])}, or give strengths "
            f"such as {example}."
        )
    return known[blocks]


def presets(denoiser: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the presets besides "all" that apply to this denoiser, with the blocks of each.

    "down", "mid" and "up" are the U-Net's parts. "coarse" holds the blocks at the coarser half of the resolutions that
    have attention, "fine" the other blocks. SDXL also has InstantStyle's "style" and "layout".
    """
    every = list(dict.fromkeys(found[0] for layer in attention_layers(denoiser) if (found := _BLOCK.match(layer))))
    resolutions = len(getattr(denoiser, "down_blocks", ()))
    levels = {block: _level(block, resolutions) for block in every}
    in_use = sorted(set(levels.values()))
    finer = in_use[: len(in_use) // 2]
    named = {
        "coarse": tuple(block for block in every if levels[block] not in finer),
        "fine": tuple(block for block in every if levels[block] in finer),
        **{side: tuple(block for block in every if block.startswith(side)) for side in ("down", "mid", "up")},
    }
    if resolutions == SDXL_RESOLUTIONS and 0 not in in_use:
        named |= {name: blocks for name, blocks in SDXL_PRESETS.items() if set(blocks) <= set(every)}
    return {name: blocks for name, blocks in named.items() if blocks}


def layer_scales(strength: Scale, factors: Factors | None) -> "Scale | Mapping[str, Scale]":
    """Return a branch's strength (one number or one per batch item) in the form of `Conditioning.scales`."""
    if factors is None:
        return strength
    return {layer: strength * factor for layer, factor in factors.items()}


def _level(block: str, resolutions: int) -> int:
    """Return how many times the latent has been halved at a block's resolution."""
    found = _BLOCK.match(block)
    assert found is not None
    if found[2] is None:
        return resolutions - 1
    return int(found[2]) if found[1] == "down" else resolutions - 1 - int(found[2])


def _places(every: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return the U-Net's blocks with attention by side and "block_N"."""
    places: dict[str, dict[str, list[str]]] = {}
    for block in every:
        found = _BLOCK.match(block)
        assert found is not None
        places.setdefault(found[1] or "mid", {}).setdefault(f"block_{found[2] or 0}", []).append(block)
    return places


def strengths_of(
    given: Mapping[str, Any], places: Mapping[str, Mapping[str, Sequence[str]]], what: str = "attention"
) -> dict[str, float]:
    """Return a factor for each named block, with the meaning that diffusers' set_ip_adapter_scale gives the mapping.

    places: side -> "block_N" -> what has a strength there. what: its name in errors. Raises ConfigError for an unknown
    name or a wrong value. diffusers' own function (loaders/unet_loader_utils.py) is not used: it requires attention in
    the middle block and ignores misspelt names.
    """
    _check_known("identity_blocks", given, places, what)
    factors: dict[str, float] = {}
    for side, value in given.items():
        strengths = value if isinstance(value, Mapping) else dict.fromkeys(places[side], value)
        _check_known(f"identity_blocks[{side!r}]", strengths, places[side], what)
        for name, each in strengths.items():
            factors |= _numbers(f"identity_blocks[{side!r}][{name!r}]", each, places[side][name])
    return factors


def _numbers(name: str, value: Any, blocks: Sequence[str]) -> dict[str, float]:
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(given) not in (1, len(blocks)):
        raise ConfigError(
            f"{name} has {len(given)} strengths for {len(blocks)} attention blocks: give one for each block, or one "
            "for all."
        )
    numbers = given * len(blocks) if len(given) == 1 else given
    return {block: finite(name, number) for block, number in zip(blocks, numbers, strict=True)}


def _check_known(name: str, given: Mapping[str, Any], known: Mapping[str, Any], what: str) -> None:
    for each in given:
        if each not in known:
            raise ConfigError(f"{name} names {each!r}, but this denoiser has no {what} there: choose {_listed(known)}.")


def _listed(names: "Sequence[str] | Mapping[str, Any]") -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
