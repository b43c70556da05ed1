"""What a weights file really is, whatever its name says, without importing torch."""

import re
from collections.abc import Callable
from pathlib import Path

_ARCHIVE = b"PK\x03\x04"  # the start of a pickle of torch since 1.6; older ones start with 0x80 and a protocol number
_VARIANT = re.compile(
    r"(?:(?:diffusion_)?pytorch_)?model(?:\.(?P<first>\w+?))?(?:-\d+-of-\d+)?(?:\.(?P<last>\w+))?\.(?:safetensors|bin)|"
    r"(?:(?:diffusion_)?pytorch_)?model\.(?:safetensors|bin)\.index(?:\.(?P<index>\w+))?\.json"
)


def is_pickle(file: Path) -> bool:
    """Return whether a file is a pickle of torch by its first bytes."""
    return _starts_with(file, _is_pickle)


def is_safetensors(file: Path) -> bool:
    """Return whether a file starts as a safetensors file does: the length of a JSON header, and the header."""
    return _starts_with(file, _is_safetensors)


def why_unreadable(file: Path, remedy: str = "download or save it again") -> str:
    """Return one sentence on why a file is not a safetensors file that can be read, and what to do.

    `remedy` is what to do if the file is only incomplete.
    """
    try:
        head = _head(file)
    except OSError as error:
        return f"{file} cannot be read ({error.strerror or error}): check its permissions."
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return f"{file} is empty: {remedy}."
    if text.startswith(b"version https://git-lfs"):
        return (
            f"{file} is a git-lfs pointer, which stands for a file that was not downloaded: run `git lfs pull` in its "
            "repository, or download the file itself."
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            f"{file} is a web page and holds no weights: download the file itself, and log in first if its repository "
            "asks for it."
        )
    if text.startswith(b"{"):
        return f"{file} is a text and holds no weights, perhaps the error of a server: download the file itself."
    if _is_pickle(head):
        return (
            f"{file} is a pickle of torch, whatever its name says, and reading it could run code: use the safetensors "
            "file instead, or convert it with `safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)`."
        )
    return f"{file} is not a complete safetensors file: {remedy}."


def variant_of(name: str) -> str | None:
    """Return the variant in the name of a model's weights file or its index, such as "fp16"; "" without a variant.

    Return None for anything but .safetensors and .bin files. diffusers and transformers put the variant before the
    ending or before the number of a shard.
    """
    found = _VARIANT.fullmatch(name)
    return None if found is None else found["first"] or found["last"] or found["index"] or ""


def variants_in(folder: Path) -> set[str]:
    """Return the variants of a component folder's safetensors files; "" stands for files without a variant."""
    found = {variant_of(file.name) for file in folder.glob("*.safetensors")}
    return {each for each in found if each is not None}


def _is_pickle(head: bytes) -> bool:
    # A header's length may start with 0x80 too.
    return head.startswith(_ARCHIVE) or (head[:1] == b"\x80" and head[1:2] <= b"\x05" and not _is_safetensors(head))


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(256)


def _starts_with(file: Path, test: Callable[[bytes], bool]) -> bool:
    try:
        return test(_head(file))
    except OSError:
        return False  # opening it then raises the error
