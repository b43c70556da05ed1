"""Read image records by index from webdataset shards, and from plain folders of pictures.

A record is one picture with its captions and, if it is the target of a pair, the key of its reference. In a shard,
which is a plain tar file, a record is two or three consecutive members: `KEY.jpg`, `.png` or `.webp` with the original
bytes, `KEY.txt` with one caption, and `KEY.json` with all metadata. img2dataset writes this format and `webdataset`
reads it; the fields for pairs are ours (docs/data.md lists them). `imagine.shards.folders` has the layouts of folders.
All addresses are fsspec URLs or paths.

Records are read by index because the position in training is a number (images seen): `order` maps each image number to
a record.
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
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from PIL import Image

from imagine.errors import BadRecordError, ConfigError, PictureError
from imagine.shards.facts import FIELDS, PEOPLE
from imagine.shards.folders import METADATA, find_metadata, has_pictures, index_metadata, index_pictures
from imagine.shards.index import MISSING_SHARD, Index, not_a_shard, open_index
from imagine.shards.links import Links, resolve_links
from imagine.shards.people import RecordPerson

_INDEX_THREADS = 8  # shards that are indexed in parallel, because the network is the bottleneck
_SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz")
_FOLDER_SHARD_SIZE = 1000  # records; a folder is divided into such virtual shards for the order of training


# --- records ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ByteRange:
    """The place of a picture's bytes: `size` bytes from offset `start` in a file of an fsspec filesystem."""

    filesystem: Any = field(repr=False)
    path: str
    start: int
    size: int

    def read(self) -> bytes:
        """Read the bytes in one request; the result is shorter if the file was truncated.

        Raises OSError if the file cannot be read.
        """
        content: bytes = self.filesystem.cat_file(self.path, start=self.start, end=self.start + self.size)
        return content


@dataclass(frozen=True)
class Record:
    """One picture and its metadata.

    `width`, `height` and `box` are in pixels of the full picture in upright orientation; `load_picture` shrinks very
    large pictures.
    """

    key: str
    image: bytes | ByteRange = field(repr=False)  # a JPEG, PNG or WebP file, or its place
    caption: str  # the most detailed caption
    captions: Mapping[str, str] = field(default_factory=dict)  # by style: "terse", "dense", "rewritten"
    identity: str | None = None  # the same for all pictures of a person
    reference: str | None = None  # for the target of a pair: the key of its reference
    box: tuple[float, float, float, float] | None = None  # left, top, width, height of the face
    source: str = ""  # any word, such as "real" or "synthetic"
    width: int | None = None
    height: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # the JSON's other fields
    people: tuple[RecordPerson, ...] = ()  # of a picture that shows several people

    def read(self) -> bytes:
        """Return the bytes of the picture file.

        Raises BadRecordError if the file was changed or removed since the shard was opened, and OSError if the network
        or the disk fails, which does not mean that the record is bad.
        """
        if isinstance(self.image, bytes):
            return self.image
        try:
            content = self.image.read()
        except FileNotFoundError:
            content = None
        if content is None or len(content) != self.image.size:
            raise BadRecordError(
                f"Record {self.key} in {self.image.path} has changed since it was opened: open the data set again."
            )
        return content


def load_picture(record: Record) -> Image.Image:
    """Open the record's picture like every photo: RGB, upright, its longest side at most photos.MAX_SIDE.

    Raises BadRecordError, with the shard and the key, if it is damaged or not a picture; else the errors of
    `Record.read`.
    """
    from imagine.people.photos import open_photo  # imports torch, which writing shards does not need

    where = f" in {record.image.path}" if isinstance(record.image, ByteRange) else ""
    content = record.read()
    if (what := not_a_shard(content[:512])) and content:
        raise BadRecordError(f"Record {record.key}{where} cannot be used: it is {what}.")
    try:
        return open_photo(content)
    except PictureError as error:
        raise BadRecordError(f"Record {record.key}{where} cannot be used: {error}") from error


# --- reading ----------------------------------------------------------------------------------------------------------
def open_records(
    address: str | os.PathLike[str],
    cache: Path | None = None,
    captions: bool = True,
    shards: int | None = None,
    only_pictures: bool = False,
) -> "Records":
    """Open a data set of shards, or a folder of pictures in a layout of `imagine.shards.folders`.

    address: on any fsspec filesystem: a folder, one .tar, a glob, or braces as in `s3://bucket/{00000..00012}.tar`.
    cache: a local folder for the indices of shards; None means ~/.cache/imagine/shards.
    captions: leave out records without a caption, which cannot be trained on; False keeps them, for captioning.
    shards: open only this many of the first shards, for a trial; None means all.
    only_pictures: read the pictures below a folder and the texts beside them, whatever shards and metadata it has.
    Raises ConfigError if there are no records at the address. Broken records are left out: see `Records.problems`.
    """
    name = os.fspath(address)
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imagine" / "shards"
    try:
        filesystem, path = url_to_fs(_without_metadata(name))
        filesystem.invalidate_cache()
        if only_pictures:
            return Records([_Part(filesystem, path, index_pictures(filesystem, path, captions))])
        if not _is_shard(path) and (metadata := find_metadata(filesystem, path)) is not None:
            return Records([_Part(filesystem, path, index_metadata(filesystem, path, metadata, captions))])
        tars = [tar for one in _expand_braces(name) for tar in _tars(one)][:shards]
        if not tars and filesystem.isdir(path) and has_pictures(filesystem, path):
            return Records([_Part(filesystem, path, index_pictures(filesystem, path, captions))])
        with ThreadPoolExecutor(_INDEX_THREADS) as pool:
            parts = list(pool.map(lambda tar: _Part(tar[0], tar[1], open_index(tar[0], tar[1], cache, captions)), tars))
    except (OSError, ValueError, ImportError) as error:  # no permission, unknown protocol, missing package
        raise ConfigError(f"{name} cannot be opened ({error}): check the address.") from error
    _check_any_shard(name, parts)
    return Records(parts)


def _check_any_shard(name: str, parts: Sequence["_Part"]) -> None:
    """Raise ConfigError if no file at the address is a shard."""
    if all(MISSING_SHARD in part.index.header["problems"] for part in parts):
        raise ConfigError(
            f"There are no shards (*.tar), no {METADATA[0]} and no pictures at {name}: check the address."
        )
    reasons = {part.name: part.index.header.get("nothing", "") for part in parts}
    if all(reasons.values()):
        file, reason = next(one for one in reasons.items() if one[1] != MISSING_SHARD)
        raise ConfigError(f"No shard at {name} can be read. {file} is {reason}.")


def has_records(address: str | os.PathLike[str]) -> bool:
    """Return whether there are shards, metadata or pictures at the address, without reading them.

    Raises ConfigError if the address cannot be opened.
    """
    name = os.fspath(address)
    try:
        filesystem, path = url_to_fs(_without_metadata(name))
        if holds_records(filesystem, path):
            return True
        if any(filesystem.exists(tar) for one in _expand_braces(name) for filesystem, tar in _tars(one)):
            return True
        return filesystem.isdir(path) and has_pictures(filesystem, path)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{name} cannot be opened ({error}): check the address.") from error


def holds_records(filesystem: Any, path: str) -> bool:
    """Return whether a folder has a metadata file, or shards directly in it, and not only pictures."""
    if _is_shard(path):
        return False
    return find_metadata(filesystem, path) is not None or (
        filesystem.isdir(path) and any(_is_shard(name) for name in filesystem.ls(path, detail=False))
    )


def _without_metadata(name: str) -> str:
    names = "|".join(map(re.escape, METADATA))
    return re.sub(rf"(^|/)({names})$", "", name) or "."


def _is_shard(path: str) -> bool:
    return path.lower().endswith(_SHARD_ENDINGS)


def _expand_braces(address: str) -> list[str]:
    """Return the address once for each word or number in its braces."""
    braces = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", address)
    if braces is None:
        return [address]
    low, high, words = braces.groups()
    fills = words.split(",") if words else [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)]
    return [one for fill in fills for one in _expand_braces(address[: braces.start()] + fill + address[braces.end() :])]


def _tars(address: str) -> list[tuple[Any, str]]:
    """Return (filesystem, path) of every shard at an address without braces."""
    filesystem, path = url_to_fs(address)
    if re.search(r"[*?\[]", path) and not filesystem.exists(path):
        return [(filesystem, found) for found in sorted(filesystem.glob(path))]
    # Over HTTP, `isdir` downloads the file.
    if not _is_shard(path) and filesystem.isdir(path):
        names = filesystem.ls(path, detail=False)
        return [(filesystem, found) for found in sorted(names) if _is_shard(found)]
    return [(filesystem, path)]


class Records:
    """The records of a data set, by index, and the list of those that cannot be used."""

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
        """Return the record with this index, without reading its picture. Raises IndexError."""
        part, row = self._find(index)
        facts = json.loads(part.index.line(row))
        place = ByteRange(*part.file(facts.get("file")), facts["start"], facts["size"])
        box = None if facts["box"] is None else tuple(facts["box"])
        named = {name: facts[name] for name in (*FIELDS, "extra")}
        people = tuple(map(RecordPerson.from_dict, facts.get(PEOPLE, ())))
        return Record(image=place, **{**named, "box": box, "people": people})

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def picture(self, index: int) -> Image.Image:
        """Return `load_picture` of the record with this index; a picture that cannot be read is added to `problems`."""
        record = self[index]
        try:
            return load_picture(record)
        except BadRecordError:
            name = f"{self._find(index)[0].name}: {record.key}"
            if name not in self._broken:
                self._broken.append(name)
            raise

    def file(self, record: Record) -> str:
        """Return the path of the record's picture in the folder, or the key of a record in a shard."""
        path, (part, *_) = record.image.path if isinstance(record.image, ByteRange) else "", self._parts
        return path.removeprefix(f"{part.path.rstrip('/')}/") if part.index.header["folder"] else record.key

    def row(self, shard: int, index: int) -> int:
        """Return the index of the record that `order` gives as (shard, index in the shard)."""
        return self._starts[shard] + index

    def pairs(self, per_identity: int = 4) -> list[tuple[int, int]]:
        """Return pairs of indices (reference, target), sorted by target.

        For a person whose pictures name references, or are references, these are the named pairs. For other persons
        every two different pictures are a pair, in both orders, with at most `per_identity` references per target.
        """
        named = {*self._links.references, *self._links.references.values()}
        pairs = [(reference, target) for target, reference in self._links.references.items()]
        for rows in self._links.people.values():
            if named.isdisjoint(rows):
                steps = range(1, min(per_identity, len(rows) - 1) + 1)
                pairs += [(rows[(i + step) % len(rows)], row) for i, row in enumerate(rows) for step in steps]
        return sorted(pairs, key=lambda pair: (pair[1], pair[0]))

    def groups(self) -> dict[int, tuple[tuple[int, ...], ...]]:
        """Return the records of several people: index -> for each person, the indices of the references.

        These are the records that the person names, else at most four records with the person's identity. A person
        without any has an empty tuple, and a face box. Records whose references cannot be found are left out.
        """
        return dict(self._links.groups)

    @cached_property
    def mark(self) -> str:
        """Return a fingerprint of 16 hexadecimal digits: of names, sizes and metadata, but not of the address."""
        headers = [(part.name, part.index.header) for part in self._parts]
        whole = [[METADATA[0] if header["folder"] else name, header["digest"]] for name, header in headers]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]

    @property
    def problems(self) -> dict[str, list[str]]:
        """Return reason -> broken records as "SHARD: KEY"; broken pictures appear only after they were read."""
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
    def _links(self) -> Links:
        return resolve_links([(part.name, part.index) for part in self._parts])


@dataclass(frozen=True)
class _Part:
    """A shard, or a folder of pictures, and its index."""

    filesystem: Any
    path: str
    index: "Index"

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    def file(self, picture: str | None) -> tuple[Any, str]:
        """Return filesystem and path of a picture of a folder, or of the shard that holds all pictures."""
        header = self.index.header
        if picture is not None:
            folder = f"{self.path}/{header['within']}" if header["within"] else self.path
            return self.filesystem, f"{folder}/{picture}"
        return (LocalFileSystem(), header["unpacked"]) if "unpacked" in header else (self.filesystem, self.path)

    @property
    def counts(self) -> list[int]:
        """Return the number of records in each shard, or in each virtual shard of a folder."""
        step = _FOLDER_SHARD_SIZE if self.index.header["folder"] else max(len(self.index), 1)
        return [min(step, len(self.index) - start) for start in range(0, max(len(self.index), 1), step)]


# --- the order of training --------------------------------------------------------------------------------------------
def order(count_by_shard: Sequence[int], seed: int, first: int, size: int, window: int = 8) -> list[tuple[int, int]]:
    """Return (shard, index in the shard) of the images `first` to `first + size - 1`; a pure function of its arguments.

    Every epoch contains each record once. Each epoch shuffles the shards, and shuffles records among `window`
    consecutive shards, so that at most `window` shards are read at a time. A rank or a worker gets its part by passing
    its own image numbers. Raises ConfigError if there are no records.
    """
    counts = tuple(count_by_shard)
    total = sum(counts)
    if not total:
        raise ConfigError("The data set has no usable records: check its address and its list of problems.")
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
    """Return the shards in the order of this epoch, and the cumulative number of records at the end of each window."""
    shards = _permutation(len(counts), seed, epoch, 0)
    sizes = np.add.reduceat(np.asarray(counts, np.int64)[shards], np.arange(0, len(shards), window))
    return shards, np.cumsum(sizes)


@lru_cache(maxsize=4)
def _window(
    counts: tuple[int, ...], seed: int, epoch: int, window: int, number: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the shard and the index in the shard of each record of a window, shuffled."""
    shards = _windows(counts, seed, epoch, window)[0][number * window : (number + 1) * window]
    owners = np.repeat(shards, [counts[shard] for shard in shards])
    rows = np.concatenate([np.arange(counts[shard]) for shard in shards])
    shuffled = _permutation(len(owners), seed, epoch, number + 1)
    return owners[shuffled], rows[shuffled]


def _permutation(count: int, *seeds: int) -> NDArray[np.int64]:
    """Return a permutation by sorting raw bits, because numpy guarantees only the raw bit stream across versions."""
    bits = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(count)
    return np.argsort(bits, kind="stable")
