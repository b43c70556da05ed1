"""Pairs for review tests, as a build gives them to reviewers, with tiny pictures."""

import io

from PIL import Image

from data_synth.records import Candidate, Measures, Pair, Reference, TargetSpec


def picture(colour: tuple[int, int, int], kind: str = "PNG", side: int = 8) -> bytes:
    """Return a small picture file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, format=kind)
    return file.getvalue()


def pair(number: int, prompt: str = "", target: bytes = b"", reference: bytes = b"") -> Pair:
    """Return pair `number`, with the key "p0007-0-0-1" for 7; equal arguments give equal pairs."""
    key = f"p{number:04d}"
    caption = f"person {number} in a garden"
    spec = TargetSpec(
        f"{key}-0", key, caption, prompt or f"person {number} smiling on a beach", {"expression": "smiling"}
    )
    return Pair(
        Reference(key, reference or picture((number % 256, 0, 0), "JPEG")),
        spec,
        Candidate(f"{key}-0-0-1", spec.key, target or picture((0, number % 256, 9)), round=1),
        Measures(faces=1, similarity=0.5, difference=0.3, attributes={"expression": "neutral"}),
    )


def pairs(count: int) -> list[Pair]:
    """Return pairs 0, 1, 2, ..."""
    return [pair(number) for number in range(count)]
