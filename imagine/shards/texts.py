"""Decode captions and JSON of records: any Unicode encoding with a byte-order mark, UTF-8, UTF-16 or Windows-1252."""

import codecs
import json
from typing import Any

LARGEST_TEXT = 16 << 20  # bytes; a larger caption or JSON file is an error and could exhaust the memory

_MARKS = (  # the marks of UTF-32 come first, because one of them begins with a mark of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_MOST_FOREIGN = 1 / 3  # share of bytes outside ASCII above which a text is not Windows-1252 but another 8-bit encoding


def decode_text(content: bytes) -> str | None:
    """Return the text in a file, without its byte-order mark; None if its encoding cannot be recognised."""
    try:
        for mark, name in _MARKS:
            if content.startswith(mark):
                return content.decode(name)
        if b"\0" in content:  # ASCII letters in UTF-16 have a zero byte each
            little = content[1::2].count(0) > content[::2].count(0)
            text = content.decode("utf-16-le" if little else "utf-16-be")
            return None if "\0" in text else text
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            foreign = sum(byte > 127 for byte in content)
            return content.decode("cp1252") if foreign <= len(content) * _MOST_FOREIGN else None
    except UnicodeDecodeError:
        return None


def json_object(content: bytes) -> dict[str, Any] | None:
    """Parse a JSON object; return None if the bytes are not one."""
    text = decode_text(content)
    facts = None if text is None else parse_json(text)
    return facts if isinstance(facts, dict) else None


def parse_json(text: str) -> Any:
    """Parse JSON; return None if the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def unicode_text(value: object) -> str:
    """Return the text without spaces around it, with a replacement for each half of a surrogate pair; "" if it is none.

    JSON can hold such halves, and no tokenizer accepts them.
    """
    if not isinstance(value, str):
        return ""
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").strip()
