"""Which marks a picture gets; each has a switch, and the picture records how the switches stood."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ON, OFF = "on", "off"


@dataclass(frozen=True)
class Marks:
    """The switches of the marks.

    settings: the settings as text that other programs read, and as JSON. prompt: whether the prompts are part of it.
    credentials: signed content credentials (C2PA). watermark: an invisible watermark in the pixels; None: only where it
    is reliable (`watermark.RELIABLE_SIDE`).
    """

    settings: bool = True
    prompt: bool = True
    credentials: bool = True
    watermark: bool | None = None

    @classmethod
    def none(cls) -> "Marks":
        """Return the switches with every mark off."""
        return cls(False, False, False, False)


@dataclass(frozen=True)
class MarkedPicture:
    """The bytes of a picture file with its marks.

    applied: how each switch stood and what became of it, such as {"settings": "on", "credentials": "not installed"}.
    notes: one sentence for each mark that was asked for, or is on by default, and could not be made.
    """

    data: bytes = field(repr=False)
    applied: Mapping[str, Any]
    notes: tuple[str, ...] = ()
