"""Image records on disk, read by number: webdataset shards, and plain folders with a metadata.jsonl.

A record is one picture with its captions and, where it is half of a pair, the name of the reference that belongs to it.
In a shard, which is a plain tar file, it is two or three neighbours: `KEY.jpg`, `.png` or `.webp` as it came,
`KEY.txt` with one caption, `KEY.json` with all facts. That is what img2dataset writes and `webdataset` reads; the
fields that make pairs are ours (docs/data.md lists them). Addresses are fsspec's throughout.

Reading is by number, since position in training is a number (images seen): `order` says which record each image is.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.core import url_to_fs
from numpy.typing import NDArray
from PIL import Image

from imagine.errors import BadRecordError, ConfigError, PictureError
from imagine.shards.index import FIELDS, METADATA, MISSING_SHARD, Index, add_problem, index_folder, open_index

_INDEX_THREADS = 8  # shards indexed at a time: what is waited for is the network
_FOLDER_SHARD_SIZE = 1000  # of a folder: it has no shards, but the order of training wants some


# --- records ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ByteRange:
    """Where the bytes of a picture lie: `size` bytes from `start` on, in a file of an fsspec filesystem."""

    filesystem: Any = field(repr=False)
    path: str
    start: int
    size: int

    def read(self) -> bytes:
        """The bytes, in one request; fewer if the file has become shorter. Raises OSError if it cannot be reached."""
        content: bytes = self.filesystem.cat_file(self.path, start=self.start, end=self.start + self.size)
        return content


@dataclass(frozen=True)
class Record:
    """One picture with what is known about it.

    `width`, `height` and `box` are pixels of the whole picture held upright; `load_picture` shrinks very large ones.
    """

    key: str
    image: bytes | ByteRange = field(repr=False)  # a JPEG, PNG or WebP file, or where one lies
    caption: str  # the fullest sentence about the picture
    captions: Mapping[str, str] = field(default_factory=dict)  # by manner: "terse", "dense", "rewritten"
    identity: str | None = None  # who it is: equal for pictures of one person
    reference: str | None = None  # for the target of a pair: the key of its reference
    box: tuple[float, float, float, float] | None = None  # left, top, width, height of the face
    source: str = ""  # a free word, such as "real" or "synthetic"
    width: int | None = None
    height: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # the JSON's other fields

    def read(self) -> bytes:
        """The picture file as it is.

        Raises BadRecordError if it is no longer there as it was, OSError if the network or the disk fails: that says
        nothing about the record.
        """
        if isinstance(self.image, bytes):
            return self.image
        try:
            content = self.image.read()
        except FileNotFoundError:
            content = b""
        if len(content) != self.image.size:
            raise BadRecordError(
                f"Record {self.key} in {self.image.path} has changed since it was opened: open it anew."
            )
        return content


def load_picture(record: Record) -> Image.Image:
    """The picture as every other picture here is opened: RGB, upright, its longest side at most photos.MAX_SIDE.

    Raises BadRecordError, whose sentence names shard and key, if it is damaged or no picture, else as `Record.read`.
    """
    from imagine.people.photos import open_photo  # with torch, which whoever only writes shards does not need

    try:
        return open_photo(record.read())
    except PictureError as error:
        where = f" in {record.image.path}" if isinstance(record.image, ByteRange) else ""
        raise BadRecordError(f"Record {record.key}{where} cannot be used: {error}") from error


# --- reading ----------------------------------------------------------------------------------------------------------
def open_records(
    address: str | os.PathLike[str], cache: Path | None = None, captions: bool = True, shards: int | None = None
) -> "Records":
    """Open a data set of shards, or a folder of pictures with a metadata.jsonl.

    address: on any fsspec filesystem, a folder, one .tar, a glob, or braces as in `s3://bucket/{00000..00012}.tar`.
    cache: a local folder that keeps what was found in each shard; None is ~/.cache/imagine/shards.
    captions: leave out records without one, which cannot be trained on; False for whoever will write them.
    shards: open so many of the first ones, for a trial; None is all.
    Raises ConfigError if nothing of the kind is there. What is broken inside is left out: see `Records.problems`.
    """
    name = os.fspath(address)
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imagine" / "shards"
    try:
        filesystem, path = url_to_fs(re.sub(rf"(^|/){METADATA}$", "", name) or ".")
        filesystem.invalidate_cache()
        if not path.endswith(".tar") and filesystem.exists(f"{path}/{METADATA}"):
            return Records([_Part(filesystem, path, index_folder(filesystem, path, captions))])
        tars = [tar for one in _expand_braces(name) for tar in _tars(one)][:shards]
        with ThreadPoolExecutor(_INDEX_THREADS) as pool:
            parts = list(pool.map(lambda tar: _Part(tar[0], tar[1], open_index(tar[0], tar[1], cache, captions)), tars))
    except (OSError, ValueError, ImportError) as error:  # no rights, no such protocol, its package not installed
        raise ConfigError(f"{name} cannot be opened ({error}): check the address.") from error
    if all(MISSING_SHARD in part.index.header["problems"] for part in parts):
        raise ConfigError(f"There are no shards (*.tar) and there is no {METADATA} at {name}: check the address.")
    return Records(parts)


def has_records(address: str | os.PathLike[str]) -> bool:
    """Whether `open_records` would find shards or a folder there; nothing is read. ConfigError if nobody can tell."""
    name = os.fspath(address)
    try:
        filesystem, path = url_to_fs(re.sub(rf"(^|/){METADATA}$", "", name) or ".")
        if not path.endswith(".tar") and filesystem.exists(f"{path}/{METADATA}"):
            return True
        return any(filesystem.exists(tar) for one in _expand_braces(name) for filesystem, tar in _tars(one))
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{name} cannot be opened ({error}): check the address.") from error


def _expand_braces(address: str) -> list[str]:
    """The address once for each word or number in its braces."""
    braces = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", address)
    if braces is None:
        return [address]
    low, high, words = braces.groups()
    fills = words.split(",") if words else [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)]
    return [one for fill in fills for one in _expand_braces(address[: braces.start()] + fill + address[braces.end() :])]


def _tars(address: str) -> list[tuple[Any, str]]:
    """(filesystem, path) of the shards that an address without braces means."""
    filesystem, path = url_to_fs(address)
    if re.search(r"[*?\[]", path) and not filesystem.exists(path):
        return [(filesystem, found) for found in sorted(filesystem.glob(path))]
    # Over HTTP, asking whether something is a folder downloads it.
    if not path.endswith(".tar") and filesystem.isdir(path):
        names = filesystem.ls(path, detail=False)
        return [(filesystem, found) for found in sorted(names) if found.endswith(".tar")]
    return [(filesystem, path)]


class Records:
    """The records of a data set, by number, and what could not be used of it."""

    counts: tuple[int, ...]  # records in each shard, for `order`

    def __init__(self, parts: Sequence["_Part"]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part.index) for part in parts))
        self._broken: list[str] = []
        self.counts = tuple(count for part in parts for count in part.counts)
        self._starts = [0, *accumulate(self.counts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        """The record of that number, its picture not yet read. Raises IndexError."""
        part, row = self._find(index)
        facts = json.loads(part.index.line(row))
        path = f"{part.path}/{facts['file']}" if "file" in facts else part.path
        place = ByteRange(part.filesystem, path, facts["start"], facts["size"])
        box = None if facts["box"] is None else tuple(facts["box"])
        named = {name: facts[name] for name in (*FIELDS, "extra")}
        return Record(image=place, **{**named, "box": box})

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def picture(self, index: int) -> Image.Image:
        """As `load_picture` of that record; one that cannot be read is also noted in `problems`."""
        record = self[index]
        try:
            return load_picture(record)
        except BadRecordError:
            name = f"{self._find(index)[0].name}: {record.key}"
            if name not in self._broken:
                self._broken.append(name)
            raise

    def row(self, shard: int, index: int) -> int:
        """The number of the record that `order` calls (shard, index)."""
        return self._starts[shard] + index

    def pairs(self, per_identity: int = 4) -> list[tuple[int, int]]:
        """(reference, target) numbers, by target.

        A person of whom any picture names a reference, or is one, is in the pairs so named. Of others, every two
        different pictures are a pair, in both orders, but no target is given more than `per_identity` references.
        """
        named = {*self._links.references, *self._links.references.values()}
        pairs = [(reference, target) for target, reference in self._links.references.items()]
        for rows in self._links.people.values():
            if named.isdisjoint(rows):
                steps = range(1, min(per_identity, len(rows) - 1) + 1)
                pairs += [(rows[(i + step) % len(rows)], row) for i, row in enumerate(rows) for step in steps]
        return sorted(pairs, key=lambda pair: (pair[1], pair[0]))

    @cached_property
    def mark(self) -> str:
        """Sixteen hexadecimal digits for what is in here: names, sizes, facts. Not for where it lies."""
        headers = [(part.name, part.index.header) for part in self._parts]
        whole = [[METADATA if header["folder"] else name, header["digest"]] for name, header in headers]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]

    @property
    def problems(self) -> dict[str, list[str]]:
        """What is broken, by reason, each as "SHARD: KEY". Pictures are decoded when read, so those are noted then."""
        found: dict[str, list[str]] = {}
        for part in self._parts:
            for reason, keys in part.index.header["problems"].items():
                found.setdefault(reason, []).extend(f"{part.name}: {key}" if key else part.name for key in keys)
        found.update({reason: list(names) for reason, names in self._links.problems.items()})
        return {**found, "a picture that cannot be decoded": list(self._broken)} if self._broken else found

    def _find(self, index: int) -> tuple["_Part", int]:
        number = range(len(self))[index]
        place = int(np.searchsorted(self._ends, number, side="right"))
        return self._parts[place], number - (self._ends[place - 1] if place else 0)

    @cached_property
    def _links(self) -> "_Links":
        return _resolve_references(self._parts)


@dataclass(frozen=True)
class _Part:
    """A shard, or a folder with a metadata.jsonl, and what is in it."""

    filesystem: Any
    path: str
    index: "Index"

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def counts(self) -> list[int]:
        """Records, a shard at a time."""
        step = _FOLDER_SHARD_SIZE if self.index.header["folder"] else max(len(self.index), 1)
        return [min(step, len(self.index) - start) for start in range(0, max(len(self.index), 1), step)]


# --- who belongs to whom ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Links:
    references: dict[int, int]  # target: reference
    people: dict[str, list[int]]  # identity: its records
    problems: dict[str, list[str]]


def _resolve_references(parts: Sequence[_Part]) -> _Links:
    """Follow every reference, once all keys are known."""
    links = _Links({}, {}, {})
    rows: dict[str, list[tuple[int, int]]] = {}  # key: (part, number)
    wanted = []
    identities: dict[int, str] = {}
    numbered = ((place, part, row) for place, part in enumerate(parts) for row in range(len(part.index)))
    for number, (place, part, row) in enumerate(numbered):
        facts = json.loads(part.index.line(row))
        rows.setdefault(facts["key"], []).append((place, number))
        if len(rows[facts["key"]]) > 1:
            add_problem(links.problems, "a key that another shard has too", f"{part.name}: {facts['key']}")
        if facts["identity"] is not None:
            links.people.setdefault(facts["identity"], []).append(number)
            identities[number] = facts["identity"]
        if facts["reference"] is not None:
            wanted.append((place, number, facts["key"], facts["reference"]))
    for place, number, key, reference in wanted:
        there = rows.get(reference, [])
        # Keys need only be unique inside a shard: the own shard's come first.
        near = [row for row in there if row[0] == place] or there
        problem = _reference_problem(number, near, identities)
        if problem:
            add_problem(links.problems, problem, f"{parts[place].name}: {key}")
        else:
            links.references[number] = near[0][1]
    return links


def _reference_problem(target: int, found: Sequence[tuple[int, int]], identities: Mapping[int, str]) -> str:
    """What is wrong with the reference of `target`, or nothing."""
    if not found:
        return "a reference that does not exist"
    if len(found) > 1:
        return "a reference that several shards have"
    row = found[0][1]
    if row == target:
        return "a reference to itself"
    who = {identities[number] for number in (row, target) if number in identities}
    return "a reference to another person" if len(who) > 1 else ""


# --- the order of training --------------------------------------------------------------------------------------------
def order(count_by_shard: Sequence[int], seed: int, first: int, size: int, window: int = 8) -> list[tuple[int, int]]:
    """(shard, number in the shard) of the images number `first` to `first + size - 1`: a pure function of these.

    In each round every record comes once. Shards are shuffled anew each round and records among `window` shards that
    follow each other, so that only so many shards are being read at any time. A rank or a worker takes its part by
    asking for its own image numbers. Raises ConfigError if there are no records.
    """
    counts = tuple(count_by_shard)
    total = sum(counts)
    if not total:
        raise ConfigError("There are no records to put in order: check the data set, or what is wrong with it.")
    drawn: list[tuple[int, int]] = []
    while len(drawn) < size:
        epoch, place = divmod(first + len(drawn), total)
        ends = _windows(counts, seed, epoch, window)[1]
        number = int(np.searchsorted(ends, place, side="right"))
        shards, rows = _window(counts, seed, epoch, window, number)
        start = place - (int(ends[number - 1]) if number else 0)
        part = slice(start, start + size - len(drawn))
        drawn += zip(shards[part].tolist(), rows[part].tolist(), strict=True)
    return drawn


@lru_cache(maxsize=4)
def _windows(
    counts: tuple[int, ...], seed: int, epoch: int, window: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The shards in this round's order, and after how many records each window of them ends."""
    shards = _permutation(len(counts), seed, epoch, 0)
    sizes = np.add.reduceat(np.asarray(counts, np.int64)[shards], np.arange(0, len(shards), window))
    return shards, np.cumsum(sizes)


@lru_cache(maxsize=4)
def _window(
    counts: tuple[int, ...], seed: int, epoch: int, window: int, number: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Shard, and number in the shard, of each record of a window, shuffled."""
    shards = _windows(counts, seed, epoch, window)[0][number * window : (number + 1) * window]
    owners = np.repeat(shards, [counts[shard] for shard in shards])
    rows = np.concatenate([np.arange(counts[shard]) for shard in shards])
    shuffled = _permutation(len(owners), seed, epoch, number + 1)
    return owners[shuffled], rows[shuffled]


def _permutation(count: int, *seeds: int) -> NDArray[np.int64]:
    """By sorting raw bits, which numpy promises never to change; what its generators make of them, it does not."""
    bits = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(count)
    return np.argsort(bits, kind="stable")
