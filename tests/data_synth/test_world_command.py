"""The builder's world command: its output, resuming after a kill, and its error messages."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_synth.__main__ import main
from data_synth.world_command import WorldSettings, build, build_shards
from imagine.errors import ConfigError
from imagine.shards.reading import Records, open_records
from imagine.world import attributes, render, sample_contexts, sample_people
from imagine.world.seeds import HELD_OUT, TRAIN
from tests.folders import contents

SMALL = WorldSettings(identities=3, images=7, size=16, seed=5)
SHARDS = replace(SMALL, shards=5)  # shard borders inside batches and people


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    build(SMALL, folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures in shards."""
    folder = tmp_path_factory.mktemp("shards")
    build_shards(SHARDS, str(folder))
    return folder


def read(folder: Path, tmp_path: Path) -> Records:
    return open_records(folder, cache=tmp_path / "cache")


def test_every_row_has_its_picture_and_every_picture_its_row(uninterrupted: Path) -> None:
    table = rows(uninterrupted)
    assert len(table) == 21
    assert {row["file"] for row in table} == {name for name in contents(uninterrupted) if name.endswith(".png")}
    assert set(table[0]) >= {"file", "identity", "caption", "attributes"}
    assert len({row["identity"] for row in table}) == 3
    assert all(row["identity"] in TRAIN for row in table)
    assert len({str(row["attributes"]) for row in table}) > 18, "contexts differ between pictures"


def test_a_row_is_enough_to_draw_its_picture_again(uninterrupted: Path) -> None:
    row = rows(uninterrupted)[10]
    people, contexts = sample_people([int(str(row["identity"]))]), sample_contexts([int(str(row["context"]))])
    with Image.open(uninterrupted / str(row["file"])) as picture:
        assert (picture.size, picture.mode) == ((16, 16), "RGB")
        stored = np.asarray(picture).astype(int)
    again = render(people, contexts, size=16).images[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(stored - again).max() <= 1.01  # one step of 8 bits: the last bit depends on the batch
    assert attributes(people, contexts)[0] == row["attributes"]


def test_a_resumed_run_equals_an_uninterrupted_one(uninterrupted: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int) -> None:
        if done:
            raise Killed

    with pytest.raises(Killed):
        build(SMALL, tmp_path, kill)
    written = contents(tmp_path)
    assert 0 < len([name for name in written if name.endswith(".png")]) < 21
    table = tmp_path / "metadata.jsonl"
    table.write_bytes(table.read_bytes()[:-30])  # as if it was killed while writing a row
    reported: list[int] = []
    build(SMALL, tmp_path, reported.append)
    assert reported[0] == 15 and reported[-1] == 21
    assert contents(tmp_path) == contents(uninterrupted)


def test_only_a_missing_picture_is_drawn_again(uninterrupted: Path, tmp_path: Path) -> None:
    build(SMALL, tmp_path)
    lost, other = (tmp_path / str(rows(tmp_path)[i]["file"]) for i in (3, 4))
    whole, age = lost.read_bytes(), other.stat().st_mtime_ns
    lost.unlink()
    build(SMALL, tmp_path)
    assert lost.read_bytes() == whole
    assert other.stat().st_mtime_ns == age
    assert len(rows(tmp_path)) == 21


def test_more_people_and_pictures_can_be_asked_for_later(tmp_path: Path) -> None:
    build(WorldSettings(identities=1, images=2, size=16), tmp_path)
    before = contents(tmp_path)
    build(WorldSettings(identities=2, images=3, size=16), tmp_path)
    after = contents(tmp_path)
    assert len(rows(tmp_path)) == 6
    assert all(after[name] == before[name] for name in before if name.endswith(".png"))


def test_seeds_and_ranges_give_different_people(uninterrupted: Path, tmp_path: Path) -> None:
    build(WorldSettings(identities=3, images=1, size=16, seed=6), tmp_path / "other")
    build(WorldSettings(identities=3, images=1, size=16, seed=5, people="held_out"), tmp_path / "held_out")
    first, other, held_out = (
        {row["identity"] for row in rows(tmp_path / n)} for n in (uninterrupted, "other", "held_out")
    )
    assert not first & other
    assert all(identity in HELD_OUT for identity in held_out)


def test_shards_and_png_files_have_the_same_content(uninterrupted: Path, shards: Path, tmp_path: Path) -> None:
    records, table = read(shards, tmp_path), rows(uninterrupted)
    assert (len(records), records.counts, records.problems) == (21, (5, 5, 5, 5, 1), {})
    for record, row in zip(records, table, strict=True):
        assert record.read() == (uninterrupted / str(row["file"])).read_bytes()
        assert (record.caption, record.captions) == (row["caption"], row["captions"])
        assert record.identity == str(row["identity"]) and list(record.box or ()) == row["box"]
        assert record.extra == {name: row[name] for name in ("attributes", "context", "landmarks")}
        assert (record.width, record.height) == (16, 16)


def test_the_first_picture_of_a_person_is_the_reference_and_marked_real(shards: Path, tmp_path: Path) -> None:
    records = read(shards, tmp_path)
    pairs = [(person * 7, person * 7 + image) for person in range(3) for image in range(1, 7)]
    assert records.pairs() == pairs
    assert [number for number, record in enumerate(records) if record.source == "real"] == [0, 7, 14]
    sheet = json.loads((shards / "datasheet.json").read_text())
    assert (sheet["records"], sheet["identities"], sheet["pairs"], sheet["boxes"]) == (21, 3, 18, 21)
    assert sheet["seeds"] == {"seed": 5} and sheet["licence"].startswith("Apache-2.0")


@pytest.mark.parametrize("pictures", [0, 16])
def test_resumed_shards_equal_uninterrupted_ones(pictures: int, shards: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int) -> None:
        if done >= pictures:
            raise Killed

    with pytest.raises(Killed):
        build_shards(SHARDS, str(tmp_path), kill)
    finished = [name for name in contents(tmp_path) if name.endswith(".tar")]
    assert len(finished) == pictures // 5
    (tmp_path / f"{len(finished):05d}.tar.part").write_bytes(b"an unfinished shard")
    reported: list[int] = []
    build_shards(SHARDS, str(tmp_path), reported.append)
    assert reported[0] == pictures // 5 * 5 and reported[-1] == 21
    assert contents(tmp_path) == contents(shards)


def test_finished_shards_are_not_drawn_again(shards: Path) -> None:
    before = {name: (shards / name).stat().st_mtime_ns for name in contents(shards) if name.endswith(".tar")}
    reported: list[int] = []
    build_shards(SHARDS, str(shards), reported.append)
    assert reported == [21]
    assert {name: (shards / name).stat().st_mtime_ns for name in before} == before


def test_shards_with_other_settings_and_png_files_are_refused(uninterrupted: Path, shards: Path) -> None:
    before = contents(shards), contents(uninterrupted)
    with pytest.raises(ConfigError, match="holds shards made with images 7, records_per_shard 5, size 16: give the"):
        build_shards(replace(SHARDS, images=8, size=32, shards=6), str(shards))
    with pytest.raises(ConfigError, match="holds pictures as PNG files"):
        build_shards(SHARDS, str(uninterrupted))
    with pytest.raises(ConfigError, match="holds shards"):
        build(SMALL, shards)
    assert (contents(shards), contents(uninterrupted)) == before


def test_a_folder_with_other_settings_is_refused(uninterrupted: Path) -> None:
    before = contents(uninterrupted)
    with pytest.raises(ConfigError, match="size 16, seed 5: give the same settings"):
        build(WorldSettings(identities=3, images=7, size=32, seed=6), uninterrupted)
    assert contents(uninterrupted) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--identities": "0"}, "0 identities cannot be drawn: give 1 to 10,000,000."),
        ({"--identities": "many"}, "Argument --identities: invalid int value: 'many'"),
        ({"--images": "-1"}, "-1 images of a person cannot be drawn: give 1 or more."),
        ({"--size": "4"}, "A size of 4 pixels cannot be drawn: give 16 to 1024."),
        ({"--seed": "-2"}, "The seed is -2: give 0 or more."),
        ({"--shards": "0"}, "A shard of 0 records cannot be written: give 1 or more."),
        (
            {"--people": "martians"},
            "There is no range of people called 'martians': choose one of train, judge, held_out, demo.",
        ),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    change: dict[str, str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"--identities": "1", "--images": "1", "--size": "16", "--seed": "0", "--output": str(tmp_path / "new")}
    assert run({**options, **change}) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(sentence) and captured.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_an_output_that_is_a_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert run({"--identities": "1", "--images": "1", "--output": str(file)}) == 2
    assert "cannot be used as the output folder" in capsys.readouterr().err


def test_the_command_writes_what_build_writes(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"--identities": "3", "--images": "7", "--size": "16", "--seed": "5", "--output": str(tmp_path)}
    assert run(options) == 0
    assert capsys.readouterr().out == f"21 pictures of 3 people: {tmp_path / 'metadata.jsonl'}\n"
    assert contents(tmp_path) == contents(uninterrupted)


def test_the_command_writes_shards(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"--identities": "3", "--images": "7", "--size": "16", "--seed": "5", "--shards": "5"}
    assert run({**options, "--output": str(tmp_path)}) == 0
    assert capsys.readouterr().out == f"21 pictures of 3 people: {tmp_path / 'datasheet.json'}\n"
    assert contents(tmp_path) == contents(shards)


def run(options: dict[str, str]) -> int | str | None:
    """Run the world command with these options and return the exit code."""
    try:
        return main(["world", *(word for pair in options.items() for word in pair)])
    except SystemExit as stop:
        return stop.code
