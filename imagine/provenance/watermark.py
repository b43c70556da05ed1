"""An invisible watermark of 32 bits in the pixels, and its detector.

The networks are RivaGAN's (Zhang et al., arXiv 1909.01285), from the files in the package `invisible-watermark` 0.2.0;
onnxruntime runs them. The 32 bits are one of four code words, any two of which differ in 16 bits, so that up to five
wrong bits are corrected. The word says who is shown, as the record does: nobody, people with a recorded consent, or
people without. A mark that has to survive does not suffice for more.

Measured numbers, and where the mark is not reliable, stand in docs/provenance.md.
"""

import hashlib
import importlib
import importlib.util
import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagine.errors import WeightsError

PACKAGE = "imwatermark"
SHA256 = {
    "rivagan_encoder.onnx": "66bc7814fadac7d686105c8ab26c6cf2cc8e40deb83e67bb6ef5b9de9b8ece0d",
    "rivagan_decoder.onnx": "6b006690cf352fa50a91a0b6d6241dbcded0a9957969e2c0665cf9a7011b3880",
}
MEANINGS = ("no person", "recorded", "not recorded")  # the consent of the people shown, by code word
BITS = 32
MOST_WRONG = 5  # wrong bits up to which a code word is accepted
GOOD = 2  # wrong bits in the saved picture up to which no stronger mark is tried
STRENGTHS = (1.0, 1.5, 2.0)  # factors on the change that the network makes
RELIABLE_SIDE = 256  # pixels of the shorter side from which the mark is on by default
MOST_PIXELS = 4_200_000  # of a picture that is marked: the networks need about 1 kB of memory for each
_THRESHOLD = 0.52  # of the decoder's outputs, as in the package
_SCRAMBLE = 0x5A7E31C9  # any word with as many ones as zeros
_lock = threading.Lock()


@dataclass(frozen=True)
class Watermarked:
    """A marked picture, its wrong bits as read back from these pixels, and the strength that was needed."""

    image: Image.Image
    wrong_bits: int
    strength: float


@dataclass(frozen=True)
class Reading:
    """What the detector read: whether a code word was found, what it means, and how many of its bits were wrong."""

    found: bool
    consent: str
    wrong_bits: int


def is_installed() -> bool:
    """Return whether the networks' files and onnxruntime are installed."""
    return all(importlib.util.find_spec(name) is not None for name in (PACKAGE, "onnxruntime"))


def is_reliable(size: tuple[int, int]) -> bool:
    """Return whether the mark is reliable in a picture of this width and height."""
    return min(size) >= RELIABLE_SIDE and size[0] * size[1] <= MOST_PIXELS


def code_word(meaning: str) -> NDArray[np.float32]:
    """Return the 32 bits for one of MEANINGS: a row of the Hadamard matrix, exchanged at the ones of a fixed word."""
    row = MEANINGS.index(meaning) + 1
    parity = [bin(row & place).count("1") & 1 for place in range(BITS)]
    scramble = [_SCRAMBLE >> place & 1 for place in range(BITS)]
    return np.array([one ^ other for one, other in zip(parity, scramble, strict=True)], np.float32)


def add_watermark(image: Image.Image, meaning: str) -> Watermarked | None:
    """Return the picture with the mark for `meaning`, as weak as can be read back; None if even the strongest cannot.

    Raises WeightsError if the networks' files are not those that were tested.
    """
    bits, pixels = code_word(meaning), _frame(image)
    marked = _run("rivagan_encoder.onnx", {"frame": pixels, "data": bits[None]})
    best: Watermarked | None = None
    for strength in STRENGTHS:
        changed = np.clip(pixels + strength * (marked - pixels), -1, 1)
        picture = Image.fromarray(np.rint((changed[0, :, 0].transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8))
        wrong = int((_read_bits(picture) != bits).sum())
        if best is None or wrong < best.wrong_bits:
            best = Watermarked(picture, wrong, strength)
        if best.wrong_bits <= GOOD:
            break
    return best if best is not None and best.wrong_bits <= MOST_WRONG else None


def read_watermark(image: Image.Image) -> Reading:
    """Return what the detector reads in a picture. It also takes 1 in 5,900 random words for a code word."""
    bits = _read_bits(image.convert("RGB"))
    wrong, meaning = min((int((bits != code_word(each)).sum()), each) for each in MEANINGS)
    return Reading(wrong <= MOST_WRONG, meaning, wrong)


def _read_bits(image: Image.Image) -> NDArray[np.float32]:
    scores = _run("rivagan_decoder.onnx", {"frame": _frame(image)})[0]
    return (scores > _THRESHOLD).astype(np.float32)


def _frame(image: Image.Image) -> NDArray[np.float32]:
    """Return a picture as a film of one frame, (1, 3, 1, height, width), from -1 to 1."""
    pixels = np.asarray(image.convert("RGB"), np.float32) / 127.5 - 1
    return pixels.transpose(2, 0, 1)[None, :, None]


def _run(name: str, inputs: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    with _lock:  # loading twice would waste memory
        session = _session(name)
    result: NDArray[np.float32] = session.run(None, inputs)[0]
    return result


@lru_cache(maxsize=2)
def _session(name: str) -> Any:
    """Load one of the networks after checking its file."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None  # callers ask `is_installed` first
    path = Path(spec.origin).parent / name
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        raise WeightsError(f"{name} of invisible-watermark is not the file that was tested: install version 0.2.0.")
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
