"""Convert the stored colours of a picture to sRGB, as a picture viewer does.

A file says in one of five ways what its numbers mean, and a viewer takes the first that is present:

    cICP of a PNG             two codes of ITU-T H.273 for primaries and transfer function (PNG, third edition)
    ICC profile               any format; also of grey, palette and transparent pictures
    nclx of AVIF and HEIC     the same two codes, in the container (ISO/IEC 14496-12, 12.1.5)
    sRGB, gAMA, cHRM of PNG   a gamma and primaries
    EXIF                      AdobeRGB as cameras write it: ColorSpace uncalibrated, InteroperabilityIndex R03 (DCF)

All but the ICC profile are turned into an ICC profile here, so that one engine (LittleCMS) converts all of them.
High dynamic range (transfer functions PQ and HLG) is clipped at the white of paper, 203 cd/m2 (ITU-R BT.2408).
"""

import io
import struct
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
from PIL import Image, ImageCms

Codes = tuple[int, int]  # primaries and transfer function, numbers of ITU-T H.273

_D65, _D50 = (0.3127, 0.3290), (0.3457, 0.3585)  # xy chromaticities of whites
_SRGB = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # x and y of red, green and blue
_ADOBE = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
_PRIMARIES = {
    1: _SRGB, 5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06), 6: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070), 9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}  # fmt: skip
_SRGB_TRANSFERS = (1, 6, 13, 14, 15)  # viewers show those of video as sRGB
_ADOBE_GAMMA = 563 / 256
_PNG_GAMMA = 0.45455  # gAMA of an sRGB picture
_CURVE_POINTS = 4096
_EXIF, _INTEROPERABILITY, _COLOUR_SPACE, _INDEX = 0x8769, 0xA005, 0xA001, 1
_MODES = {"RGB": ("RGB", ("RGB", "L")), "GRAY": ("L", ("L",)), "CMYK": ("CMYK", ("CMYK",))}

Values = np.ndarray[Any, np.dtype[np.float64]]
Curve = Callable[[Values], Values]


def convert_to_srgb(colours: Image.Image, profile: bytes | None) -> Image.Image:
    """Return opaque colours (mode L, RGB, CMYK, LAB or any other) in sRGB. An unusable profile is ignored."""
    if colours.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(colours, lab, srgb, outputMode="RGB") or colours
    if profile is None:
        return colours
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode, accepted = _MODES.get(source.profile.xcolor_space.strip(), ("", ()))
        if colours.mode not in accepted:
            return colours
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(colours.convert(mode), source, srgb, outputMode="RGB") or colours
    except (ImageCms.PyCMSError, OSError, ValueError):
        return colours


def find_profile(image: Image.Image, codes: Codes | None) -> bytes | None:
    """Return the ICC profile of a loaded picture's colours; None if they are sRGB or nothing is stated.

    codes: what `read_codes` found in the file before it was decoded.
    """
    icc = image.info.get("icc_profile") or None
    if codes is not None and (icc is None or image.format == "PNG"):
        return _coded_profile(codes)
    if icc is not None or "srgb" in image.info:
        return icc
    if gamma := image.info.get("gamma"):
        return _gamma_profile(float(gamma), image.info.get("chromaticity"))
    return _profile(_ADOBE, _D65, lambda values: values**_ADOBE_GAMMA) if _is_adobe_by_exif(image) else None


def read_codes(image: Image.Image) -> Codes | None:
    """Return the H.273 codes in the file of a picture that is open and not yet loaded; None if there are none.

    Pillow does not read them. Codes without a meaning here count as absent.
    """
    file = getattr(image, "fp", None)
    if file is None or image.format not in ("PNG", "AVIF", "HEIF"):
        return None
    place = file.tell()
    try:
        file.seek(0)
        found = _png_codes(file) if image.format == "PNG" else _container_codes(file)
    except (OSError, struct.error):
        return None
    finally:
        file.seek(place)
    return found if found is not None and found[0] in _PRIMARIES and _transfer(found[1]) is not None else None


def _png_codes(file: IO[bytes]) -> Codes | None:
    if file.read(8) != b"\x89PNG\r\n\x1a\n":
        return None
    while True:
        length, kind = struct.unpack(">I4s", file.read(8))
        if kind in (b"IDAT", b"IEND"):  # cICP comes before the pixels
            return None
        body = file.read(length)
        if kind == b"cICP" and length == 4:
            return body[0], body[1]
        file.seek(4, io.SEEK_CUR)


def _container_codes(file: IO[bytes]) -> Codes | None:
    """Return the codes of the first `colr` box, which is the main picture's, among the item properties."""
    for kind, body in _boxes(file.read(1 << 20)):
        if kind == b"meta":
            properties = next((each for name, each in _boxes(body[4:]) if name == b"iprp"), b"")
            container = next((each for name, each in _boxes(properties) if name == b"ipco"), b"")
            for name, each in _boxes(container):
                if name == b"colr" and each[:4] == b"nclx":
                    primaries, transfer = struct.unpack(">HH", each[4:8])
                    return primaries, transfer
    return None


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the kind and body of the boxes of an ISO base media file."""
    place = 0
    while place + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        if size < 8:  # 64-bit sizes and "to the end", which only pixel data have
            return
        yield kind, data[place + 8 : place + size]
        place += size


def _is_adobe_by_exif(image: Image.Image) -> bool:
    try:
        exif = image.getexif()
        space = exif.get_ifd(_EXIF).get(_COLOUR_SPACE)
        index = exif.get_ifd(_INTEROPERABILITY).get(_INDEX, "")
    except Exception:  # damaged EXIF does not affect the pixels
        return False
    text = index.decode("latin-1") if isinstance(index, bytes) else str(index)
    return space == 2 or (space != 1 and text.startswith("R03"))  # 2 is not standard, but cameras write it


def _gamma_profile(gamma: float, chromaticity: Any) -> bytes | None:
    """Return the profile for gAMA and cHRM (x and y of white, red, green and blue) of a PNG."""
    white: tuple[float, ...] = _D65
    primaries: tuple[float, ...] = _SRGB
    if isinstance(chromaticity, (tuple, list)) and len(chromaticity) == 8 and all(each > 0 for each in chromaticity):
        white, primaries = tuple(chromaticity[:2]), tuple(chromaticity[2:])
    is_srgb = abs(gamma - _PNG_GAMMA) < 0.001
    if is_srgb and np.allclose((*white, *primaries), (*_D65, *_SRGB), atol=0.002):
        return None
    if not 0.05 < gamma < 20:
        return None
    return _profile(primaries, white, lambda values: values ** (1 / gamma))


def _coded_profile(codes: Codes) -> bytes | None:
    primaries, transfer = codes
    curve = _transfer(transfer)
    if curve is None or (primaries == 1 and transfer in _SRGB_TRANSFERS):
        return None
    return _profile(_PRIMARIES[primaries], _D65, curve)


def _transfer(code: int) -> Curve | None:
    """Return the function from stored numbers to linear light, both 0 to 1; None for a code without a meaning here."""
    if code in _SRGB_TRANSFERS:
        return lambda values: np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return {4: lambda values: values**2.2, 5: lambda values: values**2.8, 8: lambda values: values,
            16: _pq, 18: _hlg}.get(code)  # fmt: skip


def _pq(values: Values) -> Values:
    """Return SMPTE ST 2084 in units of 203 cd/m2."""
    root = values ** (32 / 2523)
    light = np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)
    return light ** (16384 / 2610) * 10000 / 203


def _hlg(values: Values) -> Values:
    """Return ARIB STD-B67 in units of its value at 75 %, the white of paper."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073

    def light(each: Values) -> Values:
        return np.where(each <= 0.5, each**2 / 3, (np.exp((each - c) / a) + b) / 12)

    return light(values) / light(np.array(0.75))


def _profile(primaries: tuple[float, ...], white: tuple[float, ...], curve: Curve) -> bytes:
    """Return an ICC profile (version 2.4, matrix and curves) of an RGB space."""
    points = np.clip(curve(np.linspace(0, 1, _CURVE_POINTS)), 0, 1)
    table = b"curv\0\0\0\0" + struct.pack(">I", _CURVE_POINTS) + (points * 65535).round().astype(">u2").tobytes()
    text = b"desc\0\0\0\0" + struct.pack(">I", 8) + b"imagine\0" + b"\0" * 78
    columns = _to_d50(primaries, white).T
    tags = [(b"desc", text), (b"cprt", b"text\0\0\0\0CC0\0"), (b"wtpt", _xyz(_white_xyz(_D50)))]
    tags += [(name, _xyz(each)) for name, each in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)]
    entries, data = b"", b""
    start = 128 + 4 + 12 * (len(tags) + 3)
    for name, body in [*tags, (b"rTRC", table)]:
        entries += name + struct.pack(">II", start + len(data), len(body))
        data += body + b"\0" * (-len(body) % 4)
    for name in (b"gTRC", b"bTRC"):  # all three share one table
        entries += name + entries[-8:]
    head = struct.pack(">I4sI4s4s4s12x4s", start + len(data), b"", 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    head = head.ljust(68, b"\0") + _xyz(_white_xyz(_D50))[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags) + 3) + entries + data


def _to_d50(primaries: tuple[float, ...], white: tuple[float, ...]) -> Values:
    """Return the matrix from linear RGB to XYZ, adapted to D50 by the Bradford transform (ICC.1, annex E)."""
    ends = np.stack([_white_xyz(primaries[place : place + 2]) for place in (0, 2, 4)], axis=1)
    matrix = ends * np.linalg.solve(ends, _white_xyz(white))
    cone = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    gain = np.diag((cone @ _white_xyz(_D50)) / (cone @ _white_xyz(white)))
    adapted: Values = np.linalg.inv(cone) @ gain @ cone @ matrix
    return adapted


def _white_xyz(xy: tuple[float, ...]) -> Values:
    return np.array([xy[0] / xy[1], 1.0, (1 - xy[0] - xy[1]) / xy[1]])


def _xyz(values: Values) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(float(each) * 65536)) for each in values)
