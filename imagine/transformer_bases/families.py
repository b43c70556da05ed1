"""The diffusion transformers that take an adapter: where each attends to image tokens, and which of these are drawn.

A family is one entry of `FAMILIES`. The adapter is the same for all: at every site, a branch reads what the attention
reads, and its output is added to what the attention returns. It acts on the target tokens only, which are those of the
picture that is drawn. Text tokens, padding and the tokens of native reference images stay untouched, so that their
keys and values can be cached, and so that native references work beside the adapter.

    image site    the attention gets image and text tokens apart, and returns (image, text)
    joint site    the attention gets one sequence of text and image tokens, and returns it

The orders of tokens are those of the models and pipelines of diffusers 0.42.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from torch import Tensor, nn

from imagine.errors import ConfigError, WeightsError


@dataclass(frozen=True)
class TargetTokens:
    """The target tokens of one forward pass: the batch size, and their places at both kinds of sites."""

    rows: int
    image: slice  # among the image tokens
    joint: slice  # in the joint sequence


@dataclass(frozen=True)
class Sites:
    """Sites of one kind: attention modules called `attention` in the blocks of the list `blocks`."""

    blocks: str
    attention: str = "attn"
    joint: bool = False


# How the pipelines of a family compute guidance: the transformer runs twice in a step, first with the prompt; or both
# halves are one batch.
Guidance = Literal["two passes", "negative first", "positive first"]


@dataclass(frozen=True)
class TransformerFamily:
    """One kind of diffusion transformer.

    title: the name in sentences. model: the class in diffusers. sites: where image tokens meet the rest.
    kwargs: the argument of `forward` that holds the attention arguments of a call, to which the conditioning is added.
    target: finds the target tokens from the arguments of `forward` by name.
    width: the width of the image tokens, from the transformer's config. guidance: how its pipelines compute guidance.
    """

    title: str
    model: str
    sites: tuple[Sites, ...]
    target: Callable[[Any, Mapping[str, Any]], TargetTokens]
    width: Callable[[Any], int]
    kwargs: str = "joint_attention_kwargs"
    guidance: Guidance = "two passes"


@dataclass(frozen=True)
class Site:
    """One attention module that a branch is added to, and whether it sees the joint sequence."""

    name: str
    attention: Any
    joint: bool


def family_of(transformer: nn.Module) -> TransformerFamily:
    """Return the family of a transformer. Raises WeightsError if there is none."""
    names = {base.__name__ for base in type(transformer).__mro__}
    for family in FAMILIES:
        if family.model in names:
            return family
    raise WeightsError(
        f"A {type(transformer).__name__} cannot take this adapter: use a transformer of "
        f"{', '.join(family.title for family in FAMILIES[:-1])} or {FAMILIES[-1].title}."
    )


def sites_of(transformer: nn.Module) -> dict[str, Site]:
    """Return the sites of a transformer by module path, in the order in which they compute."""
    found = {}
    for each in family_of(transformer).sites:
        for number, block in enumerate(getattr(transformer, each.blocks)):
            name = f"{each.blocks}.{number}.{each.attention}"
            found[name] = Site(name, getattr(block, each.attention), each.joint)
    return found


def heads_of(transformer: Any) -> int:
    """Return the number of heads of the first site."""
    return int(next(iter(sites_of(transformer).values())).attention.heads)


def _width(config: Any) -> int:
    return int(config.num_attention_heads * config.attention_head_dim)


# --- where the target tokens are ------------------------------------------------------------------------------------


def _flux(_: Any, given: Mapping[str, Any]) -> TargetTokens:
    """Text first. Native references (Kontext) follow the target and have another first coordinate than 0."""
    states, text = given["hidden_states"], given["encoder_hidden_states"].shape[1]
    length = _count_targets(given["img_ids"], states.shape[1])
    return TargetTokens(len(states), slice(0, length), slice(text, text + length))


def _flux2(transformer: Any, given: Mapping[str, Any]) -> TargetTokens:
    """As FLUX.1, but the klein KV pipeline puts references first, in the step in which it caches their keys."""
    if given.get("kv_cache_mode") != "extract":
        return _flux(transformer, given)
    states, text = given["hidden_states"], given["encoder_hidden_states"].shape[1]
    references, length = int(given.get("num_ref_tokens") or 0), states.shape[1]
    return TargetTokens(len(states), slice(references, length), slice(text + references, text + length))


def _count_targets(ids: Tensor, length: int) -> int:
    """Return how many image tokens belong to the target: those whose first coordinate is 0, which come first."""
    first = (ids[0] if ids.dim() == 3 else ids)[:, 0]
    count = int((first == 0).sum())
    if count == 0 or len(first) != length:
        raise ConfigError(
            f"The img_ids {list(ids.shape)} do not tell the {length} image tokens of the target from references: the "
            "first coordinate must be 0 for the target."
        )
    return count


def _qwen(_: Any, given: Mapping[str, Any]) -> TargetTokens:
    """Text is apart. Native references (Edit) follow the target; img_shapes lists both, the target first."""
    states, shapes = given["hidden_states"], given["img_shapes"]
    lengths = {prod(each[0] if isinstance(each, (list, tuple)) and not _is_shape(each) else each) for each in shapes}
    if len(lengths) != 1:
        raise ConfigError("The pictures of one batch must have one size: draw them in separate calls.")
    return TargetTokens(len(states), slice(0, lengths.pop()), slice(0, 0))


def _is_shape(given: Sequence[Any]) -> bool:
    return all(isinstance(each, int) for each in given)


def _z_image(_: Any, given: Mapping[str, Any]) -> TargetTokens:
    """Image first, padded to a multiple of 32, then text."""
    pictures, patch = given["x"], given.get("patch_size") or 2
    if isinstance(pictures[0], (list, tuple)):
        raise ConfigError(
            "Z-Image cannot draw with an adapter and native reference images (omni mode) together: leave one out."
        )
    lengths = {each.shape[-3] * (each.shape[-2] // patch) * (each.shape[-1] // patch) for each in pictures}
    if len(lengths) != 1:
        raise ConfigError("The pictures of one batch must have one size: draw them in separate calls.")
    length = lengths.pop()
    return TargetTokens(len(pictures), slice(0, length), slice(0, length))


def _all_image_tokens(transformer: Any, given: Mapping[str, Any]) -> TargetTokens:
    """All image tokens are the target's."""
    states, patch = given["hidden_states"], int(transformer.config.patch_size)
    length = (states.shape[-2] // patch) * (states.shape[-1] // patch)
    return TargetTokens(len(states), slice(0, length), slice(0, 0))


FAMILIES: tuple[TransformerFamily, ...] = (
    TransformerFamily(
        "FLUX.2", "Flux2Transformer2DModel",
        (Sites("transformer_blocks"), Sites("single_transformer_blocks", joint=True)), _flux2, _width,
    ),
    TransformerFamily(
        "Z-Image", "ZImageTransformer2DModel",
        (Sites("layers", "attention", joint=True),), _z_image, lambda config: int(config.dim),
        guidance="positive first",
    ),
    TransformerFamily(
        "Qwen-Image", "QwenImageTransformer2DModel",
        (Sites("transformer_blocks"),), _qwen, _width, kwargs="attention_kwargs",
    ),
    TransformerFamily(
        "FLUX.1", "FluxTransformer2DModel",
        (Sites("transformer_blocks"), Sites("single_transformer_blocks", joint=True)), _flux, _width,
    ),
    TransformerFamily(
        "Stable Diffusion 3", "SD3Transformer2DModel",
        (Sites("transformer_blocks"),), _all_image_tokens, _width, guidance="negative first",
    ),
    TransformerFamily(
        "Sana", "SanaTransformer2DModel",
        (Sites("transformer_blocks", "attn2"),), _all_image_tokens, _width, kwargs="attention_kwargs",
        guidance="negative first",
    ),
    TransformerFamily(
        "PixArt", "PixArtTransformer2DModel",
        (Sites("transformer_blocks", "attn2"),), _all_image_tokens, _width, kwargs="cross_attention_kwargs",
        guidance="negative first",
    ),
)  # fmt: skip
