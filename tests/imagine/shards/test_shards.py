"""Tests of shards: written records are read back, broken ones are counted and left out, and the order is complete."""

import gc
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image

from imagine.errors import BadRecordError, ConfigError
from imagine.shards import index as shard_index
from imagine.shards.reading import Record, Records, load_picture, open_records, order
from imagine.shards.writing import DatasheetInfo, ShardWriter
from tests.pictures import gradient
from tests.root import ROOT
from tests.tars import tar

ABOUT = DatasheetInfo(
    "A test", "To test with.", "Gradients.", "CC0-1.0", seeds={"seed": 3}, settings={"people": "none"}
)


def picture(number: int = 0, kind: str = "PNG", size: tuple[int, int] = (40, 32), **options: Any) -> bytes:
    content = io.BytesIO()
    image = gradient(*size)
    image.putpixel((0, 0), (number, 0, 0))
    image.save(content, kind, **options)
    return content.getvalue()


def record(number: int, **changes: Any) -> Record:
    """Record `number`; every third is a reference, and the next two are its targets."""
    person, place = divmod(number, 3)
    plain = Record(
        key=f"{number:09d}",
        image=picture(number),
        caption=f"somebody, take {number}, seen from the front",
        captions={"terse": f"take {number}", "dense": f"somebody, take {number}, seen from the front"},
        identity=f"p{person}",
        reference=f"{person * 3:09d}" if place else None,
        box=(4.0, 5.5, 10.0, 12.0),
        source="synthetic" if place else "real",
        extra={"pose": [1, 2], "url": "none"},
    )
    return replace(plain, **changes)


def write(folder: object, records: Iterable[Record], size: int = 4, about: DatasheetInfo = ABOUT) -> None:
    with ShardWriter(str(folder), about, size) as writer:
        for one in list(records)[writer.processed :]:
            writer.write(one)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "imagine" / "shards"


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten records in shards of four."""
    folder = tmp_path_factory.mktemp("ten")
    write(folder, map(record, range(10)))
    return folder


# --- writing ----------------------------------------------------------------------------------------------------------
def test_written_records_are_read_back(ten: Path) -> None:
    records = open_records(ten)
    assert (len(records), records.counts, records.problems) == (10, (4, 4, 2), {})
    for number, found in enumerate(records):
        assert found.read() == picture(number)
        assert replace(found, image=b"") == record(number, image=b"", width=40, height=32)
    assert records[-1].key == "000000009"
    with pytest.raises(IndexError):
        records[10]


def test_the_webdataset_package_reads_the_shards(ten: Path) -> None:
    shards = [str(path) for path in sorted(ten.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        found = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil"))
        gc.collect()
    assert [sample["__key__"] for sample in found] == [f"{number:09d}" for number in range(10)]
    assert found[4]["png"].size == (40, 32)
    assert found[4]["txt"] == "somebody, take 4, seen from the front"
    assert found[4]["json"]["reference"] == "000000003"


def test_tar_lists_the_shards(ten: Path) -> None:
    listed = subprocess.run(["tar", "tf", str(ten / "00002.tar")], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == [f"00000000{n}.{end}" for n in (8, 9) for end in ("json", "png", "txt")]


def test_same_records_same_bytes(ten: Path, tmp_path: Path) -> None:
    write(tmp_path / "again", map(record, range(10)))
    assert contents(tmp_path / "again") == contents(ten)
    assert set(contents(ten)) == {
        *(f"0000{n}.{end}" for n in range(3) for end in ("tar", "json")),
        *("datasheet.json", "datasheet.md", "settings.json"),
    }


@pytest.mark.parametrize("left", ["nothing", "a draft", "a shard without its sidecar", "a torn sidecar"])
def test_a_resumed_run_equals_an_uninterrupted_run(left: str, ten: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    with pytest.raises(ZeroDivisionError), ShardWriter(folder, ABOUT, 4) as writer:
        for number in range(10):
            writer.write(record(number) if number < 7 else record(1 // 0))
    assert set(contents(folder)) == {"00000.tar", "00000.json", "settings.json"}
    if left != "nothing":
        name = "00001.tar.part" if left == "a draft" else "00001.tar"
        (folder / name).write_bytes((ten / "00001.tar").read_bytes()[:3000])
    if left == "a torn sidecar":
        (folder / "00001.json").write_bytes((ten / "00001.json").read_bytes()[:50])
    whole = (folder / "00000.tar").stat().st_ino
    with ShardWriter(folder, ABOUT, 4) as writer:
        assert writer.processed == 4
        for number in range(writer.processed, 10):
            writer.write(record(number))
    assert contents(folder) == contents(ten)
    assert (folder / "00000.tar").stat().st_ino == whole, "a finished shard was written again"


def test_a_resumed_run_after_sigkill_equals_an_uninterrupted_run(ten: Path, tmp_path: Path) -> None:
    code = """
import os, signal, sys
from imagine.shards.reading import open_records
from imagine.shards.writing import DatasheetInfo, ShardWriter
about = DatasheetInfo(**eval(sys.argv[3]))
with ShardWriter(sys.argv[2], about, 4) as writer:
    for number, one in enumerate(open_records(sys.argv[1])):
        writer.write(one)
        if number == 6:
            os.kill(os.getpid(), signal.SIGKILL)
"""
    call = [sys.executable, "-c", code, str(ten), str(tmp_path / "killed"), repr(asdict(ABOUT))]
    assert subprocess.run(call, cwd=ROOT).returncode == -signal.SIGKILL
    assert "00001.tar.part" in contents(tmp_path / "killed")
    write(tmp_path / "killed", map(record, range(10)))
    assert contents(tmp_path / "killed") == contents(ten)


def test_another_filesystem_gets_the_same_bytes_and_is_read(ten: Path, tmp_path: Path) -> None:
    write("memory://shards/ten", map(record, range(10)))
    memory = fsspec.filesystem("memory")
    assert {name: memory.cat_file(f"/shards/ten/{name}") for name in contents(ten)} == contents(ten)
    for address in ("memory://shards/ten", "memory://shards/ten/{00000..00002}.tar", "memory://shards/ten/*.tar"):
        records = open_records(address)
        assert (len(records), records.mark) == (10, open_records(ten).mark)
        assert records[7].read() == picture(7)
    local = open_records("simplecache::memory://shards/ten/0000{0,1}.tar")
    assert (len(local), local[7].read()) == (8, picture(7))


def test_sidecars_and_datasheet_count_records(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, ABOUT, 4) as writer:
        writer.write(record(0, image=picture(0, "JPEG", (64, 48))))
        writer.reject("no face")
        for number in range(1, 5):
            writer.write(record(number, box=None if number == 4 else (1.0, 2.0, 3.0, 4.0)))
        writer.reject("no face")
        writer.reject("too small")
    sheet = json.loads((tmp_path / "datasheet.json").read_text())
    numbers = {"records": 5, "pairs": 3, "boxes": 4, "identities": 2, "sources": {"real": 2, "synthetic": 3}}
    assert numbers.items() <= sheet.items()
    assert sheet["sizes"] == {"40 x 32": 4, "64 x 48": 1}
    assert sheet["rejected"] == {"no face": 2, "too small": 1}
    assert (sheet["licence"], sheet["seeds"]) == ("CC0-1.0", {"seed": 3})
    listed = subprocess.run(["sha256sum", "00000.tar"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sheet["shards"]["00000.tar"]["sha256"] == listed.stdout.split()[0]
    page = (tmp_path / "datasheet.md").read_text()
    assert "5 records in 2 shards" in page and "no face 2" in page and "face box: 80.0%" in page
    assert ShardWriter(tmp_path, ABOUT, 4).processed == 5 + 3


def test_the_datasheet_counts_rejections_after_the_last_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, ABOUT, 1) as writer:
        writer.write(record(0))
        writer.reject("no face")
    assert json.loads((tmp_path / "datasheet.json").read_text())["rejected"] == {"no face": 1}
    assert ShardWriter(tmp_path, ABOUT, 1).processed == 1  # a rerun rejects it again


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"caption": ""}, "has no caption"),
        ({"key": "a.b"}, "'a.b' cannot be a key"),
        ({"key": "000000000"}, "'000000000' cannot be a key"),
        ({"image": b"no picture"}, "is not a JPEG, PNG or WebP"),
        ({"image": picture(0, "GIF")}, "is not a JPEG, PNG or WebP"),
    ],
)
def test_a_bad_record_is_refused_and_writes_nothing(
    change: dict[str, Any], sentence: str, ten: Path, tmp_path: Path
) -> None:
    with ShardWriter(tmp_path, ABOUT, 4) as writer:
        for number in range(10):
            if number == 1:
                with pytest.raises(BadRecordError, match=sentence):
                    writer.write(record(number, **change))
            writer.write(record(number))
    assert contents(tmp_path) == contents(ten)


def test_a_folder_with_other_settings_is_refused(ten: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="made with records_per_shard 4, seed 3: give the same"):
        ShardWriter(ten, replace(ABOUT, seeds={"seed": 4}), 5)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used as the output folder"):
        ShardWriter(tmp_path / "file", ABOUT)
    with pytest.raises(ConfigError, match="A shard cannot have 0 records"):
        ShardWriter(tmp_path, ABOUT, 0)


# --- reading ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "count"),
    [("", 10), ("/00001.tar", 4), ("/{00000..00001}.tar", 8), ("/0000{0,2}.tar", 6), ("/0000[12].tar", 6)],
)
def test_every_form_of_address(name: str, count: int, ten: Path) -> None:
    assert len(open_records(f"{ten}{name}")) == count


@pytest.mark.parametrize(
    "name", ["nowhere", "nowhere/{00000..00003}.tar", "nowhere/*.tar", "nosuch://a/b.tar", "empty"]
)
def test_an_address_without_records_is_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="check the address") as raised:
        open_records(name if ":" in name else tmp_path / name)
    assert "\n" not in str(raised.value)


def test_img2dataset_shards_are_read(tmp_path: Path) -> None:
    facts = {"caption": "a web caption", "key": "000000007", "url": "https://x/y", "status": "success", "exif": "{}"}
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as writer:
        for number in range(3):
            words = {**facts, "key": f"{number:09d}", "width": 40, "height": 32}
            sample = {"jpg": picture(number, "JPEG"), "txt": "a web caption", "json": json.dumps(words)}
            writer.write({"__key__": f"{number:09d}", **sample})
    (tmp_path / "00000_stats.json").write_text("{}")
    records = open_records(tmp_path)
    assert (len(records), records.problems) == (3, {})
    found = records[2]
    assert (found.key, found.caption, found.width, found.captions) == ("000000002", "a web caption", 40, {})
    assert found.extra["url"] == "https://x/y" and "caption" not in found.extra
    assert load_picture(found).size == (40, 32)


def test_a_caption_beside_a_longer_one_is_the_terse_one(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", {"a.jpg": picture(), "a.json": b'{"caption": "all of it"}', "a.txt": b"a bit\n"})
    found = open_records(tmp_path)[0]
    assert (found.caption, found.captions) == ("all of it", {"terse": "a bit"})


def test_a_folder_with_metadata_is_read_like_an_imagefolder(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a/1.png", "text": "one", "identity": 5},
        {"file_name": "a/2.PNG", "caption": "two", "identity": 5, "reference": "a/1.png", "box": [1, 2, 3, 4], "x": 1},
        {"file_name": "a/3.png", "text": "three"},
        {"file_name": "a/1.png", "text": "again"},
        {"file_name": "a/2.PNG"},
    ]
    (tmp_path / "a").mkdir()
    for number, name in ((1, "1.png"), (2, "2.PNG")):
        (tmp_path / "a" / name).write_bytes(picture(number))
    (tmp_path / "metadata.jsonl").write_text("\n".join(["{not json", *map(json.dumps, rows), ""]))
    records = open_records(tmp_path)
    assert [(one.key, one.caption, one.identity) for one in records] == [("a/1", "one", "5"), ("a/2", "two", "5")]
    assert (records[1].box, records[1].extra, records.pairs()) == ((1.0, 2.0, 3.0, 4.0), {"x": 1}, [(0, 1)])
    assert records.picture(1).getpixel((0, 0)) == (2, 0, 0)
    name = tmp_path.name
    assert records.problems == {
        "JSON that cannot be read": [f"{name}: line 1"],
        "a record without a picture": [f"{name}: a/3.png"],
        "a key that is used twice": [f"{name}: a/1"],
        "a record without a caption": [f"{name}: a/2"],
    }
    assert open_records(tmp_path / "metadata.jsonl").mark == records.mark


def test_a_folder_is_read_in_parts_of_a_thousand(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    links = [f"{number}.png" for number in range(2001)]
    for name in links:
        os.link(tmp_path / "a.png", tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text("".join(f'{{"file_name": "{n}", "text": "x"}}\n' for n in links))
    records = open_records(tmp_path)
    assert records.counts == (1000, 1000, 1)
    assert (records[records.row(1, 7)].key, records[records.row(2, 0)].key) == ("1007", "2000")


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"kind": "JPEG", "exif": {0x0112: 6}}, (32, 40)),
        ({"kind": "WEBP"}, (40, 32)),
    ],
)
def test_sizes_and_pictures_are_upright(options: dict[str, Any], changed: tuple[int, int], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.update(options.pop("exif", {}))
    write(tmp_path, [record(0, image=picture(**options, exif=exif))])
    found = open_records(tmp_path)[0]
    assert (found.width, found.height) == load_picture(found).size == changed


def test_odd_modes_become_rgb(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for name, mode in (("a.jpg", "CMYK"), ("b.png", "I;16"), ("c.png", "P"), ("d.png", "RGBA")):
        image = gradient(40, 40).convert("I").convert(mode) if mode == "I;16" else gradient(40, 40).convert(mode)
        file = io.BytesIO()
        image.save(file, "JPEG" if name.endswith("jpg") else "PNG")
        members |= {name: file.getvalue(), f"{name[0]}.txt": b"x"}
    records = open_records(tar(tmp_path / "0.tar", members))
    assert [records.picture(number).mode for number in range(4)] == ["RGB"] * 4


# --- broken data ------------------------------------------------------------------------------------------------------
def test_broken_records_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    good = {"jpg": picture(1, "JPEG"), "txt": b"words", "json": b'{"identity": "x"}'}
    members = [(f"{key}.{end}", good[end]) for key in "abcdefghi" for end in sorted(good)]
    replaced = {
        "b.json": b"{", "c.json": b"[1]", "d.txt": b" ", "e.json": b'{"reference": "nobody"}',
        "f.json": b'{"box": [1, 2, "x", 4]}', "g.jpg": picture(1, "JPEG")[:300], "h.json": b'{"reference": "h"}',
    }  # fmt: skip
    members = [(name, replaced.get(name, content)) for name, content in members if name != "i.jpg"]
    tar(tmp_path / "0.tar", [*members, ("a.jpg", b""), ("a.txt", b"other words"), ("README", b"")])
    records = open_records(tmp_path)
    assert [one.key for one in records] == list("aefgh")
    assert (records[0].caption, records[2].box) == ("words", None)
    problems = {
        "JSON that cannot be read": ["0.tar: b", "0.tar: c"],
        "a record without a caption": ["0.tar: d"],
        "a reference that does not exist": ["0.tar: e"],
        "a box that is not four numbers": ["0.tar: f"],
        "a record without a picture": ["0.tar: i"],
        "a reference to itself": ["0.tar: h"],
        "a key that is used twice": ["0.tar: a"],
        "a file that belongs to no record": ["0.tar: README"],
    }
    assert records.problems == problems
    for _ in range(2):
        with pytest.raises(
            BadRecordError, match=r"Record g in .*0\.tar cannot be used: the picture is incomplete or damaged"
        ):
            records.picture(3)
    assert records.problems == {**problems, "a picture that cannot be decoded": ["0.tar: g"]}
    assert records.picture(4).size == (40, 32)


def cut(content: bytes) -> bytes:
    return content[: content.index(b"000000006.png") + 700]


def flipped(content: bytes) -> bytes:
    place = content.index(b"000000006.json")
    return content[: place + 20] + b"\xff" * 300 + content[place + 320 :]


@pytest.mark.parametrize(
    ("damage", "left", "after"), [(cut, 5, "after 000000006"), (flipped, 4, "after 000000005"), (len, 4, "")]
)
def test_records_before_the_damage_and_other_shards_are_read(
    damage: Any, left: int, after: str, tmp_path: Path
) -> None:
    write(tmp_path, map(record, range(12)))
    broken = tmp_path / "00001.tar"
    content = damage(broken.read_bytes())
    broken.write_bytes(content if isinstance(content, bytes) else b"<html>not found</html>")
    records = open_records(tmp_path)
    kept = [*range(4), *range(4, 6), *range(8, 12)] if damage is cut else [*range(5), *range(8, 12)]
    kept = [*range(4), *range(8, 12)] if damage is len else kept
    assert [int(one.key) for one in records] == kept
    name = f"00001.tar: {after}" if after else "00001.tar"
    reason = "a web page instead of a shard: download the file itself"
    assert records.problems["a shard that is cut off or damaged" if after else reason] == [name]
    assert records.picture(len(records) - 1).getpixel((0, 0)) == (11, 0, 0)


def test_a_missing_shard_in_braces_is_a_problem(ten: Path) -> None:
    records = open_records(f"{ten}/{{00001..00004}}.tar")
    assert len(records) == 6
    assert records.problems["a shard that does not exist"] == ["00003.tar", "00004.tar"]
    assert "a reference that does not exist" in records.problems  # from record 4 to record 3, which is in shard 0


def test_a_shard_that_changes_after_opening_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, map(record, range(4)))
    records = open_records(tmp_path)
    (tmp_path / "00000.tar").write_bytes(b"")
    with pytest.raises(BadRecordError, match=r"Record 000000003 in .*00000\.tar has changed since it was opened"):
        records.picture(3)
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(BadRecordError, match="Record 000000002"):
        records.picture(2)


# --- pairs, mark, index -----------------------------------------------------------------------------------------------
def test_named_references_make_the_pairs(ten: Path) -> None:
    assert open_records(ten).pairs() == [(0, 1), (0, 2), (3, 4), (3, 5), (6, 7), (6, 8)]


def test_without_references_every_two_pictures_of_a_person_are_pairs(tmp_path: Path) -> None:
    people = ["a", "b", "a", "a", None, "c", *"dddddddd"]
    write(tmp_path, (record(i, identity=who, reference=None) for i, who in enumerate(people)))
    pairs = open_records(tmp_path).pairs()
    assert [pair for pair in pairs if max(pair) < 6] == [(2, 0), (3, 0), (0, 2), (3, 2), (0, 3), (2, 3)]
    many = [pair for pair in pairs if min(pair) >= 6]
    assert len(many) == len(set(many)) == 8 * 4 and all(reference != target for reference, target in many)
    assert {target for _, target in many} == {reference for reference, _ in many} == set(range(6, 14))
    assert len(open_records(tmp_path).pairs(per_identity=1)) == 3 + 8


def test_references_stay_in_their_shard_where_keys_repeat(tmp_path: Path) -> None:
    for name, who in (("0", "x"), ("1", "y")):
        facts = [b'{"identity": "%s"}' % who.encode(), b'{"identity": "%s", "reference": "a"}' % who.encode()]
        keyed = zip("ab", facts, strict=True)
        tar(
            tmp_path / f"{name}.tar",
            [(f"{k}.{e}", c) for k, f in keyed for e, c in (("jpg", picture(kind="JPEG")), ("txt", b"w"), ("json", f))],
        )
    far = {"c.jpg": picture(kind="JPEG"), "c.json": b'{"caption": "w", "reference": "a"}'}
    tar(tmp_path / "2.tar", far)
    records = open_records(tmp_path)
    assert records.pairs() == [(0, 1), (2, 3)]
    assert records.problems == {
        "a key that another shard has too": ["1.tar: a", "1.tar: b"],
        "a reference that several shards have": ["2.tar: c"],
    }


def test_a_reference_to_another_person_makes_no_pair(tmp_path: Path) -> None:
    write(tmp_path, [record(0), record(1), record(2, identity="stranger")])
    records = open_records(tmp_path)
    assert records.pairs() == [(0, 1)]
    assert records.problems == {"a reference to another person": ["00000.tar: 000000002"]}


def test_the_mark_depends_on_the_contents_and_not_on_the_address(ten: Path, tmp_path: Path) -> None:
    write(tmp_path / "same", map(record, range(10)))
    write(tmp_path / "other", (record(i, caption="somebody, take X") if i == 9 else record(i) for i in range(10)))
    mark = open_records(ten).mark
    assert len(mark) == 16 and mark == open_records(tmp_path / "same").mark
    assert len({mark, open_records(tmp_path / "other").mark, open_records(ten / "00000.tar").mark}) == 3


def test_a_shard_is_indexed_once_and_again_after_a_change(
    ten: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    members = shard_index._members

    def watched(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
        seen.append(size)
        return members(file, size)

    monkeypatch.setattr(shard_index, "_members", watched)
    write(tmp_path / "mine", map(record, range(10)))
    first = open_records(tmp_path / "mine")
    again = open_records(tmp_path / "mine")
    assert len(seen) == 3 and len(list(cache.iterdir())) == 3
    assert list(again) == list(first) and again.mark == first.mark
    tar(tmp_path / "mine" / "00002.tar", {"z.png": picture(), "z.txt": b"new"})
    assert [one.key for one in open_records(tmp_path / "mine")][8:] == ["z"]
    assert len(seen) == 4 and len(list(cache.iterdir())) == 3
    for kept in cache.iterdir():
        kept.write_bytes(kept.read_bytes()[:-20])
    assert len(open_records(tmp_path / "mine")) == 9
    assert len(seen) == 7


def test_only_the_bytes_of_the_picture_are_read(ten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = open_records(ten)
    asked: list[tuple[int, int]] = []
    local = type(records[0].image.filesystem)  # type: ignore[union-attr]
    plain = local.cat_file

    def watched(self: Any, path: str, start: int, end: int) -> bytes:
        asked.append((start, end))
        return bytes(plain(self, path, start=start, end=end))

    monkeypatch.setattr(local, "cat_file", watched)
    content = [one.caption for one in records], records[5].read()
    assert len(asked) == 1 and asked[0][1] - asked[0][0] == len(content[1])


# --- the order of training --------------------------------------------------------------------------------------------
COUNTS = (5, 0, 3, 9, 1, 4, 7, 2)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_every_record_comes_once_per_epoch(window: int) -> None:
    total = sum(COUNTS)
    rounds = [order(COUNTS, 1, turn * total, total, window) for turn in range(3)]
    everything = [(shard, row) for shard, count in enumerate(COUNTS) for row in range(count)]
    assert all(sorted(one) == everything for one in rounds)
    assert len({tuple(one) for one in rounds}) == 3, "epochs should differ"
    assert order(COUNTS, 2, 0, total, window) != rounds[0], "seeds should differ"


def test_the_parts_of_all_ranks_equal_the_order_of_one_process() -> None:
    whole = order(COUNTS, 7, 0, 100, 3)
    halves = [order(COUNTS, 7, step + rank * 5, 5, 3) for step in range(0, 100, 10) for rank in range(2)]
    assert [pair for half in halves for pair in half] == whole
    assert [order(COUNTS, 7, number, 1, 3)[0] for number in range(100)] == whole


def test_only_a_window_of_shards_is_open_at_a_time_and_they_mix() -> None:
    drawn = [shard for shard, _ in order([50] * 20, 0, 0, 1000, 4)]
    windows = [drawn[start : start + 200] for start in range(0, 1000, 200)]
    assert all(len(set(window)) == 4 for window in windows)
    assert all(len(set(window[:20])) > 1 for window in windows), "records of the window's shards should mix"
    assert sorted({shard for window in windows for shard in set(window)}) == list(range(20))


def test_the_order_is_pinned() -> None:
    """A resumed run must continue at the same image, with any versions of the libraries."""
    assert order((2, 1, 2), 1, 3, 8, 2) == [(2, 0), (1, 0), (1, 0), (0, 1), (0, 0), (2, 1), (2, 0), (0, 0)]


def test_the_order_of_a_hundred_million_records_needs_little_memory() -> None:
    counts = (10_000,) * 10_000
    tracemalloc.start()
    drawn = order(counts, 0, 77_777_777, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(drawn)) == 64
    assert peak < 8 << 20


def test_an_order_without_records_is_refused() -> None:
    with pytest.raises(ConfigError, match="no usable records"):
        order([0, 0], 0, 0, 1)


def test_records_that_were_read_can_be_written_again(ten: Path, tmp_path: Path) -> None:
    records: Records = open_records(ten)
    write(tmp_path / "copy", records)
    assert contents(tmp_path / "copy") == contents(ten)
    assert np.asarray(open_records(tmp_path / "copy").picture(3)).shape == (32, 40, 3)
