"""The store returns saved results unchanged, saves all or nothing, and accepts one driver at a time."""

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_synth.backends.contracts import Failed
from data_synth.records import Candidate, Measures, Reference, Rejection
from data_synth.store import Result, Store
from imagine.errors import ConfigError
from tests.root import ROOT

RESULTS: tuple[Result, ...] = (
    'a caption with "quotes", umlauts äöü and a line\nend',
    Reference("key", b"\x00\xffpicture", "somebody", "a caption", {"box": [1.5, 2.0, 3.0, 4.0], "licence": "CC0-1.0"}),
    Reference("other", b""),
    Candidate("key-0-1-2", "key-0", b"png", 1, 2, {"attributes": {"expression": "sad"}}),
    Measures(1, 0.5, None, 0.25, 1e-4, 0.0, "00ff00ff00ff00ff", {"yaw": "left"}),
    Rejection("key", "import", "no face", "photo.jpg: no face."),
    Failed("refused", "It is not accepted."),
)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def test_every_kind_of_result_is_returned_unchanged(tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        store.save([(key(number), "step", result) for number, result in enumerate(RESULTS)])
    with Store(tmp_path / "store.sqlite") as store:
        assert store.find([key(number) for number in range(99)]) == {key(n): one for n, one in enumerate(RESULTS)}


def test_find_accepts_many_keys_and_a_key_keeps_its_first_result(tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        store.save([(key(number), "caption", f"caption {number}") for number in range(3000)])
        store.save([(key(7), "caption", "another")])
        found = store.find([key(number) for number in range(0, 4000, 2)])
    assert found == {key(number): f"caption {number}" for number in range(0, 3000, 2)}


def test_overwrite_replaces_a_result(tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        store.save([(key(1), "import", "one"), (key(2), "import", "two")])
        store.save([(key(1), "import", "another")], overwrite=True)
        assert store.find([key(1), key(2)]) == {key(1): "another", key(2): "two"}


def test_rows_of_one_call_are_saved_all_or_none(tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        with pytest.raises(TypeError):
            store.save([(key(1), "a", "one"), (key(2), "a", Reference("x", b"", facts={"not": object()}))])
        with pytest.raises(sqlite3.Error):
            store.save([(key(3), "a", "three"), (key(4), object(), "four")])  # type: ignore[list-item]
        assert store.find([key(number) for number in range(5)]) == {}
        store.save([(key(1), "a", "one")])
        assert store.find([key(1)]) == {key(1): "one"}


def test_notes_are_saved_and_replaced(tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        assert store.read_note("shards") is None
        store.write_note("shards", {"0": "ab"})
        store.write_note("shards", {"0": "cd"})
        assert store.read_note("shards") == {"0": "cd"}


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite"), pytest.raises(ConfigError, match="another build is using it"):
        Store(tmp_path / "store.sqlite")
    with Store(tmp_path / "store.sqlite") as store:
        assert store.find([key(1)]) == {}


def test_an_invalid_store_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "store.sqlite").write_bytes(b"not a database at all, but long enough to be read as one" * 20)
    with pytest.raises(ConfigError, match="cannot be used"):
        Store(tmp_path / "store.sqlite")


FILL = """
import sys
from pathlib import Path
from data_synth.store import Store
with Store(Path(sys.argv[1])) as store:
    for start in range(0, 10**9, 10):
        store.save([(number.to_bytes(32, "big"), "a", f"{number}") for number in range(start, start + 10)])
"""


def test_a_killed_driver_leaves_complete_transactions_and_no_lock(tmp_path: Path) -> None:
    path, log = tmp_path / "store.sqlite", tmp_path / "store.sqlite-wal"
    process = subprocess.Popen([sys.executable, "-c", FILL, str(path)], cwd=ROOT)
    while not log.exists() or log.stat().st_size < 200_000:  # well under way
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    with Store(path) as store:
        found = store.find([key(number) for number in range(100_000)])
    assert len(found) >= 10 and len(found) % 10 == 0
    assert set(found) == {key(number) for number in range(len(found))}
