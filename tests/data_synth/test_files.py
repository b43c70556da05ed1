"""Builds from photos on disk: faulty photos are rejected, and photos are imported again only if one changed."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_synth import importing
from data_synth.config import BackendChoice, BuildConfig
from data_synth.filters import STAGES
from imagine.errors import ConfigError
from imagine.shards.reading import open_records
from tests.toy_pairs import built, contents, photo, toy_config

SAME_POSE = STAGES["difference"][0]


def config(folder: Path, kind: str = "pictures", log: str = "", **values: Any) -> BuildConfig:
    settings = {"log": log}
    source = {
        "backend": "files",
        "source": str(folder),
        "kind": kind,
        "recogniser": "tests.toy_pairs:ToyRecogniser",
        "recogniser_settings": settings,
    }
    return toy_config(settings, references=source, **values)


def steps(log: Path) -> Counter[str]:
    counted = Counter(line.split()[0] for line in log.read_text().splitlines())
    log.write_text("")
    return counted


def as_png(content: bytes) -> bytes:
    file = io.BytesIO()
    with Image.open(io.BytesIO(content)) as image:
        image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(photo(number, 0))
    (folder / "copy of 2.jpg").write_bytes(photo(2, 0))
    (folder / "broken.jpg").write_bytes(photo(5, 0)[:200])
    (folder / "empty.png").write_bytes(b"")
    return folder


def test_unusable_photos_are_counted_by_reason_and_stop_nothing(photos: Path, tmp_path: Path) -> None:
    (photos / "cut.png").write_bytes(as_png(photo(4, 0))[:-12])  # it opens, but shards do not accept it unchanged
    out = built(config(photos), tmp_path / "out")
    assert (out.funnel.photos, out.funnel.references, out.funnel.targets) == (8, 5, 10)
    reasons = out.funnel.as_json()["rejected"]["import"]
    assert reasons == {importing.SAME_FILE: 1, importing.DAMAGED: 2}
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejections.jsonl").read_text().splitlines()]
    assert {line["step"] for line in rejected[:3]} == {"import"}
    assert "broken.jpg" in " ".join(line["detail"] for line in rejected)
    assert json.loads((tmp_path / "out" / "card.json").read_text())["rejected"]["import"] == reasons
    assert out.manifest["counts"]["pairs"] > 0
    records = [one for one in open_records(tmp_path / "out", cache=tmp_path / "cache") if one.reference is None]
    originals = {f"{number}.jpg": photo(number, 0) for number in range(4)}
    assert len(records) > 1 and all(one.box is not None for one in records)
    files = {one.extra["file"]: one.read() for one in records}
    assert files.pop("cut.png") == as_png(photo(4, 0)), "re-encoded"
    assert all(originals[name] == content for name, content in files.items()), "unchanged"


def test_the_manifest_lists_licences_of_photos_and_of_the_recogniser(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(photo(number, 0))
    rows: list[dict[str, str]] = [{"file_name": f"{number}.jpg"} for number in range(3)]
    rows[1]["license"] = "CC-BY-2.0"  # the key that img2dataset uses
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loose: dict[str, Any] = {"filters": {"similarity": None, "faces": None, "difference": None, "duplicates": None}}
    licences = built(config(tmp_path, "records", **loose), tmp_path / "out").manifest["licences"]
    assert licences["references"] == {"not stated": 2, "CC-BY-2.0": 1}
    assert licences["models"]["references"] == "CC0-1.0", "the licence of its recogniser"


def test_photos_are_imported_again_only_if_one_changed(photos: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    same: dict[str, Any] = {"targets": {"distribution": {}}}
    built(config(photos, log=str(log), **same), out)
    first = steps(log)
    assert first["recognise"] == 4 and first["caption"] == 4
    before = contents(out)
    assert built(config(photos, log=str(log), **same), out).made == {}
    assert steps(log) == {} and contents(out) == before
    (photos / "9.jpg").write_bytes(photo(4, 0))
    grown = built(config(photos, log=str(log), **same), out)
    again = steps(log)
    assert again["recognise"] == 1 and again["caption"] == 1, "results of the other photos are reused"
    assert grown.funnel.references == 5
    built(config(photos, **same), tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_resumed_import_recognises_only_new_photos(tmp_path: Path) -> None:
    folder, log, down = tmp_path / "photos", tmp_path / "log", tmp_path / "down"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.jpg").write_bytes(photo(number % 7, number))
    down.write_text("")
    whole = config(folder, log=str(log))
    settings = {**whole.references.settings, "recogniser": "tests.toy_pairs:StoppedRecogniser"}
    settings["recogniser_settings"] = {"log": str(log), "down": str(down)}
    stopped = whole.model_copy(update={"references": BackendChoice(backend="files", **settings)})
    with pytest.raises(KeyboardInterrupt):
        built(stopped, tmp_path / "out")
    assert steps(log) == {"recognise": 16}
    down.unlink()
    assert built(stopped, tmp_path / "out").funnel.references == 20
    assert steps(log)["recognise"] == 4


def test_pairs_are_mined_from_several_photos_of_one_person(tmp_path: Path) -> None:
    folder = tmp_path / "people"
    for person in range(2):
        (folder / f"person {person}").mkdir(parents=True)
        for number in range(4):
            (folder / f"person {person}" / f"{number}.jpg").write_bytes(photo(person, number))
    (folder / "person 0" / "stranger.jpg").write_bytes(photo(4, 0))
    mined = config(folder, "people", generator=None, rewriter=None, refiner=None, rounds=0, mined_per_photo=2)
    out = built(mined, tmp_path / "out")
    assert out.funnel.as_json()["rejected"]["import"] == {importing.STRANGER: 1}
    assert (out.funnel.references, out.funnel.targets) == (8, 16)
    records = open_records(tmp_path / "out", cache=tmp_path / "cache")
    pairs = [(records[one], records[two]) for one, two in records.pairs()]
    assert len(pairs) == out.manifest["counts"]["pairs"] > 4
    assert set(out.funnel.reasons) <= {("import", importing.STRANGER), ("filter", SAME_POSE)}, (
        "duplicates are not rejected"
    )
    assert max(Counter(target.extra["photo"] for _, target in pairs).values()) == 2, "a photo may be a target again"
    for reference, target in pairs:
        assert reference.identity == target.identity and reference.read() != target.read()
        assert target.source == "real" and target.caption == f"a face called {target.extra['photo']}"
    assert built(mined, tmp_path / "out").made == {}


def test_mining_without_two_photos_of_a_person_is_one_sentence(photos: Path, tmp_path: Path) -> None:
    none: dict[str, Any] = {"generator": None, "rewriter": None, "refiner": None, "rounds": 0}
    with pytest.raises(ConfigError, match="mined from photos only"):
        built(toy_config(**none), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"no two photos of one person .*set kind: people"):
        built(config(photos, **none), tmp_path / "b")
    with pytest.raises(ConfigError, match="no pictures at"):
        built(config(tmp_path / "nowhere"), tmp_path / "c")
