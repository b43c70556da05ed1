"""Write the settings into a picture file, and read them back.

PNG: the text chunks `parameters` (AUTOMATIC1111, Forge, ComfyUI's importer, Civitai) and `imagine` (our JSON). JPEG and
WebP: EXIF, the text as UserComment in its "unicode" form, our JSON as MakerNote. ComfyUI's own keys `prompt` and
`workflow` describe graphs, so they are not written here; its nodes write them (docs/comfyui.md).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, PngImagePlugin

from imagine.provenance.record import KEY

TEXT_KEY = "parameters"
_EXIF_IFD, _USER_COMMENT, _MAKER_NOTE, _SOFTWARE = 0x8769, 0x9286, 0x927C, 0x0131
_UNICODE, _ASCII = b"UNICODE\0", b"ASCII\0\0\0"
_OURS = b"imagine\0"


@dataclass(frozen=True)
class Found:
    """What a picture file says: the text for other programs, our record, and the keys of other programs."""

    text: str = ""
    record: Mapping[str, Any] | None = None
    others: tuple[str, ...] = ()


def save_options(file_format: str, text: str, record: Mapping[str, Any], software: str) -> dict[str, Any]:
    """Return the options of `Image.save` that write the text and the record into a PNG, JPEG or WEBP file."""
    described = json.dumps(record, ensure_ascii=False, sort_keys=True)
    if file_format == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for key, value in ((TEXT_KEY, text), (KEY, described), ("Software", software)):
            chunks.add_itxt(key, value) if not value.isascii() else chunks.add_text(key, value)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif[_SOFTWARE] = software
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _UNICODE + text.encode("utf-16-be")
    exif.get_ifd(_EXIF_IFD)[_MAKER_NOTE] = _OURS + described.encode()
    return {"exif": exif}


def read_settings(image: Image.Image) -> Found:
    """Return the settings in an opened picture file; damaged ones count as absent."""
    others = tuple(key for key in ("prompt", "workflow", "invokeai_metadata") if key in image.info)
    if TEXT_KEY in image.info or KEY in image.info:
        return Found(str(image.info.get(TEXT_KEY, "")), _record(str(image.info.get(KEY, ""))), others)
    try:
        ifd = image.getexif().get_ifd(_EXIF_IFD)
    except Exception:  # damaged EXIF raises many errors
        return Found(others=others)
    note = ifd.get(_MAKER_NOTE, b"")
    ours = note[len(_OURS) :].decode(errors="replace") if isinstance(note, bytes) and note.startswith(_OURS) else ""
    return Found(_comment(ifd.get(_USER_COMMENT, b"")), _record(ours), others)


def _comment(value: Any) -> str:
    """Return the text of an EXIF UserComment, whose first eight bytes name its encoding."""
    if isinstance(value, str):
        return value.strip("\0 ")
    if not isinstance(value, bytes):
        return ""
    if value.startswith(_UNICODE):
        return value[8:].decode("utf-16-be", "replace")
    return value.removeprefix(_ASCII).decode("utf-8", "replace").strip("\0 ")


def _record(text: str) -> Mapping[str, Any] | None:
    try:
        plain = json.loads(text)
    except ValueError:
        return None
    return plain if isinstance(plain, dict) else None
