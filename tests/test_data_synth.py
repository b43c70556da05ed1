"""The builder's world command: what it writes, that it can be killed and carried on, and how it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_synth.__main__ import main
from data_synth.world_command import WorldSettings, build
from imagine.errors import ConfigError
from imagine.world import attributes, render, sample_contexts, sample_people
from imagine.world.seeds import HELD_OUT, TRAIN

SMALL = WorldSettings(identities=3, images=7, size=16, seed=5)


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    build(SMALL, folder)
    return folder


def test_every_row_has_its_picture_and_every_picture_its_row(straight: Path) -> None:
    table = rows(straight)
    assert len(table) == 21
    assert {row["file"] for row in table} == {name for name in contents(straight) if name.endswith(".png")}
    assert set(table[0]) >= {"file", "identity", "caption", "attributes"}
    assert len({row["identity"] for row in table}) == 3
    assert all(row["identity"] in TRAIN for row in table)
    assert len({str(row["attributes"]) for row in table}) > 18, "contexts should differ from picture to picture"


def test_a_row_is_enough_to_draw_its_picture_again(straight: Path) -> None:
    row = rows(straight)[10]
    people, contexts = sample_people([int(str(row["identity"]))]), sample_contexts([int(str(row["context"]))])
    with Image.open(straight / str(row["file"])) as picture:
        assert (picture.size, picture.mode) == ((16, 16), "RGB")
        there = np.asarray(picture).astype(int)
    again = render(people, contexts, size=16).images[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(there - again).max() <= 1.01  # one step of 8 bits: batches may round the last bit another way
    assert attributes(people, contexts)[0] == row["attributes"]


def test_killed_and_carried_on_equals_a_straight_build(straight: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int) -> None:
        if done:
            raise Killed

    with pytest.raises(Killed):
        build(SMALL, tmp_path, kill)
    kept = contents(tmp_path)
    assert 0 < len([name for name in kept if name.endswith(".png")]) < 21
    table = tmp_path / "metadata.jsonl"
    table.write_bytes(table.read_bytes()[:-30])  # as if killed in the middle of writing a row
    seen: list[int] = []
    build(SMALL, tmp_path, seen.append)
    assert seen[0] == 15 and seen[-1] == 21
    assert contents(tmp_path) == contents(straight)


def test_a_lost_picture_is_drawn_again_and_the_others_are_left_alone(straight: Path, tmp_path: Path) -> None:
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


def test_another_seed_gives_other_people_and_a_range_its_own(straight: Path, tmp_path: Path) -> None:
    build(WorldSettings(identities=3, images=1, size=16, seed=6), tmp_path / "other")
    build(WorldSettings(identities=3, images=1, size=16, seed=5, people="held_out"), tmp_path / "held_out")
    first, other, held_out = ({row["identity"] for row in rows(tmp_path / n)} for n in (straight, "other", "held_out"))
    assert not first & other
    assert all(identity in HELD_OUT for identity in held_out)


def test_a_folder_with_other_settings_is_refused(straight: Path) -> None:
    before = contents(straight)
    with pytest.raises(ConfigError, match="size 16, seed 5: give the same settings"):
        build(WorldSettings(identities=3, images=7, size=32, seed=6), straight)
    assert contents(straight) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--identities": "0"}, "0 identities cannot be drawn: give 1 to 10,000,000."),
        ({"--identities": "many"}, "Argument --identities: invalid int value: 'many'"),
        ({"--images": "-1"}, "-1 images of a person cannot be drawn: give 1 or more."),
        ({"--size": "4"}, "A size of 4 pixels cannot be drawn: give 16 to 1024."),
        ({"--seed": "-2"}, "The seed is -2: give 0 or more."),
        (
            {"--people": "martians"},
            "There are no people called 'martians': choose one of train, judge, held_out, demo.",
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
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"--identities": "3", "--images": "7", "--size": "16", "--seed": "5", "--output": str(tmp_path)}
    assert run(options) == 0
    assert capsys.readouterr().out == f"21 pictures of 3 people: {tmp_path / 'metadata.jsonl'}\n"
    assert contents(tmp_path) == contents(straight)


def run(options: dict[str, str]) -> int | str | None:
    """The exit code of the world command with these options."""
    try:
        return main(["world", *(word for pair in options.items() for word in pair)])
    except SystemExit as stop:
        return stop.code
