"""Write finished pairs into webdataset shards: each reference once, before its first target.

Shards are a copy of results in the store. A shard that already exists with the same records is not written again; all
shards from the first different one on are. They differ after an interruption, after a changed threshold, or once
deferred items are finished.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from types import TracebackType
from typing import Any

from fsspec.core import url_to_fs

from data_synth.records import Pair, Reference
from data_synth.store import Store
from imagine.errors import ConfigError
from imagine.shards.reading import Record
from imagine.shards.texts import json_object
from imagine.shards.writing import SETTINGS, DatasheetInfo, ShardWriter

# facts that a record stores in other fields, or that are not needed
_OMITTED = ("box", "captions", "source", "hash", "similarity")


class PairShards:
    """Writes pairs in order, and a data sheet at the end; a context manager."""

    def __init__(self, address: str, about: DatasheetInfo, records_per_shard: int, store: Store) -> None:
        self._address, self._about, self._size, self._store = address.rstrip("/"), about, records_per_shard, store
        try:
            self._filesystem, self._folder = url_to_fs(self._address)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(
                f"{address} cannot be used as the output folder ({error}): choose another one."
            ) from error
        self._written: dict[str, str] = store.read_note(self._note_name) or {}
        self._writer: ShardWriter | None = None
        self._number = 0  # of the current shard
        self._buffer: list[Record | str] = []  # its records, and the reasons of the rejections between them
        self._records = 0
        self._reference = ""

    def __enter__(self) -> "PairShards":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._writer is not None:
            self._writer.__exit__(kind, error, trace)

    def write(self, pair: Pair) -> None:
        """Add a pair, and its reference unless the previous pair has the same one."""
        if pair.reference.key != self._reference:
            self._add(_reference_record(pair))
            self._reference = pair.reference.key
        self._add(_target_record(pair))

    def reject(self, reason: str) -> None:
        """Count a rejection for the data sheet."""
        self._buffer.append(reason)

    @property
    def _note_name(self) -> str:
        return _note_name(self._address)

    def _add(self, record: Record) -> None:
        self._buffer.append(record)
        self._records += 1
        if self._records == self._size:
            self._flush()

    def _flush(self) -> None:
        """Write the complete shard, unless it already exists."""
        content_hash = _content_hash(self._buffer)
        if self._writer is not None or not self._is_written(content_hash):
            self._open()
            self._write_buffer()
            self._record_shard(content_hash)
        self._number, self._records, self._buffer = self._number + 1, 0, []

    def _is_written(self, content_hash: str) -> bool:
        name = f"{self._folder}/{self._number:05d}"
        found = self._written.get(str(self._number)) == content_hash
        return found and self._filesystem.exists(f"{name}.tar") and self._filesystem.exists(f"{name}.json")

    def _write_buffer(self) -> None:
        assert self._writer is not None
        for one in self._buffer:
            if isinstance(one, Record):
                self._writer.write(one)
            else:
                self._writer.reject(one)

    def _record_shard(self, content_hash: str) -> None:
        self._written[str(self._number)] = content_hash
        self._store.write_note(self._note_name, self._written)

    def _open(self) -> None:
        """Open a writer that resumes at the current shard, and delete this shard and all later ones."""
        if self._writer is not None:
            return
        check_foreign_shards(self._address, self._store)
        self._written = {
            number: content_hash for number, content_hash in self._written.items() if int(number) < self._number
        }
        self._store.write_note(self._note_name, self._written)
        # Delete the sidecars first: they mark a shard as complete.
        for name in self._filesystem.glob(f"{self._folder}/[0-9]*.json"):
            self._remove(name, ".json")
        for name in self._filesystem.glob(f"{self._folder}/[0-9]*.tar"):
            self._remove(name, ".tar")
        if self._filesystem.exists(f"{self._folder}/{SETTINGS}"):
            self._filesystem.rm_file(f"{self._folder}/{SETTINGS}")  # a build may continue after its thresholds changed
        self._writer = ShardWriter(self._address, self._about, self._size)

    def _remove(self, name: str, ending: str) -> None:
        number = name.rsplit("/", 1)[-1].removesuffix(ending)
        if number.isdigit() and int(number) >= self._number:
            self._filesystem.rm_file(name)

    def _finish(self) -> None:
        """Write the last shard, which may be shorter, and the data sheet."""
        content_hash, short = _content_hash(self._buffer), self._records > 0
        if short and self._writer is None and self._is_written(content_hash):
            self._number, short, self._buffer = self._number + 1, False, []
        self._open()
        assert self._writer is not None
        self._write_buffer()
        self._writer.__exit__(None, None, None)
        if short:
            self._record_shard(content_hash)


def check_foreign_shards(address: str, store: Store) -> None:
    """Raise ConfigError if `address` holds shards that no build wrote, because the build would overwrite them."""
    filesystem, folder = url_to_fs(address.rstrip("/"))
    filesystem.invalidate_cache()
    found = [name for name in filesystem.glob(f"{folder}/[0-9]*") if re.search(r"/\d+\.(tar|json)$", name)]
    if not found:
        return
    if filesystem.exists(f"{folder}/{SETTINGS}"):
        ours = "pairs" in (json_object(filesystem.cat_file(f"{folder}/{SETTINGS}")) or {})
    else:
        # a build was killed after it deleted the old settings
        ours = bool(store.read_note(_note_name(address.rstrip("/"))))
    if not ours:
        raise ConfigError(
            f"{address} holds shards that no build wrote ({found[0].rpartition('/')[2]}): choose another output folder."
        )


def _note_name(address: str) -> str:
    return f"shards {address}"


def _reference_record(pair: Pair) -> Record:
    reference, caption = pair.reference, pair.spec.caption or pair.reference.caption or pair.spec.prompt
    facts = reference.facts
    return Record(
        key=reference.key,
        image=reference.image,
        caption=caption,
        captions={**_mapping(facts, "captions"), "dense": caption},
        identity=_person_of(reference),
        box=_box(facts),
        source="real",
        extra=_extra(facts),
    )


def _target_record(pair: Pair) -> Record:
    target, prompt = pair.target, pair.spec.prompt
    measured = {spec.name: getattr(pair.measures, spec.name) for spec in fields(pair.measures)}
    return Record(
        key=target.key,
        image=target.image,
        caption=prompt,
        captions={"dense": prompt, "rewritten": prompt, **_mapping(target.facts, "captions")},
        identity=_person_of(pair.reference),
        reference=pair.reference.key,
        box=_box(target.facts),
        source="real" if "photo" in target.facts else "synthetic",
        extra={
            **_extra(target.facts),
            "attributes": dict(measured.pop("attributes")),
            "aims": dict(pair.spec.aims),
            "measures": measured,
            "made": {"seed": pair.spec.seed, "attempt": target.attempt, "round": target.round},
        },
    )


def _person_of(reference: Reference) -> str:
    return reference.person or reference.key


def _mapping(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = facts.get(name)
    return dict(value) if isinstance(value, Mapping) else {}


def _box(facts: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    box = facts.get("box")
    return None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3]))


def _extra(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in _OMITTED}


def _content_hash(events: list[Record | str]) -> str:
    """Return a hash of a shard's records and rejections."""
    whole = hashlib.sha256()
    for one in events:
        if isinstance(one, Record):
            facts = {spec.name: getattr(one, spec.name) for spec in fields(one) if spec.name != "image"}
            whole.update(json.dumps(facts, sort_keys=True, default=dict).encode() + one.read())
        else:
            whole.update(json.dumps(one).encode())
    return whole.hexdigest()
