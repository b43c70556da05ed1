"""Index a shard or a folder of pictures: one line of JSON per record, with the place of its picture and its metadata.

A tar has no table of contents, so each tar is read once from start to end, and its index is stored in a local cache and
memory-mapped. A caption then costs no request, and a picture exactly one. Data from the web always have errors: a
broken record is left out and listed with the reason, and the rest is read.
"""

import hashlib
import json
import math
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1
METADATA = "metadata.jsonl"
MISSING_SHARD = "a shard that does not exist"
FIELDS = ("key", "caption", "captions", "identity", "reference", "box", "source", "width", "height")  # in our JSON

_PICTURES = ("jpg", "jpeg", "png", "webp")
_LARGEST_TEXT = 16 << 20  # bytes; a larger caption or JSON file is an error and could exhaust the memory


class Index:
    """Lines of JSON, in memory or memory-mapped from the cache: a header, then one line per record."""

    def __init__(self, lines: NDArray[np.uint8]) -> None:
        self._lines = lines
        self._ends = np.flatnonzero(lines == ord("\n"))
        self.header: dict[str, Any] = json.loads(lines[: self._ends[0]].tobytes())

    def __len__(self) -> int:
        return len(self._ends) - 1

    def line(self, row: int) -> bytes:
        return self._lines[self._ends[row] + 1 : self._ends[row + 1]].tobytes()


def _serialise(rows: Iterable[Mapping[str, Any]], problems: Mapping[str, list[str]], **header: Any) -> bytes:
    lines = [json.dumps(row) for row in rows]
    header = {"version": FORMAT_VERSION, "records": len(lines), "problems": problems, **header}
    return "".join(f"{line}\n" for line in (json.dumps(header), *lines)).encode()


def open_index(filesystem: Any, path: str, cache: Path, captions: bool = True) -> Index:
    """Return the index of a shard: from the cache if the shard has not changed, else by reading the shard.

    captions: leave out records without a caption.
    """
    try:
        info = filesystem.info(path)
    except FileNotFoundError:
        lines = _serialise([], {MISSING_SHARD: [""]}, digest="", folder=False)
        return Index(np.frombuffer(lines, np.uint8))
    changing = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime", "created", "md5Hash", "ino")
    state = {name: str(info[name]) for name in changing if info.get(name) is not None}
    name = filesystem.unstrip_protocol(path) + ("" if captions else "\nwithout captions")
    cache_file = cache / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.jsonl"
    index = _cached_index(cache_file, state)
    if index is None:
        with filesystem.open(path, "rb") as file:
            lines = _index_tar(file, int(info["size"]), state, captions)
        _write_cache(cache_file, lines)
        index = _cached_index(cache_file, state) or Index(np.frombuffer(lines, np.uint8))
    return index


def _cached_index(cache_file: Path, state: Mapping[str, str]) -> Index | None:
    try:
        index = Index(np.memmap(cache_file, np.uint8, mode="r"))
    except (OSError, ValueError, IndexError):  # the file is missing, empty, not JSON or without a line
        return None
    written = {name: index.header.get(name) for name in ("version", "state", "records")}
    return index if written == {"version": FORMAT_VERSION, "state": state, "records": len(index)} else None


def _write_cache(cache_file: Path, lines: bytes) -> None:
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache_file.parent, delete=False) as draft:
            draft.write(lines)
        os.replace(draft.name, cache_file)
    except OSError:  # disk full or not writable: the shard is then read again next time
        return


@dataclass
class _RecordMembers:
    """The tar members of one record."""

    picture: tuple[int, int] | None = None  # start and size
    txt: bytes | None = None
    json: bytes | None = None


def _index_tar(file: BinaryIO, size: int, state: Mapping[str, str], captions: bool) -> bytes:
    """Read a tar from start to end, without the bytes of pictures, and return its index."""
    problems: dict[str, list[str]] = {}
    found: dict[str, _RecordMembers] = {}
    digest = hashlib.sha256()
    key = ""
    try:
        for member in _members(file, size):
            digest.update(f"{member.name} {member.size}\n".encode("utf-8", "surrogateescape"))
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            stem, _, ending = name.partition(".")
            kind = "picture" if ending.lower() in _PICTURES else ending.lower()
            if kind not in ("picture", "txt", "json"):
                continue
            key = f"{folder}/{stem}" if folder else stem
            members = found.setdefault(key, _RecordMembers())
            if getattr(members, kind) is not None:
                add_problem(problems, "a key that is used twice", key)
            elif kind == "picture":
                members.picture = (member.offset_data, member.size)
            else:
                content = _text_of(file, member)
                digest.update(content)
                setattr(members, kind, content)
    except (tarfile.TarError, ValueError, OverflowError):
        # The last record may be incomplete: its JSON may be in the part that was cut off.
        found.pop(key, None)
        add_problem(problems, "a shard that is cut off or damaged", f"after {key}" if key else "")
    rows = [row for key, members in found.items() if (row := _row(key, members, problems, captions)) is not None]
    return _serialise(rows, problems, state=state, digest=digest.hexdigest(), folder=False)


def _members(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the files in a tar of `size` bytes. Raises TarError if it is damaged; tarfile alone may stop silently."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps a list of all members
            if member.isreg():
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("cut off")
                yield member
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end mark")


def _text_of(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    if member.size > _LARGEST_TEXT:
        return b""
    file.seek(member.offset_data)
    return file.read(member.size)


def _row(key: str, members: _RecordMembers, problems: dict[str, list[str]], captions: bool) -> dict[str, Any] | None:
    """Return a record as a row of the index, or add a problem and return None."""
    facts = json_object(members.json) if members.json is not None else {}
    if members.picture is None:
        add_problem(problems, "a record without a picture", key)
    elif facts is None:
        add_problem(problems, "JSON that cannot be read", key)
    else:
        start, size = members.picture
        text = (members.txt or b"").decode("utf-8", "replace").strip()
        row = {"key": key, "start": start, "size": size, **_normalised_facts(text, facts)}
        return _captioned(row, facts, problems, captions)
    return None


def index_folder(filesystem: Any, folder: str, captions: bool = True) -> Index:
    """Index a folder with a metadata.jsonl in the format of Hugging Face's imagefolder, and check that pictures exist.

    captions: leave out records without a caption.
    """
    problems: dict[str, list[str]] = {}
    files = filesystem.find(folder, detail=True)
    sizes = {path[len(folder.rstrip("/")) + 1 :]: int(info["size"]) for path, info in files.items()}
    rows: dict[str, dict[str, Any]] = {}
    content: bytes = filesystem.cat_file(f"{folder}/{METADATA}")
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        facts = json_object(line)
        file = _text_or_empty(facts.pop("file_name", None)) or _text_or_empty(facts.pop("file", None)) if facts else ""
        if facts is None:
            add_problem(problems, "JSON that cannot be read", f"line {number}")
        elif file not in sizes:
            add_problem(problems, "a record without a picture", file or f"line {number}")
        else:
            row = _folder_row(file, sizes[file], facts, problems, captions)
            if row is not None and rows.setdefault(row["key"], row) is not row:
                add_problem(problems, "a key that is used twice", row["key"])
    digest = hashlib.sha256(json.dumps(list(rows.values())).encode()).hexdigest()
    return Index(np.frombuffer(_serialise(rows.values(), problems, digest=digest, folder=True), np.uint8))


def _folder_row(
    file: str, size: int, facts: dict[str, Any], problems: dict[str, list[str]], captions: bool
) -> dict[str, Any] | None:
    """Return a record as a row of the index; its key, also in references, is the picture's name without the suffix."""
    row = _normalised_facts(_text_or_empty(facts.pop("text", None)), facts)
    ending = re.compile(rf"\.({'|'.join(_PICTURES)})$", re.IGNORECASE)
    row["reference"] = row["reference"] and ending.sub("", row["reference"])
    row = {"key": ending.sub("", file), "file": file, "start": 0, "size": size, **row}
    return _captioned(row, facts, problems, captions)


def _captioned(
    row: dict[str, Any], facts: Mapping[str, Any], problems: dict[str, list[str]], captions: bool
) -> dict[str, Any] | None:
    if facts.get("box") is not None and row["box"] is None:
        add_problem(problems, "a box that is not four numbers", row["key"])
    if row["caption"] or not captions:
        return row
    add_problem(problems, "a record without a caption", row["key"])
    return None


def json_object(content: bytes) -> dict[str, Any] | None:
    """Parse a JSON object; return None if the bytes are not one."""
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def _normalised_facts(text: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata with the names and types of `Record`; a value of the wrong type is treated as missing.

    `text` is the short caption beside the JSON. If the JSON has another caption, `text` becomes the terse one.
    """
    given = facts.get("captions")
    captions = (
        {name: _text_or_empty(word) for name, word in given.items() if _text_or_empty(word)}
        if isinstance(given, dict)
        else {}
    )
    caption = _text_or_empty(facts.get("caption")) or captions.get("dense") or text or next(iter(captions.values()), "")
    if text and text != caption:
        captions.setdefault("terse", text)
    return {
        "caption": caption,
        "captions": captions,
        "identity": _name(facts.get("identity")),
        "reference": _name(facts.get("reference")),
        "box": _box(facts.get("box")),
        "source": _text_or_empty(facts.get("source")),
        "width": _side(facts.get("width")),
        "height": _side(facts.get("height")),
        "extra": {name: value for name, value in facts.items() if name not in FIELDS},
    }


def _text_or_empty(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


def _name(value: object) -> str | None:
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "" else None


def _side(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _box(value: object) -> list[float] | None:
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return None
    numbers = [float(v) for v in value if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]
    return numbers if len(numbers) == 4 and min(numbers[2:]) > 0 else None


def add_problem(problems: dict[str, list[str]], reason: str, key: str) -> None:
    """Add a key to the list of keys with this problem."""
    names = problems.setdefault(reason, [])
    if key not in names[-1:]:  # the members of one record are consecutive
        names.append(key)
