"""Pictures as users really give them, written byte by byte where no library can write them."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms


def gradient(width: int = 96, height: int = 64) -> Image.Image:
    """Return a picture with red growing to the right, green growing downwards and constant blue; any turn shows."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 90)], axis=-1).astype(np.uint8))


def png_header_only(path: Path, width: int, height: int) -> Path:
    """Write a PNG that claims a size and holds almost nothing, like a decompression bomb."""
    path.write_bytes(_png(width, height, depth=8, colour=2, raw=b"\0" * 64))
    return path


def deep_png(path: Path, values: np.ndarray[Any, Any]) -> Path:
    """Write a 16-bit PNG, grey (H, W) or RGB (H, W, 3), from values 0 to 65535."""
    rows = values.astype(">u2").reshape(values.shape[0], -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    path.write_bytes(_png(values.shape[1], values.shape[0], depth=16, colour=0 if values.ndim == 2 else 2, raw=raw))
    return path


def swapped_profile() -> bytes:
    """Return a colour profile in which red and blue are swapped, so that its use is visible."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def heic(path: Path) -> Path:
    """Write the first bytes of an iPhone photo."""
    path.write_bytes(struct.pack(">I", 24) + b"ftypheic" + b"\0\0\0\0mif1heic" + b"\0" * 200)
    return path


def _png(width: int, height: int, depth: int, colour: int, raw: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
