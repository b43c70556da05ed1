"""The order of the images and the random numbers of image number n: a resumed run only needs to know its position.

Every random number here is a function of (seed, purpose, image number, column), computed with a hash instead of a
generator (splitmix64; Steele, Lea, Flood 2014). So there is no state to save, a batch can be split into micro-batches
or among processes without changing any number, and CPU and GPU give the same numbers.
"""

import functools
import hashlib
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


GOLDEN_RATIO = 0.6180339887498949  # multiples of it modulo 1 are evenly spread for any count


def derive_seed(seed: int, purpose: str, number: int = 0) -> int:
    """Return a non-negative 63-bit seed that is a hash of (seed, purpose, number)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, purpose: str, images_seen: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator for one batch, for code that needs one; prefer `normals` and `uniforms`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, images_seen))


def uniforms(
    seed: int, purpose: str, first: int, size: int, shape: Sequence[int] = (), device: torch.device | str = "cpu"
) -> Tensor:
    """Return (size, *shape) float32 in [0, 1); row i depends only on image number first + i."""
    bits = _bits(seed, purpose, first, size, math.prod(shape), device)
    return _high(bits).mul_(2.0**-24).view(size, *shape)


def normals(
    seed: int, purpose: str, first: int, size: int, shape: Sequence[int] = (), device: torch.device | str = "cpu"
) -> Tensor:
    """Return (size, *shape) float32 standard normal (Box-Muller); row i depends only on image number first + i."""
    columns = math.prod(shape)
    bits = _bits(seed, purpose, first, size, (columns + 1) // 2, device)
    radius = _high(bits).add_(1).mul_(2.0**-24).log_().mul_(-2).sqrt_()  # the argument is in (0, 1], never 0
    angle = ((bits >> 16) & 0xFFFFFF).float().mul_(2 * math.pi * 2.0**-24)
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
    return both[:, :columns].reshape(size, *shape)


def chance(seed: int, purpose: str, first: int, size: int, rate: float, device: torch.device | str = "cpu") -> Tensor:
    """Return (size,) bool, True with probability `rate`, for example for the images that drop a condition."""
    return uniforms(seed, purpose, first, size, device=device) < rate


def choices(
    seed: int, purpose: str, first: int, size: int, weights: Sequence[float], device: torch.device | str = "cpu"
) -> Tensor:
    """Return (size,) int64: for each image the index of a weight, drawn in proportion to the weights."""
    edges = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    edges = (edges / edges[-1])[:-1].float().to(device)
    return torch.bucketize(uniforms(seed, purpose, first, size, device=device), edges, right=True)


def spread(blocks: Tensor, shares: Sequence[float]) -> Tensor:
    """Return for each block number (B,) which of the shares it belongs to, or len(shares) for none of them.

    Shares sum to at most 1. The order is regular, not random: of two equal shares, every second block is in each.
    """
    edges = torch.tensor(list(shares), dtype=torch.float64).cumsum(0)
    return torch.bucketize((blocks.double() * GOLDEN_RATIO) % 1, edges, right=True)


def shuffled(seed: int, purpose: str, first: int, size: int, population: int) -> Tensor:
    """Return (size,) int64 on the CPU: the item, of `population`, of each image; every epoch has a new order."""
    numbers = torch.arange(first, first + size)
    epochs = numbers // population
    out = torch.empty_like(numbers)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        out[here] = _order(seed, purpose, epoch, population)[numbers[here] % population]
    return out


def prefetched(
    make: Callable[..., T], calls: Iterable[tuple[int, int]], depth: int
) -> Generator[tuple[int, T], None, None]:
    """Yield (images_seen, make(images_seen, size)) for each call in order, made up to `depth` ahead in one thread."""
    if not depth:
        for call in calls:
            yield call[0], make(*call)
        return
    worker = ThreadPoolExecutor(1, thread_name_prefix="batches")
    waiting: deque[tuple[int, Future[T]]] = deque()
    try:
        for call in calls:
            waiting.append((call[0], worker.submit(make, *call)))
            if len(waiting) > depth:
                start, future = waiting.popleft()
                yield start, future.result()
        while waiting:
            start, future = waiting.popleft()
            yield start, future.result()
    finally:
        worker.shutdown(wait=True, cancel_futures=True)


def to_device(record: Any, device: torch.device) -> Any:
    """Return the record with all its tensors on `device`, also those in dataclasses, dicts, lists and tuples."""
    if isinstance(record, Tensor):
        return record.to(device, non_blocking=True)
    if is_dataclass(record) and not isinstance(record, type):
        moved = {field.name: to_device(getattr(record, field.name), device) for field in fields(record) if field.init}
        return replace(record, **moved)
    if isinstance(record, dict):
        return {name: to_device(value, device) for name, value in record.items()}
    if isinstance(record, tuple) and hasattr(record, "_fields"):
        return type(record)(*(to_device(value, device) for value in record))
    if isinstance(record, (list, tuple)):
        return type(record)(to_device(value, device) for value in record)
    return record


@functools.lru_cache(maxsize=16)
def _order(seed: int, purpose: str, epoch: int, population: int) -> Tensor:
    return torch.randperm(population, generator=generator(seed, purpose, epoch))


def _bits(seed: int, purpose: str, first: int, size: int, columns: int, device: torch.device | str) -> Tensor:
    """Return (size, columns) int64 with 64 random bits each: a hash of the column and the hash of the row."""
    rows = _mixed(torch.arange(first + 1, first + size + 1, device=device) * _GOLDEN + derive_seed(seed, purpose))
    return _mixed(rows[:, None] + torch.arange(1, columns + 1, device=device) * _GOLDEN)


def _high(bits: Tensor) -> Tensor:
    return ((bits >> 40) & 0xFFFFFF).float()


def _mixed(x: Tensor) -> Tensor:
    """Apply splitmix64's finaliser to int64. Products wrap; >> copies the sign bit, so the copies are masked out."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed 64-bit numbers
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
