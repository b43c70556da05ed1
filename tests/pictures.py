"""Pictures as users really give them, written byte by byte where no library can write them."""

import io
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


def turned(image: Image.Image, orientation: int, kind: str) -> bytes:
    """Return the bytes of a picture stored with an EXIF orientation, so that a viewer shows `image`.

    kind: a format of Pillow, or TIFF with a compression, such as "TIFF:tiff_lzw".
    """
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = image.transpose(back[orientation]) if orientation > 1 else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    block = exif.tobytes()  # some writers of Pillow take the orientation out of the Exif object
    name, _, compression = kind.partition(":")
    known: dict[str, dict[str, Any]] = {
        "JPEG": {"subsampling": 0, "quality": 95}, "WEBP": {"lossless": True}, "AVIF": {"quality": 95},
        "TIFF:jpeg": {"quality": 95},
    }  # fmt: skip
    options = {**known.get(kind, {}), **({"compression": compression} if compression else {})}
    file = io.BytesIO()
    if name == "MPO":  # its writer drops the orientation
        stored.save(file, name, save_all=True, append_images=[stored], quality=95, subsampling=0)
        content = file.getvalue()
        return content[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + content[2:]
    stored.save(file, name, exif=exif if name == "TIFF" else block, **options)
    return file.getvalue()


def adobe_exif(space: int = 0xFFFF, index: bytes = b"R03") -> bytes:
    """Return EXIF in which a camera states AdobeRGB: a colour space and an interoperability index, in nested IFDs."""

    def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
        return struct.pack(">HHI", tag, kind, count) + value.ljust(4, b"\0")

    def directory(*entries: bytes) -> bytes:
        return struct.pack(">H", len(entries)) + b"".join(entries) + b"\0" * 4

    root = directory(entry(0x8769, 4, 1, struct.pack(">I", 8 + 18)))
    colour = entry(0xA001, 3, 1, struct.pack(">H", space))
    exif = directory(colour, entry(0xA005, 4, 1, struct.pack(">I", 8 + 18 + 30)))
    interoperability = directory(entry(1, 2, len(index) + 1, index))
    return b"Exif\0\0MM\0*" + struct.pack(">I", 8) + root + exif + interoperability


def png_with(image: Image.Image, *chunks: tuple[bytes, bytes], **options: Any) -> bytes:
    """Return a PNG of Pillow with more chunks behind its header."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    content = file.getvalue()
    return content[:33] + b"".join(_chunk(*each) for each in chunks) + content[33:]


def with_codes(avif: bytes, primaries: int, transfer: int) -> bytes:
    """Return an AVIF whose container states other codes of ITU-T H.273."""
    place = avif.index(b"nclx") + 4
    return avif[:place] + struct.pack(">HH", primaries, transfer) + avif[place + 4 :]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, depth: int, colour: int, raw: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(raw)) + _chunk(b"IEND", b"")
