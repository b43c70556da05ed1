"""Index a folder of pictures, with the metadata and captions in any of the layouts that tools for training use.

With a `metadata.jsonl` or a `metadata.csv` the folder is read as Hugging Face's imagefolder; both may also lie in its
folder `train`. Without one, every picture below the folder is a record, with the caption of the text file of the same
name, as kohya's trainer and others have it: `NAME.txt`, `NAME.caption` or `NAME.jpg.txt`, in any case, and with the
facts of `NAME.json`. A folder `10_some words` there gives its pictures 10 repeats, and their caption if they have none.
"""

import csv
import hashlib
import io
import json
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from imagine.errors import ConfigError
from imagine.shards.facts import (
    BAD_JSON,
    MOST_REPEATS,
    NO_PICTURE,
    PEOPLE,
    PICTURE_ENDING,
    TEXTS,
    UNREAD_SPLIT,
    USED_TWICE,
    Problems,
    add_problem,
    normalised_facts,
    of_table,
)
from imagine.shards.index import DIGEST_VERSION, Index, captioned, not_a_shard, row_of, serialised
from imagine.shards.texts import LARGEST_TEXT, decode_text, parse_json, unicode_text

METADATA = ("metadata.jsonl", "metadata.csv")
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing")  # the first ones are trained on
_TRAINED_SPLITS = 2
_REPEATS = re.compile(r"(\d{1,4})_(.*)")
_LINE = re.compile(r"\r\n|\r|\n")


def find_metadata(filesystem: Any, folder: str) -> str | None:
    """Return the path of the folder's metadata file, in the folder or in its split for training; None without one."""
    folders = [folder, *(f"{folder}/{split}" for split in _SPLITS[:_TRAINED_SPLITS])]
    paths = (f"{place}/{name}" for place in folders for name in METADATA)
    return next((path for path in paths if filesystem.exists(path)), None)


def index_metadata(filesystem: Any, folder: str, metadata: str, captions: bool = True) -> Index:
    """Index the pictures that a metadata file below `folder` lists, and check that they exist.

    captions: leave out records without a caption. Raises ConfigError if the metadata is no text.
    """
    problems: Problems = {}
    place = metadata.rpartition("/")[0]
    files = _Files(filesystem, place)
    rows: dict[str, dict[str, Any]] = {}
    for number, facts in _listed_facts(filesystem.cat_file(metadata), metadata):
        if facts is None:
            add_problem(problems, BAD_JSON, f"line {number}")
            continue
        given = unicode_text(facts.pop("file_name", None)) or unicode_text(facts.pop("file", None))
        file = files.find(given)
        if file is None:
            add_problem(problems, NO_PICTURE, given or f"line {number}")
            continue
        row = _listed_row(file, facts, files, problems, captions)
        if row is not None and rows.setdefault(row["key"], row) is not row:
            add_problem(problems, USED_TWICE, row["key"])
    for split in _SPLITS if place != folder else ():
        if f"{folder}/{split}" != place and any(filesystem.exists(f"{folder}/{split}/{name}") for name in METADATA):
            add_problem(problems, UNREAD_SPLIT, split)
    return _index(rows.values(), problems, "" if place == folder else place.rpartition("/")[2])


def index_pictures(filesystem: Any, folder: str, captions: bool = True) -> Index:
    """Index every picture below a folder, with the caption of the text file of the same name.

    captions: leave out records without a caption.
    """
    problems: Problems = {}
    files = _Files(filesystem, folder)
    pictures = [name for name in sorted(files.sizes) if PICTURE_ENDING.search(name)]
    beside = {name: _texts_beside(name, files) for name in pictures}
    contents = _contents(filesystem, folder, files, {file for both in beside.values() for file in both if file})
    rows: dict[str, dict[str, Any]] = {}
    for name in pictures:
        key = PICTURE_ENDING.sub("", name)
        key = name if key in rows else key  # a.jpg and a.png
        text, facts = (
            contents[file] if file else nothing for file, nothing in zip(beside[name], (b"", b"{}"), strict=True)
        )
        row = row_of({"key": key, **files.place(name)}, text, facts, problems, captions=False)
        if row is None:
            continue
        row["caption"] = " ".join(row["caption"].split())
        if captioned(_with_folder_name(row, name, folder), problems, captions) is not None:
            rows[key] = row
    return _index(rows.values(), problems, "")


def has_pictures(filesystem: Any, folder: str) -> bool:
    """Return whether there is a picture anywhere below the folder."""
    return any(PICTURE_ENDING.search(name) for name in _Files(filesystem, folder).sizes)


class _Files:
    """The files below a folder, by their path in it; hidden files are not among them."""

    def __init__(self, filesystem: Any, folder: str) -> None:
        root = folder.rstrip("/")
        found = filesystem.find(folder, detail=True)
        names = {path[len(root) + 1 :]: int(info["size"] or 0) for path, info in found.items()}
        self.sizes = {name: size for name, size in names.items() if not _is_hidden(name)}
        self._roots = [f"{each.replace(os.sep, '/')}/" for each in {root, os.path.realpath(root)}]
        self._loose: dict[str, list[str]] = {}
        for name in self.sizes:
            self._loose.setdefault(_loosely(name), []).append(name)

    def find(self, name: str) -> str | None:
        """Return the file that a name stands for; None if there is none, or if several differ only in case.

        The name may have backslashes, a leading `./`, the folder's own path before it, another case or another Unicode
        form than on disk.
        """
        if name in self.sizes:
            return name
        path = name.replace("\\", "/").removeprefix("file://")
        inside = next((path[len(root) :] for root in self._roots if path.startswith(root)), path)
        cleaned = posixpath.normpath(inside)
        if cleaned in self.sizes:
            return cleaned
        found = self._loose.get(_loosely(cleaned), [])
        return found[0] if len(found) == 1 else None

    def place(self, name: str) -> dict[str, Any]:
        """Return the place of a picture for its row."""
        return {"file": name, "start": 0, "size": self.sizes[name]}


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _loosely(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _listed_facts(content: bytes, path: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield line numbers and metadata of a metadata file; None for a line that is not an object of JSON."""
    text = decode_text(content)
    if text is None or not_a_shard(content[:512]):
        what = not_a_shard(content[:512]) or "not a text: save it as UTF-8"
        raise ConfigError(f"{path} is {what}.")
    if path.endswith(".csv"):
        header = text.split("\n", 1)[0]
        separator = max(",;\t", key=header.count)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, restkey="")
        for row in reader:
            row.pop("", None)  # cells without a column
            yield reader.line_num, of_table(row)
        return
    whole = parse_json(text) if text.lstrip().startswith("[") else None
    if isinstance(whole, list) and all(isinstance(facts, dict) for facts in whole):  # one list instead of lines
        yield from enumerate(whole, 1)
        return
    for number, line in enumerate(_LINE.split(text), 1):
        if line.strip():
            facts = parse_json(line)
            yield number, facts if isinstance(facts, dict) else None


def _listed_row(
    file: str, facts: dict[str, Any], files: _Files, problems: Problems, captions: bool
) -> dict[str, Any] | None:
    """Return a record as a row of the index; its key, also in references, is the picture's name without the suffix."""
    key = PICTURE_ENDING.sub("", file)
    row = normalised_facts(unicode_text(facts.pop("text", None)), facts, key, problems)
    if row["reference"]:
        row["reference"] = _key_of(row["reference"], files)
    for person in row.get(PEOPLE) or ():
        if "references" in person:
            person["references"] = [_key_of(name, files) for name in person["references"]]
    return captioned({"key": key, **files.place(file), **row}, problems, captions)


def _key_of(name: str, files: _Files) -> str:
    """Return the key of the record whose picture has this name."""
    return PICTURE_ENDING.sub("", files.find(name) or posixpath.normpath(name))


def _texts_beside(picture: str, files: _Files) -> tuple[str | None, str | None]:
    """Return the files beside a picture with its caption and with its metadata."""
    stems = (PICTURE_ENDING.sub("", picture), picture)
    texts = (files.find(f"{stem}.{ending}") for stem in stems for ending in TEXTS)
    facts = (files.find(f"{stem}.json") for stem in stems)
    return next(filter(None, texts), None), next(filter(None, facts), None)


def _contents(filesystem: Any, folder: str, files: _Files, wanted: Iterable[str]) -> dict[str, bytes | None]:
    """Return the contents of text files, in as few requests as the filesystem allows; None for one that is too long."""
    names = sorted(wanted)
    paths = {name: f"{folder.rstrip('/')}/{name}" for name in names if files.sizes[name] <= LARGEST_TEXT}
    read: Mapping[str, bytes] = filesystem.cat(list(paths.values()), on_error="omit") if paths else {}
    return {name: read.get(paths[name], b"") if name in paths else None for name in names}


def _with_folder_name(row: dict[str, Any], name: str, folder: str) -> dict[str, Any]:
    """Add the repeats and, if the picture has none, the caption that the name of its folder gives."""
    parent = f"{folder.rstrip('/')}/{name}".split("/")[-2]
    found = _REPEATS.fullmatch(parent)
    if found and 1 <= int(found[1]) <= MOST_REPEATS:
        row["extra"].setdefault("repeats", int(found[1]))
        row["caption"] = row["caption"] or found[2].strip()
    return row


def _index(rows: Iterable[dict[str, Any]], problems: Problems, within: str) -> Index:
    """Return an index of these rows; `within` is the folder inside the data set that their files lie in."""
    whole = list(rows)
    digest = hashlib.sha256(f"{DIGEST_VERSION}\n{json.dumps(whole)}".encode()).hexdigest()
    return Index(np.frombuffer(serialised(whole, problems, digest=digest, folder=True, within=within), np.uint8))
