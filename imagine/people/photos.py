"""Open a picture in any common form and return it as upright RGB, or raise an error that says what to do.

This is the first step of every call with a reference: `photos` opens the picture, `faces` finds and crops the face, and
the vision encoder encodes it. Users give what their phone, their print shop or a web page produced, so unusual formats
are common: rotation stored in EXIF, CMYK and other colour spaces, 16-bit scans, transparency, animations. Each must
look here as it does in a picture viewer, because a network accepts a rotated or inverted face without an error and
encodes it wrongly.

Limits, and the reasons for them:

- `MAX_PIXELS`, 128 million, is checked in the header before anything is decoded. It accepts the largest common phone
  photo (108 megapixels) and stops decompression bombs: a 20,000 x 20,000 picture would need 1.2 GB of memory.
- `MAX_BYTES`, 512 MB: the size of an uncompressed picture of that many pixels; a larger file is a film or a disk image.
- `MAX_SIDE`, 2048: larger pictures are shrunk immediately (a JPEG while it is decoded). No face crop is larger than
  1024 pixels, and the time to find a face grows with the number of pixels.
- `MIN_SIDE`, 32: in a smaller picture faces cannot be told apart.

Transparent pixels become mid grey, the same grey as the masked background of a face crop.
Nothing is ever downloaded: a web address is refused with an error.
"""

import importlib.util
import io
import os
import threading
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from imagine.errors import PictureError
from imagine.paths import as_path, kind_of, why_no_file
from imagine.people.colours import convert_to_srgb, find_profile, read_codes

MAX_PIXELS = 128_000_000
MAX_BYTES = 512 << 20
MAX_SIDE = 2048
MIN_SIDE = 32
BACKGROUND = (128, 128, 128)

PhotoSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any] | torch.Tensor

# Only decoders that run inside the process: Pillow's EPS reader would start Ghostscript on an untrusted file.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA", "HEIF")
_READABLE = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_warning_filter = threading.Lock()  # Python's warning filters belong to the process, not to the thread


@dataclass(frozen=True)
class Photo:
    """An opened picture and the properties of its stored form, which the photo report shows."""

    image: Image.Image  # RGB, upright, longest side at most MAX_SIDE
    name: str  # the name in messages: the path as given, or "the picture"
    format: str  # "JPEG", "PNG", ...; "memory" for a picture that did not come from a file
    mode: str  # Pillow's mode as stored, such as "CMYK" or "I;16"
    size: tuple[int, int]  # width and height as stored, before rotation and shrinking
    orientation: int  # EXIF orientation, 1 to 8; 1 is upright


def open_photo(source: PhotoSource) -> Image.Image:
    """Return the picture as an upright RGB image whose longest side is at most MAX_SIDE pixels.

    source: a path, the bytes of a picture file, a Pillow image, an array (H, W), (H, W, 1|3|4) or a tensor
        (1|3|4, H, W), (1, 1|3|4, H, W); arrays and tensors hold 8-bit or 16-bit integers, or floats from 0 to 1.
    Raises PictureError, whose message says what to do.
    """
    return read_photo(source).image


def read_photo(source: PhotoSource) -> Photo:
    """Return the picture of `open_photo` together with the properties of its stored form."""
    if isinstance(source, torch.Tensor):
        return _normalise(_from_array(_channels_last(source)), "the picture", "memory")
    if isinstance(source, np.ndarray):
        return _normalise(_from_array(source), "the picture", "memory")
    if isinstance(source, Image.Image):
        return _normalise(source, "the picture", source.format or "memory")
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, data = "the picture", io.BytesIO(bytes(source))
    elif isinstance(source, (str, os.PathLike)):
        name, data = _read_file(source)
    else:
        raise PictureError(
            f"A {type(source).__name__} is not a picture: give a path, bytes, a Pillow image, an array or a tensor."
        )
    with _open(data, name) as image:
        if image.format in ("JPEG", "MPO"):
            # libjpeg can decode to 1/2, 1/4 or 1/8. Twice the final side leaves the last step to a better filter.
            stored = image.size
            image.draft(None, (2 * MAX_SIDE, 2 * MAX_SIDE))
            return replace(_normalise(image, name, image.format), size=stored)
        return _normalise(image, name, image.format or "unknown")


def _read_file(source: "str | os.PathLike[str]") -> tuple[str, io.BytesIO]:
    name = os.fsdecode(source)
    if name.startswith(("http://", "https://")):
        raise PictureError(f"{name} is a web address and nothing is downloaded: save the picture and give its path.")
    path = as_path(name)
    kind = kind_of(path, PictureError)
    if kind == "folder":
        raise PictureError(f"{name} is a folder: give the path of one picture in it.")
    if kind != "file":
        raise PictureError(why_no_file(name, kind))
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PictureError(f"{name} is larger than {MAX_BYTES >> 20} MB: save it as a smaller JPEG first.")
        return name, io.BytesIO(path.read_bytes())
    except OSError as error:
        raise PictureError(f"{name} cannot be read ({error}): check its permissions and the path.") from error


def _open(data: io.BytesIO, name: str) -> Image.Image:
    """Read the header only; raise PictureError for a picture that must not be decoded."""
    head = data.getbuffer()[:32].tobytes()
    if not head:
        raise PictureError(f"{name} is empty: copy or download the picture again.")
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        _enable_heic(name)
    try:
        with _warning_filter, warnings.catch_warnings():
            # Pillow warns from 89 megapixels on; our own limit, checked below, replaces its limit.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(data, formats=_formats())
    except Image.DecompressionBombError as error:
        raise PictureError(_too_large(name)) from error
    except UnidentifiedImageError as error:
        raise PictureError(f"{name} is not a picture that can be read: save it as {_READABLE}.") from error
    except Exception as error:  # a damaged header can raise any error in a decoder
        raise PictureError(_damaged(name)) from error
    _check_size(image.size, name)
    return image


def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]  # some are optional when Pillow is built


def _enable_heic(name: str) -> None:
    if importlib.util.find_spec("pillow_heif") is None:
        raise PictureError(
            f"{name} is a HEIC photo, which cannot be read here: save it as JPEG, or install the package pillow-heif "
            "(it is part of the extra `photos`)."
        )
    importlib.import_module("pillow_heif").register_heif_opener()


def _normalise(image: Image.Image, name: str, stored_format: str) -> Photo:
    """Check the size, decode, convert to RGB, turn upright and shrink."""
    _check_size(image.size, name)
    codes = read_codes(image)  # first, because reading the EXIF of a PNG already decodes it
    stored_mode = image.mode
    try:
        if image.format == "PNG":  # or else `_orientation` would hide that its pixels are damaged
            image.load()
        stored_turn = _stored_orientation(image)
        image.load()
        # Some decoders turn the picture themselves, so only the orientation that is left after decoding counts.
        turn = _orientation(image)
        size = image.size if turn == stored_turn or stored_turn < 5 else image.size[::-1]
        rgb = _transposed(_to_rgb(image, find_profile(image, codes)), turn)
    except PictureError:
        raise
    except Exception as error:  # decoders raise many errors on damaged bytes; the user's remedy is the same
        raise PictureError(_damaged(name)) from error
    _check_size(rgb.size, name)  # an icon holds a picture whose size its header may misstate
    if max(rgb.size) > MAX_SIDE:
        rgb.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return Photo(rgb, name, stored_format, stored_mode, size, stored_turn)


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise PictureError(_too_large(name, size))
    if min(size) < MIN_SIDE:
        raise PictureError(
            f"{name} is {width} x {height} pixels, too small to hold a face: give {MIN_SIDE} x {MIN_SIDE} or more."
        )
    if min(size) * MAX_SIDE < MIN_SIDE * max(size):
        raise PictureError(f"{name} is {width} x {height} pixels, too narrow a strip: crop it to the person first.")


def _too_large(name: str, size: tuple[int, int] | None = None) -> str:
    shown = f"{size[0]:,} x {size[1]:,} pixels, more" if size else "more"
    return f"{name} is {shown} than {MAX_PIXELS // 1_000_000} million pixels: shrink it, {MAX_SIDE} a side is enough."


def _damaged(name: str) -> str:
    return f"{name} is incomplete or damaged: copy or download it again, or save it again as JPEG or PNG."


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF does not affect the pixels: read the picture without rotation
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _stored_orientation(image: Image.Image) -> int:
    """Return the orientation in the file, also if the decoder turns the picture itself (HEIC when it is opened)."""
    return image.info.get("original_orientation") or _orientation(image)


def _transposed(image: Image.Image, orientation: int) -> Image.Image:
    """Apply the EXIF orientation: the sides on which row 0 and column 0 of the picture belong (Exif 2.32, tag 274)."""
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert any Pillow mode to sRGB, a new picture without metadata; transparency is blended with mid grey."""
    colours, alpha = _separate_alpha(image)
    rgb = convert_to_srgb(colours, profile).convert("RGB")
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, (*BACKGROUND, 255)), rgb).convert("RGB")
    clean = rgb.copy() if rgb is image else rgb
    clean.info = {}  # no profile and no EXIF, since both are already applied to the pixels
    clean.getexif().clear()
    return clean


def _separate_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return opaque colours without a palette, 8-bit, and the alpha channel, which is None if all is opaque.

    Deep greys are scaled, not clipped. A colour key refers to stored colours, so it becomes alpha before they change.
    """
    key = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        return Image.fromarray(_eight_bit(values)), alpha
    if image.mode in ("RGBa", "La"):  # colours already multiplied by alpha
        image = image.convert(image.mode.upper())
    is_grey = image.mode in ("1", "L", "LA")
    if isinstance(key, tuple) and max(key) > 255:  # of 16 bits, of which the decoded colours keep the upper eight
        image = image.copy()
        image.info["transparency"] = tuple(each >> 8 for each in key)
    if image.mode in ("RGBA", "LA", "PA") or key is not None:
        image = image.convert("RGBA")
        alpha, image = image.getchannel("A"), image.convert("RGB")
        return (image.getchannel("R") if is_grey else image), alpha
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image, None
    return image.convert("L" if is_grey else "RGB"), None


def _eight_bit(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Convert numbers to 8-bit: integers by their depth (8, 16, else the largest value), floats from 0 to 1."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    numbers = np.nan_to_num(values.astype(np.float64))
    top = float(numbers.max(initial=0.0))
    if values.dtype.kind == "f":
        full = 1.0 if top <= 1.0 else 255.0 if top <= 255.0 else top
    elif values.dtype.kind == "u" and values.dtype.itemsize == 2:  # of either byte order
        full = 65535.0
    else:
        full = 255.0 if top <= 255.0 else 65535.0 if top <= 65535.0 else top
    return np.clip(numbers * (255.0 / full) + 0.5, 0, 255).astype(np.uint8)


def _channels_last(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    shape = tuple(tensor.shape)
    values = tensor.detach().cpu()
    values = values.float() if values.is_floating_point() else values
    values = values[0] if values.ndim == 4 and values.shape[0] == 1 else values
    if values.ndim != 3 or values.shape[0] not in (1, 3, 4):
        raise PictureError(f"A tensor of shape {shape} is not one picture: give (3, height, width).")
    array: np.ndarray[Any, Any] = values.permute(1, 2, 0).numpy()
    return array


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise PictureError(f"An array of shape {array.shape} is not one picture: give (height, width, 3).")
    if array.dtype.kind not in "buif":
        raise PictureError(f"An array of {array.dtype} is not a picture: give 8-bit integers or floats from 0 to 1.")
    if array.dtype.kind == "f" and not _within_unit(array):
        raise PictureError("A picture given as floats must hold numbers from 0 to 1: rescale it first.")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    _check_size((array.shape[1], array.shape[0]), "the picture")
    return Image.fromarray(np.ascontiguousarray(_eight_bit(array)))


def _within_unit(array: np.ndarray[Any, Any]) -> bool:
    # Resampling and decoders leave values slightly outside 0 to 1; anything further is on another scale.
    return bool(np.isfinite(array).all() and array.size and array.min() >= -0.01 and array.max() <= 1.01)
