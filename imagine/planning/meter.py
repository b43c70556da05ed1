"""Count the memory and the arithmetic of a computation from its tensors, also on torch's meta device.

A `Meter` intercepts every operation below autograd, so that it includes backward passes, recomputation and the tensors
that autograd saves. It does not count tensors that exist before it starts (weights, gradients). It counts tensors that
are made inside its block, until they are freed. The count leaves out the work space of kernels inside one operation and
the fragmentation of the allocator; `cards.RESERVE` accounts for both. `profiled_peak` measures real tensors
independently, from the events of the allocator, and `imagine plan --check` compares the two.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Meter(TorchDispatchMode):
    """Count, inside a `with` block, the `live` and `peak` bytes of its tensors, and `flops` (two per multiply-add)."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._storages: dict[int, Any] = {}  # every storage that was seen and is alive, by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        for tensor in _tensors((args, options)):
            self._track(tensor, 0)  # a tensor from outside the block does not count
        out = func(*args, **options)
        for tensor in _tensors(out):
            self._track(tensor, tensor.untyped_storage().nbytes())
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += int(formula(*args, **options, out_val=out))
        return out

    def _track(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._storages:
            return
        self._storages[address] = weakref.ref(storage, partial(self._untrack, address, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _untrack(self, address: int, size: int, _: object) -> None:
        del self._storages[address]
        self.live -= size


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@contextmanager
def planned_kernels(autocast: torch.dtype | None = None) -> Iterator[None]:
    """Make operations on the meta device use the same kernels as on a real device.

    On the meta device torch decomposes attention, with all scores in memory; real devices use one fused operation.
    `autocast` also casts as torch.autocast does on CUDA, which does not exist for the meta device: products in that
    precision, normalisation and the loss in float32 (https://docs.pytorch.org/docs/stable/amp.html, "Autocast Op
    Reference").
    """
    replaced: dict[str, Callable[..., Any]] = {"scaled_dot_product_attention": _attention}
    if autocast is not None:
        for name in ("linear", "conv2d"):
            replaced[name] = partial(_cast_first, getattr(F, name), autocast)
        replaced["scaled_dot_product_attention"] = partial(_cast_first, _attention, autocast)
        for name in ("group_norm", "layer_norm", "rms_norm", "mse_loss"):
            replaced[name] = partial(_cast_first, getattr(F, name), torch.float32)
    with _replaced(replaced):
        yield


@contextmanager
def _replaced(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace functions of torch.nn.functional temporarily; torch's own composite functions then use them too."""
    before = {name: getattr(F, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(F, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)


def _cast_first(function: Callable[..., Any], dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Run fused attention through the one operator whose shape function torch has for every device."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out


def profiled_peak(work: Callable[[], Any]) -> int:
    """Run `work` on the CPU and return the peak of the bytes that torch's allocator allocated for it.

    The numbers come from the events that the allocator reports to torch.profiler; earlier allocations do not count.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    recorded: Any = profile.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: int(event.start_ns())):
        live += int(event.nbytes())
        peak = max(peak, live)
    return peak


def weight_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def parameter_count(module: torch.nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
