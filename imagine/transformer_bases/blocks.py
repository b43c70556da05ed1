"""Limit the identity branch to some blocks of a transformer: the argument `identity_blocks` of a call.

`imagine.pipeline.controls` does the same for U-Nets. A transformer has one resolution and no sides. Its blocks stand in
lists, and what tells them apart is when they compute, and in FLUX.1 and FLUX.2 whether they keep image and text apart
("double") or join them ("single").
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from imagine.errors import ConfigError
from imagine.pipeline.controls import ALL, Blocks, Factors, chosen_preset, strengths_of
from imagine.transformer_bases.families import sites_of

THIRDS = ("early", "middle", "late")


def block_factors(transformer: nn.Module, branched: Sequence[str], blocks: Blocks) -> Factors | None:
    """Return the factor on the identity strength for every site; None if all factors are 1.

    branched: the sites with a branch, in the order in which they compute. blocks: a preset (see `presets`), or a
    mapping from lists of blocks, by their name in the transformer, to a number, one number for each block with a
    branch, or a mapping from "block_N" to numbers. What is not named gets 0. Raises ConfigError, listing the valid
    names, for one that has no branch.
    """
    if isinstance(blocks, str) and blocks == ALL:
        return None
    places = _places(branched)
    if not isinstance(blocks, Mapping):
        example = f"{{{next(iter(places))!r}: {{'block_0': 1.0}}}}"
        return dict.fromkeys(chosen_preset(blocks, presets(transformer, branched), example), 1.0)
    given = {name: _per_block(name, value, places.get(name, {})) for name, value in blocks.items()}
    return {site: factor for site, factor in strengths_of(given, places, "branch").items() if factor}


def presets(transformer: nn.Module, branched: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the presets besides "all" that apply to this transformer, with the sites of each.

    "early", "middle" and "late" are the thirds of the sites with a branch. FLUX.1 and FLUX.2 also have "double" and
    "single".
    """
    count, thirds = len(branched), len(THIRDS)
    edges = [round(number * count / thirds) for number in range(thirds + 1)]
    named = {name: tuple(branched[edges[i] : edges[i + 1]]) for i, name in enumerate(THIRDS)}
    sites = sites_of(transformer)
    if len({site.joint for site in sites.values()}) > 1:
        named["double"] = tuple(name for name in branched if not sites[name].joint)
        named["single"] = tuple(name for name in branched if sites[name].joint)
    return {name: chosen for name, chosen in named.items() if chosen}


def _places(branched: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return the sites by the list of their block and "block_N"."""
    places: dict[str, dict[str, list[str]]] = {}
    for site in branched:
        blocks, number, _ = site.split(".", 2)
        places.setdefault(blocks, {})[f"block_{number}"] = [site]
    return places


def _per_block(name: str, value: Any, blocks: Mapping[str, Any]) -> Any:
    """Return a list of strengths as a mapping from "block_N"; another value as it is."""
    if not isinstance(value, (list, tuple)) or not blocks:
        return value
    if len(value) != len(blocks):
        raise ConfigError(
            f"identity_blocks[{name!r}] has {len(value)} strengths for {len(blocks)} blocks with a branch: give one "
            "for each, or one number for all."
        )
    return dict(zip(blocks, value, strict=True))
