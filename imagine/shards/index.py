"""Index a shard: one line of JSON per record, with the place of its picture and its metadata.

A tar has no table of contents, so each tar is read once from start to end, and its index is stored in a local cache and
memory-mapped. A caption then costs no request, and a picture exactly one. A shard that is compressed with gzip is
unpacked into that cache first. Data from the web always have errors: a broken record is left out and listed with the
reason, and the rest is read.

The members of a record have one key, as in `webdataset`: the name up to the first dot after the last slash. What
follows is the field. `KEY.jpg`, `KEY.txt` and `KEY.json` are read; of fields such as `KEY.input.jpg`, one picture is
read if the record has no other, and the rest is counted.
"""

import gzip
import hashlib
import json
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from imagine.errors import ConfigError
from imagine.shards.facts import (
    BAD_ENCODING,
    BAD_JSON,
    NO_CAPTION,
    NO_PICTURE,
    PEOPLE,
    PICTURES,
    TEXTS,
    TOO_LONG,
    UNREAD_FIELD,
    UNREAD_FILE,
    USED_TWICE,
    Problems,
    add_problem,
    normalised_facts,
)
from imagine.shards.texts import LARGEST_TEXT, decode_text, json_object, unicode_text

INDEX_VERSION = 3  # increase it when rows have another form, so that a cached index is made again
DIGEST_VERSION = 2  # part of every digest: increase it when the same files give other records
MISSING_SHARD = "a shard that does not exist"
DAMAGED_SHARD = "a shard that is cut off or damaged"
SEVERAL_PICTURES = "several pictures with one key, which ends at the first dot of a name"

_HEAD = 512  # bytes that tell what a file is
_GZIP = b"\x1f\x8b"
_ARCHIVES = {
    b"PK\x03\x04": "a ZIP archive", b"BZh": "a bzip2 file", b"\xfd7zXZ": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
}  # fmt: skip
_SYSTEM_FILE = re.compile(r"(^|/)(\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini)$|(^|/)__[^/]*__(/|$)", re.IGNORECASE)


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


def serialised(rows: Iterable[Mapping[str, Any]], problems: Mapping[str, list[str]], **header: Any) -> bytes:
    """Return the lines of an index."""
    lines = [json.dumps(row) for row in rows]
    header = {"version": INDEX_VERSION, "records": len(lines), "problems": problems, **header}
    return "".join(f"{line}\n" for line in (json.dumps(header), *lines)).encode()


def open_index(filesystem: Any, path: str, cache: Path, captions: bool = True) -> Index:
    """Return the index of a shard: from the cache if the shard has not changed, else by reading the shard.

    captions: leave out records without a caption. The header's "unpacked" is the local copy of a compressed shard.
    Raises ConfigError if a compressed shard cannot be unpacked into the cache.
    """
    try:
        info = filesystem.info(path)
    except FileNotFoundError:
        return _without_records(MISSING_SHARD)
    changing = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime", "created", "md5Hash", "ino")
    state = {name: str(info[name]) for name in changing if info.get(name) is not None}
    name = filesystem.unstrip_protocol(path) + ("" if captions else "\nwithout captions")
    cache_file = cache / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.jsonl"
    index = _cached_index(cache_file, state)
    if index is None or not _has_its_copy(index):
        lines = _read_shard(filesystem, path, int(info["size"]), state, captions, cache)
        _write_cache(cache_file, lines)
        index = _cached_index(cache_file, state) or Index(np.frombuffer(lines, np.uint8))
    return index


def not_a_shard(head: bytes) -> str:
    """Return what a file is instead of a tar, with what to do, from its first bytes; "" if it may be a tar."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer instead of the file: run `git lfs pull` in its repository"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page instead of a shard: download the file itself"
    if not head:
        return "an empty file instead of a shard: download it again"
    kind = next((name for start, name in _ARCHIVES.items() if head.startswith(start)), "")
    return f"{kind} instead of a tar: unpack it, and pack it as .tar" if kind else ""


def _without_records(reason: str) -> Index:
    return Index(np.frombuffer(serialised([], {reason: [""]}, digest="", folder=False, nothing=reason), np.uint8))


def _read_shard(filesystem: Any, path: str, size: int, state: Mapping[str, str], captions: bool, cache: Path) -> bytes:
    with filesystem.open(path, "rb") as file:
        head = file.read(_HEAD)
        if reason := not_a_shard(head):
            return serialised([], {reason: [""]}, state=state, digest=reason, folder=False, nothing=reason)
        file.seek(0)
        if not head.startswith(_GZIP):
            return _index_tar(file, size, captions, state=state)
        copy = cache / f"{hashlib.sha256(repr((path, state)).encode()).hexdigest()[:32]}.tar"
        _unpack(file, copy, path)
    with copy.open("rb") as file:
        return _index_tar(file, copy.stat().st_size, captions, state=state, unpacked=str(copy))


def _unpack(file: BinaryIO, copy: Path, path: str) -> None:
    """Write the content of a gzip file to `copy`; of a file that is cut off, what can be read."""
    try:
        with (
            _replacing(copy) as draft,
            gzip.GzipFile(fileobj=file) as content,
            suppress(EOFError, gzip.BadGzipFile, zlib.error),
        ):
            while block := content.read1(1 << 20):  # `read` would lose what comes before the damage
                draft.write(block)
    except OSError as error:
        raise ConfigError(
            f"{path} is compressed and cannot be unpacked into {copy.parent} ({error}): unpack it with `gunzip`."
        ) from error


def _has_its_copy(index: Index) -> bool:
    return "unpacked" not in index.header or os.path.exists(index.header["unpacked"])


def _cached_index(cache_file: Path, state: Mapping[str, str]) -> Index | None:
    try:
        index = Index(np.memmap(cache_file, np.uint8, mode="r"))
    except (OSError, ValueError, IndexError):  # the file is missing, empty, not JSON or without a line
        return None
    written = {name: index.header.get(name) for name in ("version", "state", "records")}
    return index if written == {"version": INDEX_VERSION, "state": state, "records": len(index)} else None


def _write_cache(cache_file: Path, lines: bytes) -> None:
    # If the disk is full or not writable, the shard is read again next time.
    with suppress(OSError), _replacing(cache_file) as draft:
        draft.write(lines)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a draft that replaces the file at `path` once it is complete; after an error, nothing of it is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as draft:
        try:
            yield draft
            draft.close()
            os.replace(draft.name, path)
        except BaseException:
            os.unlink(draft.name)
            raise


@dataclass
class _RecordMembers:
    """The tar members with one key, by field: what follows the key's dot, in lower case."""

    pictures: dict[str, tuple[int, int]] = field(default_factory=dict)  # start and size
    texts: dict[str, bytes | None] = field(default_factory=dict)  # captions and JSON; None: too long
    unread: list[str] = field(default_factory=list)

    @property
    def picture(self) -> str | None:
        """The field of the record's picture; None if there is none, or several that are no different in rank."""
        plain = [name for name in self.pictures if "." not in name]
        if plain:
            return plain[0]
        return next(iter(self.pictures)) if len(self.pictures) == 1 else None

    def chosen(self, endings: Iterable[str]) -> str | None:
        """Return the field of the record's caption or JSON: named as its picture, or alone, or the only one."""
        middle = (self.picture or "").rpartition(".")[0]
        fields = [name for name in self.texts if name.rpartition(".")[2] in endings]
        wanted = [*(f"{middle}.{ending}" for ending in endings if middle), *endings]
        return next((name for name in wanted if name in fields), fields[0] if len(fields) == 1 else None)


def _index_tar(file: BinaryIO, size: int, captions: bool, **header: Any) -> bytes:
    """Read a tar from start to end, without the bytes of pictures, and return its index."""
    problems: Problems = {}
    found: dict[str, _RecordMembers] = {}
    digest = hashlib.sha256(f"{DIGEST_VERSION}\n".encode())
    key = ""
    try:
        for member in _members(file, size):
            digest.update(f"{member.name} {member.size}\n".encode("utf-8", "surrogateescape"))
            path = member.name.removeprefix("./")
            folder, _, name = path.rpartition("/")
            stem, _, ending = name.partition(".")
            if _SYSTEM_FILE.search(path):
                continue
            if not stem or not ending:
                add_problem(problems, UNREAD_FILE, unicode_text(path))
                continue
            key = unicode_text(f"{folder}/{stem}" if folder else stem)
            _add_member(found.setdefault(key, _RecordMembers()), key, ending.lower(), member, file, problems)
            if (content := found[key].texts.get(ending.lower())) is not None:
                digest.update(content)
    except (tarfile.TarError, ValueError, OverflowError):
        # The last record may be incomplete: its JSON may be in the part that was cut off.
        found.pop(key, None)
        add_problem(problems, DAMAGED_SHARD, f"after {key}" if key else "")
    rows = [row for key, members in found.items() if (row := _row(key, members, problems, captions)) is not None]
    if any(PEOPLE in row for row in rows):  # earlier versions read these records in another way
        digest.update(b"people\n")
    return serialised(rows, problems, digest=digest.hexdigest(), folder=False, **header)


def _add_member(
    members: _RecordMembers, key: str, name: str, member: tarfile.TarInfo, file: BinaryIO, problems: Problems
) -> None:
    kind = name.rpartition(".")[2]
    if name in members.pictures or name in members.texts:
        add_problem(problems, USED_TWICE, key)
    elif kind in PICTURES:
        members.pictures[name] = (member.offset_data, member.size)
    elif kind in (*TEXTS, "json"):
        members.texts[name] = _text_of(file, member)
    else:
        members.unread.append(name)


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


def _text_of(file: BinaryIO, member: tarfile.TarInfo) -> bytes | None:
    if member.size > LARGEST_TEXT:
        return None
    file.seek(member.offset_data)
    return file.read(member.size)


def _row(key: str, members: _RecordMembers, problems: Problems, captions: bool) -> dict[str, Any] | None:
    """Return a record as a row of the index, or add a problem and return None."""
    picture, text, facts = members.picture, members.chosen(TEXTS), members.chosen(("json",))
    if picture is None:
        several = f"{key} ({', '.join(members.pictures)})"
        if members.pictures:
            add_problem(problems, SEVERAL_PICTURES, several)
        elif members.texts:
            add_problem(problems, NO_PICTURE, key)
        else:
            add_problem(problems, UNREAD_FILE, f"{key} ({', '.join(members.unread)})")
        return None
    rest = [name for name in (*members.pictures, *members.texts) if name not in (picture, text, facts)]
    if "." not in picture and any(name in PICTURES for name in rest):
        add_problem(problems, USED_TWICE, key)
        rest = [name for name in rest if name not in PICTURES]
    if rest := [*rest, *members.unread]:
        add_problem(problems, UNREAD_FIELD, f"{key} ({', '.join(rest)})")
    start, size = members.pictures[picture]
    place = {"key": key, "start": start, "size": size}
    contents = [b"" if name is None else members.texts[name] for name in (text, facts)]
    return row_of(place, contents[0], b"{}" if facts is None else contents[1], problems, captions)


def row_of(
    place: Mapping[str, Any], text: bytes | None, facts: bytes | None, problems: Problems, captions: bool
) -> dict[str, Any] | None:
    """Return the row of a record from the contents of its caption and its JSON, or add a problem and return None.

    `place` is the key and the place of the picture. A content that is too long is None.
    """
    key = place["key"]
    if text is None or facts is None:
        add_problem(problems, TOO_LONG, key)
        return None
    words, plain = decode_text(text), json_object(facts)
    if words is None:
        add_problem(problems, BAD_ENCODING, key)
    if plain is None:
        add_problem(problems, BAD_JSON, key)
        return None
    return captioned({**place, **normalised_facts(unicode_text(words), plain, key, problems)}, problems, captions)


def captioned(row: dict[str, Any], problems: Problems, captions: bool) -> dict[str, Any] | None:
    """Return the row, or None if its people cannot be used, or (with a problem) if it needs a caption and has none."""
    if row.get(PEOPLE, ()) is None:
        return None
    if row["caption"] or not captions:
        return row
    add_problem(problems, NO_CAPTION, row["key"])
    return None
