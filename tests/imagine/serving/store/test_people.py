"""Photos, personas and keys: owners, ends, and deletion that leaves nothing on the disk."""

import os
from pathlib import Path

import pytest

from imagine.serving.store.files import write_whole
from imagine.serving.store.people import StoredPersona, Upload
from imagine.serving.store.records import draw_id
from imagine.serving.store.store import Store
from tests.imagine.serving.stores import Clock, admit, settings_of

SECRET = "CANARY-7f3a"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Store:
    return Store.open(settings_of(tmp_path), clock)


def add_persona(store: Store, owner: str = "ann", keep: float = 100.0) -> StoredPersona:
    now = store.people.clock()
    persona = StoredPersona(draw_id("per"), owner, SECRET, "e", 1, "self", [{"box": None}], now, now + keep)
    write_whole(store.files.persona(persona.id), lambda file: file.write(SECRET.encode()))
    with store.database.writing() as connection:
        store.people.add_persona(connection, persona)
    return persona


def everything_on_disk(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_deleted_persona_is_really_gone(store: Store, tmp_path: Path) -> None:
    persona = add_persona(store)
    assert store.people.persona(persona.id, "ann") == persona and store.people.persona(persona.id, "bob") is None
    assert SECRET.encode() in everything_on_disk(tmp_path)
    assert not store.people.delete_persona(persona.id, "bob") and store.people.delete_persona(persona.id, "ann")
    assert store.people.persona(persona.id, "ann") is None and not store.files.persona(persona.id).exists()
    store.close()  # which writes the log of changes into the database
    assert SECRET.encode() not in everything_on_disk(tmp_path)


def test_a_persona_can_be_renamed_by_its_owner_only(store: Store) -> None:
    persona = add_persona(store)
    changed = store.people.change_persona(persona.id, "ann", {"name": "Ann"})
    assert changed is not None and changed.name == "Ann"
    assert store.people.change_persona(persona.id, "bob", {"name": "Bob"}) is None
    assert [each.name for each in store.people.list_personas("ann")] == ["Ann"]
    assert store.people.list_personas("bob") == []


def test_everything_ends_at_its_time(store: Store, clock: Clock, tmp_path: Path) -> None:
    persona, job = add_persona(store, keep=50), admit(store, keep=70.0)
    upload = Upload(draw_id("upl"), "ann", "photo", "0" * 64, 9, 9, clock.now, clock.now + 30)
    write_whole(store.files.photo(upload.id), lambda file: file.write(b"pixels"))
    store.people.add_upload(upload)
    settings = settings_of(tmp_path)
    assert store.people.upload(upload.id, "ann") == upload and store.people.upload(upload.id, "bob") is None
    clock.now += 40
    assert store.people.upload(upload.id, "ann") is None
    assert store.sweep(settings)["files"] == 1 and not store.files.photo(upload.id).exists()
    clock.now += 20
    assert store.sweep(settings)["files"] == 1 and not store.files.persona(persona.id).exists()
    clock.now += 20
    assert store.sweep(settings) == {"lost": 0, "late": 1, "jobs": 1, "files": 0}
    assert store.jobs.find(job.id) is None


def test_files_without_a_row_are_removed_after_a_while(store: Store) -> None:
    persona = add_persona(store)
    orphan, unfinished = store.files.persona(draw_id("per")), store.files.pictures / "pic.png.partial"
    for path in (orphan, unfinished, store.files.persona(persona.id)):
        path.write_bytes(b"x")
        os.utime(path, (1, 1))
    fresh = store.files.persona(draw_id("per"))
    fresh.write_bytes(b"x")
    assert store.remove_left_over_files() == 2
    assert not orphan.exists() and not unfinished.exists()
    assert fresh.exists() and store.files.persona(persona.id).exists()


def test_a_file_appears_whole_or_not_at_all(store: Store) -> None:
    path = store.files.persona(draw_id("per"))

    def fail(file: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "per_", f"per_{'0' * 32}/../..", "per_" + "A" * 32, ""])
def test_no_name_from_outside_becomes_a_path(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="is not an id"):
        store.files.persona(name)


def test_keys_are_known_by_their_hash_until_they_are_revoked(store: Store, tmp_path: Path) -> None:
    assert not store.access.has_keys()
    key = store.access.create_key("phone")
    (row,) = store.access.list_keys()
    assert store.access.owner_of(key) == row.id and row.name == "phone" and store.access.has_keys()
    secret = key.split("_")[2]
    for wrong in (
        "",
        "imagine",
        key[:-1],
        key + "0",
        key.replace("imagine_", "other_"),
        f"imagine_x_{secret}",
        "é" * 9,
    ):
        assert store.access.owner_of(wrong) is None
    assert secret.encode() not in everything_on_disk(tmp_path)
    assert store.access.revoke_key(row.id) and not store.access.revoke_key(row.id)
    assert store.access.owner_of(key) is None and not store.access.has_keys()


def test_requests_are_limited_per_owner_and_minute(store: Store, clock: Clock) -> None:
    assert [store.access.take_token("ann", 2) for _ in range(3)] == [0, 0, 30]
    assert store.access.take_token("bob", 2) == 0
    clock.now += 30
    assert store.access.take_token("ann", 2) == 0 and store.access.take_token("ann", 2) == 30
    clock.now -= 1000  # a clock that is set back neither gives nor takes
    assert store.access.take_token("ann", 2) == 30


def test_workers_are_alive_while_they_beat(store: Store, clock: Clock) -> None:
    store.access.beat("w1", {"device": "cpu"}, {"steps": 1})
    store.access.beat("w1", {"device": "cpu"}, {"steps": 2})
    (worker,) = store.access.living_workers(30)
    assert worker == {"id": "w1", "facts": {"device": "cpu"}, "counts": {"steps": 2}}
    clock.now += 31
    assert store.access.living_workers(30) == []
    store.access.forget_worker("w1")
    assert store.access.living_workers(100) == []
