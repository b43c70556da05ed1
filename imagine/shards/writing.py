"""Write image records into webdataset shards, with checksums and a datasheet.

The same records give the same bytes. A shard is finished when its sidecar `00000.json` exists: the sidecar is written
last and holds the shard's checksum and its counts for the datasheet. A rerun resumes after the last finished shard.
A writer may therefore be killed at any time, on any filesystem, also where moving a file is not atomic.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from imagine.errors import BadRecordError, ConfigError
from imagine.shards.facts import FIELDS, PEOPLE
from imagine.shards.reading import Record
from imagine.shards.texts import json_object

FORMAT_VERSION = 1
SETTINGS = "settings.json"  # beside the shards: the settings that determine their contents

_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap width and height
_KEY = re.compile(r"[^./\\\s]+(/[^./\\\s]+)*")  # webdataset ends a key at the first dot


@dataclass(frozen=True)
class DatasheetInfo:
    """The parts of a datasheet that cannot be counted (Datasheets for Datasets, arXiv 1803.09010, shortened).

    `seeds` and `settings` determine the records: a folder that was started with other values is refused.
    """

    title: str
    purpose: str  # why the data set was made, and its suitable and unsuitable uses
    collection: str  # the origin of pictures and captions
    licence: str
    seeds: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


class ShardWriter:
    """Write records into shards 00000.tar, 00001.tar ..., and a datasheet at the end; a context manager.

    The same records give the same bytes. A shard appears when it is complete. After an interruption, a new writer for
    the same address resumes at the first unfinished shard: pass it the same records again, without the first
    `processed`.

    address: a folder on any fsspec filesystem. Raises ConfigError if it cannot be used or was started with other
    settings.
    """

    processed: int  # records, written and rejected, that finished shards account for

    def __init__(self, address: str | os.PathLike[str], about: DatasheetInfo, records_per_shard: int = 1000) -> None:
        if records_per_shard < 1:
            raise ConfigError(f"A shard cannot have {records_per_shard} records: choose 1 or more.")
        self._about, self._size = about, records_per_shard
        self._filesystem, self._folder = _open_folder(os.fspath(address), about, records_per_shard)
        self._finished: dict[str, dict[str, Any]] = {}  # shard name -> sidecar
        while (sidecar := self._sidecar(len(self._finished))) is not None:
            self._finished[f"{len(self._finished):05d}.tar"] = sidecar
        tallies = [_Tally.of(sidecar) for sidecar in self._finished.values()]
        self.processed = sum(tally.records + sum(tally.rejected.values()) for tally in tallies)
        self._tally, self._keys = _Tally(), set[str]()
        self._tar: tarfile.TarFile | None = None
        self._draft = Path()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            if self._tar is not None:
                self._close_shard()
            self._write_datasheet()
        elif self._tar is not None:  # an incomplete shard must not look finished
            self._tar.close()
            self._draft.unlink(missing_ok=True)

    def write(self, record: Record) -> None:
        """Add a record; its width and height are read from its picture.

        Raises BadRecordError, without writing anything, if it has no caption, an invalid key, a key that this shard
        already has, or a picture that is not a JPEG, PNG or WebP file. The caller may `reject` it and continue.
        """
        picture = record.read()
        if not record.caption:
            raise BadRecordError(f"Record {record.key} has no caption: add one.")
        if not _KEY.fullmatch(record.key) or record.key in self._keys:
            raise BadRecordError(f"{record.key!r} cannot be a key: use a key without dots that is unique in its shard.")
        width, height, ending = check_picture(record.key, picture)
        record = replace(record, width=width, height=height)
        members = {ending: picture, "txt": record.caption.encode("utf-8", "replace"), "json": _json_of(record)}
        tar = self._tar or self._open_shard()
        for name in sorted(members):
            member = tarfile.TarInfo(f"{record.key}.{name}")  # owner 0, mode 644, time 0: the same bytes every time
            member.size = len(members[name])
            tar.addfile(member, io.BytesIO(members[name]))
        self._keys.add(record.key)
        self._tally.add(record)
        if self._tally.records == self._size:
            self._close_shard()

    def reject(self, reason: str) -> None:
        """Count a record that was not written, for the datasheet; use the same short `reason` for equal cases."""
        self._tally.rejected[reason] += 1

    def _open_shard(self) -> tarfile.TarFile:
        self._draft = _draft(self._filesystem, self._path(f"{len(self._finished):05d}.tar"))
        self._tar = tarfile.open(self._draft, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 -- _close_shard closes it
        return self._tar

    def _close_shard(self) -> None:
        assert self._tar is not None
        self._tar.close()
        name = f"{len(self._finished):05d}.tar"
        facts = {"bytes": self._draft.stat().st_size, "sha256": _sha256(self._draft)}
        sidecar = {"shard": name, **facts, **self._tally.as_json()}
        _put(self._filesystem, self._draft, self._path(name))
        _put_text(self._filesystem, _pretty(sidecar), self._path(f"{name[:-4]}.json"))
        self._finished[name] = sidecar
        self._tar, self._tally, self._keys = None, _Tally(), set()

    def _sidecar(self, number: int) -> dict[str, Any] | None:
        """Return the sidecar of a shard; None if the shard is not finished."""
        name = self._path(f"{number:05d}")
        if not self._filesystem.exists(f"{name}.tar"):
            return None
        try:
            return json_object(self._filesystem.cat_file(f"{name}.json"))
        except FileNotFoundError:
            return None

    def _write_datasheet(self) -> None:
        sheet = _datasheet(self._about, self._finished, self._tally)
        _put_text(self._filesystem, _pretty(sheet), self._path("datasheet.json"))
        _put_text(self._filesystem, _as_markdown(sheet), self._path("datasheet.md"))

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"


def _open_folder(address: str, about: DatasheetInfo, records_per_shard: int) -> tuple[Any, str]:
    """Create the folder, or check that it was started with the same settings; return (filesystem, folder)."""
    wanted = {"version": FORMAT_VERSION, "records_per_shard": records_per_shard, **about.seeds, **about.settings}
    try:
        filesystem, folder = url_to_fs(address)
        filesystem.invalidate_cache()
        filesystem.makedirs(folder, exist_ok=True)
        if not filesystem.exists(f"{folder}/{SETTINGS}"):
            _put_text(filesystem, _pretty(wanted), f"{folder}/{SETTINGS}")
        stored = json_object(filesystem.cat_file(f"{folder}/{SETTINGS}")) or {}
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{address} cannot be used as the output folder ({error}): choose another one.") from error
    wanted = json.loads(json.dumps(wanted))  # as JSON returns it
    changed = [
        f"{name} {stored.get(name)}" for name in sorted({*stored, *wanted}) if stored.get(name) != wanted.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{address} holds shards made with {', '.join(changed)}: give the same settings, or choose another folder."
        )
    return filesystem, folder


def check_picture(key: str, picture: bytes) -> tuple[int, int, str]:
    """Return width and height, in upright orientation, and the file suffix of a picture that shards can hold.

    Raises BadRecordError if it is not a JPEG, PNG or WebP file.
    """
    try:
        with Image.open(io.BytesIO(picture)) as image:
            ending = _ENDINGS[image.format or ""]
            width, height = image.size
            if image.format == "PNG" and b"eXIf" not in picture and b"exif" not in picture:
                image.verify()  # checksums only: `getexif` without EXIF would decode the whole picture
                sideways = False
            else:
                sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
    except Exception as error:  # decoders raise many kinds of errors on damaged bytes
        raise BadRecordError(f"The picture of record {key} is not a JPEG, PNG or WebP file: convert it.") from error
    return (height, width, ending) if sideways else (width, height, ending)


def _json_of(record: Record) -> bytes:
    facts = {**{name: getattr(record, name) for name in FIELDS}, "captions": dict(record.captions)}
    facts |= {PEOPLE: [person.as_dict() for person in record.people]}
    known = {name: value for name, value in facts.items() if value not in (None, "", {}, [])}
    return (json.dumps({**record.extra, **known}, sort_keys=True) + "\n").encode()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _draft(filesystem: Any, path: str) -> Path:
    """Return a local file to write first: in the same folder if that is local, so that moving it is atomic."""
    if isinstance(filesystem, LocalFileSystem):
        return Path(f"{path}.part")
    handle, name = tempfile.mkstemp()
    os.close(handle)
    return Path(name)


def _put(filesystem: Any, draft: Path, path: str) -> None:
    """Move a finished local file to its place: atomically on a local filesystem, as one upload on a remote one."""
    if isinstance(filesystem, LocalFileSystem):
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    else:
        filesystem.put_file(str(draft), path)
        draft.unlink()


def _put_text(filesystem: Any, text: str, path: str) -> None:
    draft = _draft(filesystem, path)
    draft.write_text(text, encoding="utf-8", newline="\n")
    _put(filesystem, draft, path)


def _pretty(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, indent=1) + "\n"


# --- the datasheet ----------------------------------------------------------------------------------------------------
@dataclass
class _Tally:
    """The counts of records: a sidecar has those of its shard, the datasheet those of all shards."""

    records: int = 0
    pairs: int = 0  # records that name a reference
    boxes: int = 0  # records with a face box
    groups: int = 0  # records of several people; sidecars of shards without any do not name them
    identities: set[str] = field(default_factory=set)
    sources: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)  # "width x height" -> records
    manners: Counter[str] = field(default_factory=Counter)  # style of caption -> records
    words: Counter[str] = field(default_factory=Counter)  # number of words in the caption -> records
    rejected: Counter[str] = field(default_factory=Counter)  # reason -> rejected records

    @staticmethod
    def of(sidecar: Mapping[str, Any]) -> "_Tally":
        names = _Tally.__dataclass_fields__
        kinds = {name: type(value) for name, value in vars(_Tally()).items()}
        return _Tally(**{name: kinds[name](sidecar[name]) for name in names if name in sidecar})

    def add(self, record: Record) -> None:
        self.records += 1
        self.pairs += record.reference is not None
        self.boxes += record.box is not None
        self.groups += len(record.people) > 1
        self.identities |= {record.identity} if record.identity is not None else set()
        self.sources[record.source or "not given"] += 1
        self.sizes[f"{record.width} x {record.height}"] += 1
        self.manners.update(list(record.captions))  # Counter would add the values of a mapping
        self.words[str(len(record.caption.split()))] += 1

    def join(self, other: "_Tally") -> None:
        for name, count in vars(self).items():
            value = getattr(other, name)
            if isinstance(count, int):
                setattr(self, name, count + value)
            else:
                count.update(value)

    def as_json(self) -> dict[str, Any]:
        """Return the counts in a fixed order, so that the same records give the same bytes."""
        return {
            name: value if isinstance(value, int) else sorted(value) if isinstance(value, set) else _sorted(value)
            for name, value in vars(self).items()
            if name != "groups" or value
        }


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: counts[name] for name in sorted(counts, key=lambda name: (_numbers(name), name))}


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]


def _datasheet(about: DatasheetInfo, sidecars: Mapping[str, Mapping[str, Any]], unwritten: _Tally) -> dict[str, Any]:
    """Return the contents of datasheet.json; `unwritten` counts what was rejected after the last record."""
    whole = _Tally()
    for sidecar in sidecars.values():
        whole.join(_Tally.of(sidecar))
    whole.join(unwritten)
    counted = {**whole.as_json(), "identities": len(whole.identities)}
    shards = {name: {key: one[key] for key in ("records", "bytes", "sha256")} for name, one in sidecars.items()}
    return {**asdict(about), **counted, "shards": shards}


def _as_markdown(sheet: Mapping[str, Any]) -> str:
    """Return datasheet.md: the numbers of datasheet.json in a few sentences."""
    records = sheet["records"]
    size = sum(shard["bytes"] for shard in sheet["shards"].values())
    lines = [
        f"# {sheet['title']}",
        f"## Motivation\n{sheet['purpose']}",
        "## Composition",
        f"{records:,} records in {len(sheet['shards']):,} shards ({size / 1e6:,.1f} MB), "
        f"{sheet['identities']:,} identities, {sheet['pairs']:,} pairs"
        f"{_of_several(sheet.get('groups', 0))}.",
        f"- sources: {_listed(sheet['sources'])}",
        f"- picture sizes in pixels: {_listed(_most(sheet['sizes']))}",
        f"- words in a caption: {_describe_spread(sheet['words'])}; captions by style: {_listed(sheet['manners'])}",
        f"- with a face box: {sheet['boxes'] / max(records, 1):.1%}",
        "- `sha256` of every shard: in `datasheet.json`",
        f"## Collection\n{sheet['collection']}",
        f"Seeds: {_listed(sheet['seeds'])}. Settings: {_listed(sheet['settings'])}.",
        f"## Cleaning\nRejected: {_listed(sheet['rejected'])}.",
        f"## Distribution\nLicence: {sheet['licence']}",
    ]
    return "\n".join(lines) + "\n"


def _of_several(groups: int) -> str:
    return f", {groups:,} pictures of several people" if groups else ""


def _listed(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in counts.items()) or "none"


def _most(counts: Mapping[str, int], number: int = 5) -> dict[str, int]:
    most = dict(Counter(counts).most_common(number))
    rest = sum(counts.values()) - sum(most.values())
    return {**most, "other": rest} if rest else most


def _describe_spread(counts: Mapping[str, int]) -> str:
    """Describe the minimum, the maximum and the median of numbers that are counted by value."""
    values = sorted(Counter({int(value): count for value, count in counts.items()}).elements())
    return f"{values[0]} to {values[-1]}, median {values[len(values) // 2]}" if values else "none"
