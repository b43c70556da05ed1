"""Records in every layout and encoding that tools and people produce: read rightly, or counted with a reason."""

import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagine.errors import BadRecordError, ConfigError
from imagine.shards import index as shard_index
from imagine.shards.facts import box_problem, normalised_facts
from imagine.shards.reading import Records, has_records, open_records
from imagine.shards.texts import decode_text
from tests.tars import tar

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def picture(red: int = 0, form: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (red, 90, 120)).save(file, form)
    return file.getvalue()


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def red(records: Records, row: int) -> float:
    return float(np.asarray(records.picture(row))[9, 9, 0])


def captions(records: Records) -> dict[str, str]:
    return {record.key: record.caption for record in records}


# --- names in shards --------------------------------------------------------------------------------------------------
def test_a_key_ends_at_the_first_dot_and_nothing_is_skipped_uncounted(tmp_path: Path) -> None:
    members = {
        "IMG_2020.05.01.jpg": picture(), "IMG_2020.05.01.txt": b"a woman",  # one picture: it is read
        "s0.input.jpg": picture(1), "s0.txt": b"one field",
        "s1.input.jpg": picture(2), "s1.target.jpg": picture(3), "s1.txt": b"two fields",
        "a/./v1.jpg": picture(4), "a/./v1.txt": b"plain", "a/./v1.mask.png": picture(5), "a/./v1.npy": b"\0",
        "0.JPG": picture(6), "0.TXT": b"capitals", "README": b"x", ".hidden": b"", "notes.md": b"x",
        "._0.JPG": b"\0\5", "__meta__/info.json": b"{}", "2.tiff": picture(7, "TIFF"), "2.caption": b"a TIFF",
    }  # fmt: skip
    records = open_records(tar(tmp_path / "0.tar", members))
    assert captions(records) == {
        "IMG_2020": "a woman", "s0": "one field", "a/./v1": "plain", "0": "capitals", "2": "a TIFF",
    }  # fmt: skip
    assert records.problems == {
        "several pictures with one key, which ends at the first dot of a name": ["0.tar: s1 (input.jpg, target.jpg)"],
        "a file of a record that is not read": ["0.tar: a/./v1 (mask.png, npy)"],
        "a file that belongs to no record": ["0.tar: README", "0.tar: .hidden", "0.tar: notes (md)"],
    }
    assert [red(records, row) for row in (2, 4)] == pytest.approx([4, 7], abs=3)


def test_fields_with_one_middle_are_read_together(tmp_path: Path) -> None:
    members = {"s.a.jpg": picture(), "s.txt": b"other", "s.a.txt": b"its own", "s.a.json": b'{"identity": 7.0}'}
    records = open_records(tar(tmp_path / "0.tar", members))
    assert (records[0].caption, records[0].identity) == ("its own", "7")
    assert records.problems == {"a file of a record that is not read": ["0.tar: s (txt)"]}


# --- what a shard is --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "0.tar"])
def test_compressed_shards_are_read(name: str, tmp_path: Path) -> None:
    tar(tmp_path / name, {"0.jpg": picture(200), "0.txt": b"a woman"}, "w:gz")
    for address in (tmp_path, tmp_path / name, f"{tmp_path}/*{name[1:]}"):
        records = open_records(address)
        assert captions(records) == {"0": "a woman"} and records.problems == {}
        assert red(records, 0) == pytest.approx(200, abs=3)
    for copy in (Path(os.environ["XDG_CACHE_HOME"]) / "imagine" / "shards").glob("*.tar"):
        copy.unlink()  # a user empties the cache
    assert open_records(tmp_path).picture(0).size == (64, 48)


def test_a_shard_that_cannot_be_unpacked_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    tar(tmp_path / "0.tar.gz", {"0.jpg": picture(), "0.txt": b"a woman"}, "w:gz")
    monkeypatch.setattr("imagine.shards.index.os.replace", full)
    with pytest.raises(ConfigError, match=r"cannot be unpacked into .*No space left.*unpack it with `gunzip`"):
        open_records(tmp_path)
    assert list((Path(os.environ["XDG_CACHE_HOME"]) / "imagine" / "shards").iterdir()) == []


def test_a_compressed_shard_that_is_cut_off_keeps_its_first_records(tmp_path: Path) -> None:
    noise = {f"{n}.{e}": c for n in range(8) for e, c in (("jpg", os.urandom(4000)), ("txt", b"words"))}
    file = tar(tmp_path / "0.tar.gz", noise, "w:gz")
    file.write_bytes(file.read_bytes()[:16000])
    records = open_records(tmp_path)
    assert 1 <= len(records) < 8 and "a shard that is cut off or damaged" in records.problems


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (POINTER, "0.tar is a Git LFS pointer instead of the file: run `git lfs pull` in its repository"),
        (b"<!DOCTYPE html><html>log in</html>", "0.tar is a web page instead of a shard: download the file itself"),
        (b"", "0.tar is an empty file instead of a shard: download it again"),
        (b"PK\3\4" + bytes(99), "0.tar is a ZIP archive instead of a tar: unpack it, and pack it as .tar"),
        (b"BZh9" + bytes(99), "0.tar is a bzip2 file instead of a tar"),
    ],
)
def test_what_is_no_shard_is_one_sentence_or_counted(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ConfigError) as raised:
            open_records(tmp_path)
        assert sentence in str(raised.value) and "\n" not in str(raised.value)
    tar(tmp_path / "1.tar", {"0.jpg": picture(), "0.txt": b"a"})
    records = open_records(tmp_path)
    assert len(records) == 1 and list(records.problems.values()) == [["0.tar"]]


def test_a_picture_that_is_a_pointer_is_called_so(tmp_path: Path) -> None:
    records = open_records(tar(tmp_path / "0.tar", {"0.jpg": POINTER, "0.txt": b"a"}))
    with pytest.raises(BadRecordError, match="git lfs pull"):
        records.picture(0)
    (tmp_path / "metadata.jsonl").write_bytes(POINTER)
    with pytest.raises(ConfigError, match=r"metadata\.jsonl is a Git LFS pointer"):
        open_records(tmp_path)


# --- encodings --------------------------------------------------------------------------------------------------------
WORDS = "the woman\u2019s café"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_captions_are_decoded(encoding: str, tmp_path: Path) -> None:
    content = WORDS.encode(encoding)
    assert decode_text(content) == WORDS
    shard = tar(tmp_path / "shards" / "0.tar", {"0.jpg": picture(), "0.txt": content})
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "0.jpg").write_bytes(picture())
    (folder / "0.txt").write_bytes(content)
    for address in (shard, folder):
        records = open_records(address)
        assert captions(records) == {"0": WORDS} and records.problems == {}
    facts = json.dumps({"file_name": "0.jpg", "text": WORDS}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_bytes(f"{facts}\r\n".encode(encoding))
    assert captions(open_records(folder)) == {"0": WORDS}
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_bytes(f'file_name;text\r\n0.jpg;"{WORDS}"\r\n'.encode(encoding))
    assert captions(open_records(folder)) == {"0": WORDS}


def test_a_caption_in_an_unknown_encoding_is_counted(tmp_path: Path) -> None:
    members = {"0.jpg": picture(), "0.txt": "日本の写真です".encode("shift-jis"), "1.jpg": picture(), "1.txt": b"ok"}
    members |= {"2.jpg": picture(), "2.json": b'{"caption": "half a \\ud83d pair"}'}
    records = open_records(tar(tmp_path / "0.tar", members))
    assert captions(records) == {"1": "ok", "2": "half a \ufffd pair"}
    assert records.problems == {
        "a caption whose encoding is not known": ["0.tar: 0"],
        "a record without a caption": ["0.tar: 0"],
    }


def test_a_text_that_is_too_long_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_index, "LARGEST_TEXT", 20)
    members = {"0.jpg": picture(), "0.txt": b"x" * 21, "1.jpg": picture(), "1.txt": b"ok", "1.json": b" " * 30 + b"{}"}
    records = open_records(tar(tmp_path / "0.tar", members))
    assert len(records) == 0
    assert records.problems == {"a caption or JSON of more than 16 MiB": ["0.tar: 0", "0.tar: 1"]}


# --- facts ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"box": [70, 10, 20, 20]}, "a box outside the picture"),
        ({"box": [-30, -30, 40, 40]}, "a box outside the picture"),
        ({"box": [-500, -500, 2000, 2000]}, "a box outside the picture"),
        ({"box": [0.2, 0.2, 0.5, 0.5]}, "a box that is smaller than 2 pixels"),
        ({"box": [10, 10, -5, 8]}, "a box that is smaller than 2 pixels"),
        ({"box": [10, 10, 8]}, "a box that is not four numbers"),
        ({"box": "10 10 8 8"}, "a box that is not four numbers"),
        ({"box": [10, 10, 8, float("inf")]}, "a box that is not four numbers"),
        ({"box": [10, 10, 8, 10**400]}, "a box that is not four numbers"),
        ({"landmarks": [[1, 2], [3, float("inf")]]}, "landmarks that are not points in the picture"),
        ({"landmarks": [[900, 2], [903, 4]]}, "landmarks that are not points in the picture"),
        ({"width": -64}, "a width that is not a number of pixels"),
        ({"height": "tall"}, "a height that is not a number of pixels"),
        ({"identity": ["a"]}, "an identity that is not a name"),
        ({"reference": True}, "a reference that is not a name"),
        ({"captions": ["a"]}, "captions that are not texts by style"),
        ({"caption": 7}, "a caption that is not a text"),
        ({"source": 7}, "a source that is not a word"),
        ({"repeats": 0}, "repeats that are not a number from 1 to 1000"),
    ],
)
def test_every_fact_is_checked_and_a_refused_one_is_named(facts: dict[str, Any], reason: str, tmp_path: Path) -> None:
    whole = {"width": 64, "height": 48, **facts}
    members = {"0.jpg": picture(), "0.txt": b"a woman", "0.json": json.dumps(whole).encode()}
    records = open_records(tar(tmp_path / "0.tar", members))
    (name,) = facts
    assert records.problems == {reason: ["0.tar: 0"]}
    assert captions(records) == {"0": "a woman"}
    assert name == "caption" or not getattr(records[0], name, None)
    assert name not in records[0].extra


def test_right_facts_and_missing_ones_are_no_problem() -> None:
    problems: dict[str, list[str]] = {}
    facts = {"box": [-10, -4, 40, 40], "identity": float("nan"), "width": 64.0, "height": 48, "source": None, "x": 1}
    row = normalised_facts("a", {**facts, "landmarks": [[1, 2], [3, 4]], "reference": ""}, "0", problems)
    assert problems == {} and row["box"] == [-10, -4, 40, 40] and (row["width"], row["identity"]) == (64, None)
    assert row["extra"] == {"x": 1, "landmarks": [[1, 2], [3, 4]]}
    assert box_problem([900, 10, 20, 20], None, None) == ""  # the picture's size is not known yet


# --- folders ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("listed", ["./sub/1.jpg", "sub\\1.jpg", "sub/../sub/1.jpg", "sub/1.JPG", "ABSOLUTE", "LINKED"])
def test_the_names_in_metadata_are_found(listed: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    (folder / "sub" / "1.jpg").write_bytes(picture())
    (folder / "2.jpg").write_bytes(picture(1))
    name = {"ABSOLUTE": str(folder / "sub/1.jpg"), "LINKED": str(folder / "sub/1.jpg")}.get(listed, listed)
    rows = [{"file_name": name, "text": "a woman"}, {"file_name": "2.jpg", "text": "a man", "reference": name}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = open_records(tmp_path / "link" if listed == "LINKED" else folder)
    assert captions(records) == {"sub/1": "a woman", "2": "a man"} and records.problems == {}
    assert records.pairs() == [(0, 1)] and records.picture(0).size == (64, 48)


def test_a_file_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "outside.jpg").write_bytes(picture())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.jsonl").write_text('{"file_name": "../outside.jpg", "text": "x"}\n')
    records = open_records(tmp_path / "data")
    assert records.problems == {"a record without a picture": ["data: ../outside.jpg"]}


def test_metadata_as_csv_and_as_one_list_are_read(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(picture())
    rows = [
        "file_name,text,width,height,box,identity",
        '1.jpg,"a woman, smiling",64,48,"[4, 4, 20, 20]",007',
        "2.jpg,gone",
    ]
    (tmp_path / "metadata.csv").write_text("\n".join([*rows, ""]))
    records = open_records(tmp_path)
    assert captions(records) == {"1": "a woman, smiling"}
    assert (records[0].box, records[0].width, records[0].identity) == ((4.0, 4.0, 20.0, 20.0), 64, "007")
    assert records.problems == {"a record without a picture": [f"{tmp_path.name}: 2.jpg"]}
    (tmp_path / "metadata.jsonl").write_text('[\n{"file_name": "1.jpg", "text": "a list"}\n]')
    assert captions(open_records(tmp_path)) == {"1": "a list"}


@pytest.mark.parametrize("metadata", ["metadata.jsonl", "metadata.csv"])
def test_the_split_for_training_is_read_and_others_are_named(metadata: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "1.jpg").write_bytes(picture(200 if split == "train" else 0))
        rows = {"metadata.jsonl": '{"file_name": "1.jpg", "text": "a"}\n', "metadata.csv": "file_name,text\n1.jpg,a\n"}
        (tmp_path / split / metadata).write_text(rows[metadata])
    records = open_records(tmp_path)
    assert captions(records) == {"1": "a"} and records.problems == {
        "a split that is not read": [f"{tmp_path.name}: test"]
    }
    assert red(records, 0) == pytest.approx(200, abs=3)
    assert captions(open_records(tmp_path / "test" / metadata)) == {"1": "a"}


def test_a_folder_as_kohya_has_it_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "10_sks woman"
    folder.mkdir()
    for name, form in (("a.jpg", "JPEG"), ("b.PNG", "PNG"), ("c.jpg", "JPEG"), ("d.jpg", "JPEG"), ("e.webp", "WEBP")):
        (folder / name).write_bytes(picture(form=form))
    for name in ("a.txt", "b.caption", "c.TXT", "d.jpg.txt"):
        (folder / name).write_text(f"words of\n {name}")
    (folder / "a.json").write_text('{"identity": "w", "box": [500, 500, 9, 9], "width": 64, "height": 48}')
    (tmp_path / "loose.jpg").write_bytes(picture())
    (tmp_path / "same.jpg").write_bytes(picture())
    (tmp_path / "same.png").write_bytes(picture(form="PNG"))
    (tmp_path / "same.txt").write_text("twice")
    for name in ("._a.jpg", "Thumbs.db", ".DS_Store"):
        (folder / name).write_bytes(b"x")
    assert has_records(tmp_path)
    records = open_records(tmp_path)
    named = {f"10_sks woman/{stem}": f"words of {name}" for stem, name in (
        ("a", "a.txt"), ("b", "b.caption"), ("c", "c.TXT"), ("d", "d.jpg.txt"),
    )}  # fmt: skip
    assert captions(records) == {**named, "10_sks woman/e": "sks woman", "same": "twice", "same.png": "twice"}
    assert [record.extra.get("repeats") for record in records] == [10] * 5 + [None] * 2
    assert records[0].identity == "w"
    assert records.problems == {
        "a box outside the picture": [f"{tmp_path.name}: 10_sks woman/a"],
        "a record without a caption": [f"{tmp_path.name}: loose"],
    }
    assert records.picture(6).size == (64, 48)
    assert captions(open_records(folder))["a"] == "words of a.txt"  # the folder itself, not the one around it
    assert open_records(folder)[4].extra["repeats"] == 10
    assert len(open_records(tmp_path, captions=False)) == 8
    assert open_records(tmp_path).mark == records.mark


def test_gzip_magic_is_checked_in_the_content_and_not_in_the_name(tmp_path: Path) -> None:
    plain = tar(tmp_path / "0.tar", {"0.jpg": picture(), "0.txt": b"a"}).read_bytes()
    (tmp_path / "0.tar").unlink()
    (tmp_path / "0.tar.gz").write_bytes(plain)  # a proxy has unpacked it
    (tmp_path / "1.tar").write_bytes(gzip.compress(plain))
    assert [record.key for record in open_records(tmp_path)] == ["0", "0"]
