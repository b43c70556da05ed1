"""Pass the conditioning of a call from a transformer's arguments to its sites.

    transformer(..., joint_attention_kwargs={"conditioning": conditioning})

Only some transformers of diffusers hand such arguments on to their attention. Two hooks on the transformer therefore
open and close a `Pass`, which the hooks of the sites read. It is a context variable, so that it belongs to one forward
pass of one thread; nothing is stored on a module.

Gradient checkpointing computes a block again in the backward pass, when the forward pass is over, and on a GPU in
another thread. The function of diffusers that does so is therefore wrapped (`CarriedCheckpoint`) while an adapter is
attached: a block is computed again with the pass in which it was computed first.
"""

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from imagine.errors import ConfigError
from imagine.records import Conditioning
from imagine.transformer_bases.families import TargetTokens, TransformerFamily, family_of, sites_of

KEY = "conditioning"  # in the attention arguments of a call

# What a call may give: a conditioning, or a function that returns that of a forward pass with so many rows.
Given = Conditioning | Callable[[int], Conditioning | None]


@dataclass(frozen=True)
class Pass:
    """One forward pass: what it is conditioned on, its target tokens, and its timestep as the transformer got it."""

    conditioning: Conditioning
    target: TargetTokens
    timestep: Tensor | None = None
    computed: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what `compute` returned when it was first asked for in this pass."""
        if name not in self.computed:
            self.computed[name] = compute()
        return self.computed[name]


@dataclass(frozen=True)
class _Scope:
    """A forward pass that is under way (without a conditioning: None), and the one that it interrupts."""

    transformer: nn.Module
    current: Pass | None
    outer: "_Scope | None"


_scope: ContextVar[_Scope | None] = ContextVar("imagine_transformer_pass", default=None)


def current_pass() -> Pass | None:
    """Return the pass in which this code runs; None if it has no conditioning."""
    scope = _scope.get()
    return None if scope is None else scope.current


def open_pass(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of a transformer: take the conditioning out of its arguments, and open the pass.

    Raises ConfigError if the conditioning does not fit the batch.
    """
    _scope.set(_Scope(transformer, None, _scope.get()))
    family = family_of(transformer)
    named = _by_name(transformer, args, kwargs)
    attention_kwargs = named.get(family.kwargs)
    if not attention_kwargs or KEY not in attention_kwargs:
        return args, kwargs
    rest = {name: each for name, each in attention_kwargs.items() if name != KEY}
    _open(transformer, family, named, attention_kwargs[KEY])
    if family.kwargs in kwargs:
        return args, {**kwargs, family.kwargs: rest}
    place = _names(type(transformer)).index(family.kwargs)
    return (*args[:place], rest, *args[place + 1 :]), kwargs


def close_pass(transformer: nn.Module, *_: Any) -> None:
    """Forward hook of a transformer, called after errors too: close the pass."""
    scope = _scope.get()
    if scope is not None and scope.transformer is transformer:
        _scope.set(scope.outer)


def _open(transformer: nn.Module, family: TransformerFamily, named: Mapping[str, Any], given: Given) -> None:
    target = family.target(transformer, named)
    conditioning = given if isinstance(given, Conditioning) else given(target.rows)
    if conditioning is None or not conditioning.branches:
        return
    for name, tokens in conditioning.branches.items():
        if len(tokens.values) != target.rows:
            raise ConfigError(
                f"The tokens of {name!r} are for {len(tokens.values)} pictures, but the transformer computes "
                f"{target.rows}: give one row for each."
            )
    timestep = named.get("timestep", named.get("t"))
    if _is_compiled(transformer):
        conditioning = _uniform(transformer, conditioning, target.rows)
    scope = _scope.get()
    assert scope is not None
    _scope.set(_Scope(transformer, Pass(conditioning, target, timestep), scope.outer))
    _carry_checkpoints(transformer)


def _is_compiled(transformer: nn.Module) -> bool:
    site = next(iter(sites_of(transformer)))
    return transformer.get_submodule(site.rpartition(".")[0])._compiled_call_impl is not None


def _uniform(transformer: nn.Module, conditioning: Conditioning, rows: int) -> Conditioning:
    """Return a conditioning in the one form that compiled blocks see, so that no call makes them compile again.

    Strengths are contiguous tensors (rows,), or (sites, rows) where they differ by site, and nothing is cached: the
    entries of a cache differ by site and by step.
    """
    scales: dict[str, Any] = {}
    for name, tokens in conditioning.branches.items():
        scale = conditioning.scales.get(name, 1.0)
        if isinstance(scale, Mapping):
            each = [_row(scale.get(site, 0.0), rows, tokens.values) for site in sites_of(transformer)]
            present = 1.0 if tokens.mask is None else tokens.mask.any(dim=1).float()
            scales[name] = torch.stack(each) * present
        else:
            scales[name] = _row(scale, rows, tokens.values)
    return replace(conditioning, scales=scales, cache=None)


def _row(scale: Any, rows: int, like: Tensor) -> Tensor:
    return torch.as_tensor(scale, dtype=torch.float32, device=like.device).expand(rows).contiguous()


def _names(model: type[nn.Module]) -> list[str]:
    return list(inspect.signature(model.forward).parameters)[1:]


def _by_name(transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_names(type(transformer)), args, strict=False)), **kwargs} if args else dict(kwargs)


# --- gradient checkpointing -----------------------------------------------------------------------------------------


class CarriedCheckpoint:
    """The checkpointing function of a transformer, with which a block is computed again in the pass of its forward."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(_InPass(module, _scope.get()), *args, **kwargs)


class _InPass:
    """A block that is always computed in one pass."""

    def __init__(self, module: Any, scope: _Scope | None) -> None:
        self.module, self.scope = module, scope

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = _scope.set(self.scope)
        try:
            return self.module(*args, **kwargs)
        finally:
            _scope.reset(token)


def _carry_checkpoints(transformer: Any) -> None:
    if getattr(transformer, "gradient_checkpointing", False):
        checkpoint = transformer._gradient_checkpointing_func
        if not isinstance(checkpoint, CarriedCheckpoint):
            transformer.enable_gradient_checkpointing(CarriedCheckpoint(checkpoint))


def restore_checkpoints(transformer: Any) -> None:
    """Give a transformer back its own checkpointing function."""
    checkpoint = getattr(transformer, "_gradient_checkpointing_func", None)
    if isinstance(checkpoint, CarriedCheckpoint):
        enabled = transformer.gradient_checkpointing
        transformer.enable_gradient_checkpointing(checkpoint.checkpoint)
        if not enabled:
            transformer.disable_gradient_checkpointing()
