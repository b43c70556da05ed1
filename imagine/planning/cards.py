"""Describe the devices to plan for: their speed and their memory beside tensors; and parse speeds and sizes.

The speeds of cards are the makers' figures for dense half-precision products with float32 accumulation, from NVIDIA's
datasheets and its white papers on the Ampere and Ada architectures. A network never reaches them: `UTILISATION` is the
share that stock diffusers networks are assumed to reach, unless a speed is given (`--flops`) or measured on this
machine.
"""

import re
import time
from dataclasses import dataclass

from imagine.errors import ConfigError

GIB = 2**30
UTILISATION = 0.4  # of a card's published speed; an assumption, which every plan states
# Bytes per second from host memory to a card, over PCIe 4 with 16 lanes in practice; an assumption.
BUS_BANDWIDTH = 12e9

# The memory of a card beside tensors: the driver's context, work space of convolutions, and memory fragmentation.
RESERVE = 0.6 * GIB
SLACK = 0.03  # of everything else


CARDS = {  # FLOP per second in half precision
    "t4": 65e12,
    "v100": 125e12,
    "rtx3060": 25.5e12,
    "rtx3090": 71e12,
    "rtx4060ti": 44e12,
    "rtx4090": 165e12,
    "l4": 121e12,
    "l40s": 362e12,
    "a100": 312e12,
    "h100": 989e12,
}
# Bytes per second between a card's memory and its processors, from the same sheets; they bound how fast weights in
# fewer bits can be unpacked.
MEMORY_BANDWIDTH = {
    "t4": 320e9, "v100": 900e9, "rtx3060": 360e9, "rtx3090": 936e9, "rtx4060ti": 288e9, "rtx4090": 1008e9, "l4": 300e9,
    "l40s": 864e9, "a100": 1555e9, "h100": 3350e9,
}  # fmt: skip
USUAL_BANDWIDTH = 900e9  # where the device is not in the table; an assumption
DEFAULT_CARDS = (
    "rtx3060",
    "rtx3090",
    "rtx4090",
    "a100",
    "h100",
)  # plans give times for these cards if no device is given
THIS_MACHINE = "here"


@dataclass(frozen=True)
class Speed:
    """The speed that networks reach on a device, in FLOP per second, and the source of this number."""

    flops: float
    how: str
    bandwidth: float = USUAL_BANDWIDTH  # bytes per second of the device's memory


def speeds(device: str | None, flops: str | None, half: bool) -> dict[str, Speed]:
    """Return the speeds to plan with, by name: the given speed, the given device's, or those of a few known cards.

    In float32 (not `half`) cards are assumed to be four times as slow. Raises ConfigError for an unknown device.
    """
    if flops is not None:
        return {flops: Speed(read_flops(flops), "as given with --flops")}
    if device == THIS_MACHINE:
        return {THIS_MACHINE: measured_speed(half)}
    if device is not None and device not in CARDS:
        raise ConfigError(
            f"There is no device {device!r}: choose from {', '.join(CARDS)}, {THIS_MACHINE}, or use --flops."
        )
    share = UTILISATION * (1 if half else 0.25)
    how = f"{share:.0%} of the card's published half-precision speed, an assumption"
    names = [device] if device else DEFAULT_CARDS
    return {name: Speed(CARDS[name] * share, how, MEMORY_BANDWIDTH[name]) for name in names}


def measured_speed(half: bool, side: int = 1536) -> Speed:
    """Measure a matrix product on this machine, on its accelerator if it has one: the best of four runs."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    dtype = torch.bfloat16 if half else torch.float32
    left = torch.ones(side, side, dtype=dtype, device=device or "cpu")
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        product = left @ left
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    word = "bf16" if half else "fp32"
    return Speed(2 * side**3 / best, f"a product of {side} x {side} matrices in {word}, measured on this machine")


def read_flops(text: str) -> float:
    """Parse a speed such as "300T", in FLOP per second. Raises ConfigError for any other text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GTP])", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"--flops {text} is not a speed: write FLOP per second as in 300T or 0.5P.")
    return float(found[1]) * {"G": 1e9, "T": 1e12, "P": 1e15}[found[2].upper()]


def read_size(text: str) -> int:
    """Parse an amount of memory such as "12GB" or "23034MiB" and return bytes; a GB is 2**30 and an MB 2**20.

    Raises ConfigError for any other text.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(G|GB|GiB|M|MB|MiB)", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"--fit {text} is not an amount of memory: write it as in 12GB.")
    return int(float(found[1]) * (GIB if found[2].upper().startswith("G") else 2**20))


def with_reserve(tensors: float) -> int:
    """Return the bytes of memory that a card needs to hold `tensors` bytes of tensors."""
    return int(tensors * (1 + SLACK) + RESERVE)
