"""Devices to plan for: how fast they are, what they hold beside tensors, and how people write speeds and sizes.

Speeds of cards are the makers' figures for dense half-precision products summed in float32; the sources are NVIDIA's
data sheets and its white papers on the Ampere and Ada architectures. A network never reaches them: `UTILISATION` is the
share that stock diffusers networks are assumed to reach, unless a speed is given (`--flops`) or measured here.
"""

import re
import time
from dataclasses import dataclass

from imagine.errors import ConfigError

GIB = 2**30
UTILISATION = 0.4  # of a card's published speed; an assumption, and every plan says so
BUS_BANDWIDTH = (
    12e9  # bytes a second from the computer's memory to a card, over PCIe 4 with 16 lanes in practice; an assumption
)

# What a card holds beside tensors: the driver's context, work space of convolutions, and blocks lost between tensors.
RESERVE = 0.6 * GIB
SLACK = 0.03  # of everything else


CARDS = {  # FLOP a second in half precision
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
DEFAULT_CARDS = (
    "rtx3060",
    "rtx3090",
    "rtx4090",
    "a100",
    "h100",
)  # what times are given for where nobody names a device
THIS_MACHINE = "here"


@dataclass(frozen=True)
class Speed:
    """FLOP a second that networks reach on a device, and how that is known."""

    flops: float
    how: str


def speeds(device: str | None, flops: str | None, half: bool) -> dict[str, Speed]:
    """The speeds to plan with, by name: a device's, a given one, or those of a few known cards.

    In float32 (not `half`) cards are taken to be four times as slow. Raises ConfigError for an unknown device.
    """
    if flops is not None:
        return {flops: Speed(read_flops(flops), "as given with --flops")}
    if device == THIS_MACHINE:
        return {THIS_MACHINE: measured_speed(half)}
    if device is not None and device not in CARDS:
        raise ConfigError(
            f"There is no device {device!r}: choose from {', '.join(CARDS)}, {THIS_MACHINE}, or give --flops."
        )
    share = UTILISATION * (1 if half else 0.25)
    how = f"{share:.0%} of the card's published half-precision speed, an assumption"
    return {name: Speed(CARDS[name] * share, how) for name in ([device] if device else DEFAULT_CARDS)}


def measured_speed(half: bool, side: int = 1536) -> Speed:
    """Measure a matrix product on this machine: the best of four, on its accelerator if it has one."""
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
    """Read a speed such as "300T" (FLOP a second). Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GTP])", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"--flops {text} is not a speed: write FLOP a second as in 300T, or 0.5P.")
    return float(found[1]) * {"G": 1e9, "T": 1e12, "P": 1e15}[found[2].upper()]


def read_size(text: str) -> int:
    """Read an amount of memory such as "12GB" or "23034MiB" in bytes: GB are 2**30, MB 2**20. ConfigError otherwise."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(G|GB|GiB|M|MB|MiB)", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"--fit {text} is not an amount of memory: write it as in 12GB.")
    return int(float(found[1]) * (GIB if found[2].upper().startswith("G") else 2**20))


def with_reserve(tensors: float) -> int:
    """Bytes that a card needs for so many bytes of tensors."""
    return int(tensors * (1 + SLACK) + RESERVE)
