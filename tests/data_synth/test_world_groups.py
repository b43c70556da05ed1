"""The builder's pictures of several people of the portrait world: their records, resuming, and training on them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_synth.__main__ import main
from data_synth.world_command import WorldSettings, build, build_shards
from imagine.errors import ConfigError
from imagine.shards.masks import decode_mask
from imagine.shards.people import bind_caption
from imagine.shards.reading import load_picture, open_records
from imagine.world import render_groups, sample_contexts, sample_groups, sample_people
from imagine.world.groups import canvas_shape
from tests import tiny
from tests.folders import contents
from tests.train.data.test_recorded_groups import PictureCodec
from train.data.recorded_groups import RecordGroups, open_record_groups

SMALL = WorldSettings(identities=4, images=2, size=32, seed=5, groups=10, group_size=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    build(SMALL, folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    build_shards(replace(SMALL, shards=7), str(folder))
    return folder


def test_folders_and_shards_hold_the_same_groups(whole: Path, shards: Path, tmp_path: Path) -> None:
    one, other = open_records(whole), open_records(shards, tmp_path)
    assert len(one) == len(other) == 18 and one.problems == other.problems == {}
    for records in (one, other):
        groups = records.groups()
        assert len(groups) == 10
        for row, references in groups.items():
            for person, found in zip(records[row].people, references, strict=True):
                assert [records[number].identity for number in found] == [person.identity] * 2
    pair = [next(record for record in records if record.people) for records in (one, other)]
    assert pair[0].caption == pair[1].caption and pair[0].read() == pair[1].read()
    assert [replace(each, references=()) for each in pair[0].people] == [
        replace(each, references=()) for each in pair[1].people
    ]


def test_people_are_in_the_order_of_the_captions_with_exact_boxes_and_masks(whole: Path) -> None:
    orders = set()
    for record in (each for each in open_records(whole) if each.people):
        picture = load_picture(record)
        assert (picture.height, picture.width) == canvas_shape(2, 32)
        assert [person.phrase for person in record.people] == ["the first person", "the second person"]
        left = [(person.box or (0,))[0] for person in record.people]
        orders.add(left[0] < left[1])
        for style, text in record.captions.items():
            bound = bind_caption(text, record.people)
            assert bound.order == (0, 1) and bound.text == text and bound.mentioned == {0, 1}, style
            first = text.split(";")[0]
            assert not {"on the left": left[0] > left[1], "on the right": left[0] < left[1]}.get(
                next((place for place in ("on the left", "on the right") if place in first), ""), False
            )
        for person in record.people:
            assert person.mask is not None and person.box is not None
            mask, (x, y, across, down) = decode_mask(person.mask), person.box
            face = mask[max(int(y), 0) : int(y + down), max(int(x), 0) : int(x + across)]
            assert mask.shape == (32, 48) and face.mean() > 0.5
        assert not np.logical_and(*(decode_mask(person.mask or {}) for person in record.people)).any()
    assert orders == {True, False}


def test_a_row_is_enough_to_draw_its_people_again(whole: Path) -> None:
    row = next(row for row in map(json.loads, (whole / "metadata.jsonl").read_text().splitlines()) if "people" in row)
    assert len(row["attributes"]) == 2 and row["arrangement"]
    boxes = [person["box"] for person in row["people"]]
    people = sample_people([int(person["identity"]) for person in sorted(row["people"], key=lambda one: one["box"][0])])
    groups = sample_groups([row["context"]], 2, 1.5)
    out = render_groups(people, sample_contexts([row["context"]] * 2), 2, 32, groups=groups)
    assert np.abs(np.array(sorted(boxes))[:, :2] - out.boxes[0, :, :2].numpy()).max() < 4  # but for their own turns


def test_a_resumed_run_equals_an_uninterrupted_one(whole: Path, shards: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int) -> None:
        if done > 8:  # the portraits are finished
            raise Killed

    for folder, make, wanted in (
        (tmp_path / "files", lambda place, report: build(SMALL, place, report), whole),
        (tmp_path / "shards", lambda place, report: build_shards(replace(SMALL, shards=7), str(place), report), shards),
    ):
        with pytest.raises(Killed):
            make(folder, kill)
        make(folder, lambda done: None)
        assert contents(folder) == contents(wanted)


def test_portraits_are_those_of_a_run_without_groups_and_can_get_groups_later(whole: Path, tmp_path: Path) -> None:
    build(replace(SMALL, groups=0), tmp_path)
    portraits = contents(tmp_path)
    assert "group_size" not in json.loads((tmp_path / "world.json").read_text())
    build(SMALL, tmp_path)
    assert contents(tmp_path) == contents(whole)
    assert all(contents(whole)[name] == content for name, content in portraits.items() if name.endswith(".png"))
    build(replace(SMALL, groups=0), tmp_path)
    with pytest.raises(ConfigError, match="made with group_size 2"):
        build(replace(SMALL, group_size=3), tmp_path)


def test_the_trainer_reads_what_the_builder_wrote(shards: Path, tmp_path: Path) -> None:
    gallery = open_record_groups(str(shards), 2, (32, 48), tmp_path)
    groups = RecordGroups(gallery, 32, tmp_path, PictureCodec(), tiny.CROP, [])
    assert len(groups.rows) == 10
    rows, order = groups.rows[:4], torch.tensor([[0, 1]] * 4)
    targets = groups.targets(rows, order)
    assert targets.masks.shape == (4, 2, 4, 6) and targets.known.eq(1).all()
    assert groups.crops(rows, order, torch.full((4, 2, 3), 0.5)).shape == (4, 2, 3, tiny.CROP, tiny.CROP)


def test_the_command_draws_groups_and_explains_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    plain = ["world", "--identities", "3", "--images", "1", "--size", "16"]
    command = [*plain, "--groups", "2", "--group-size", "3", "--output", str(tmp_path)]
    assert main(command) == 0
    assert "5 pictures of 3 people, 2 of them of 3 people" in capsys.readouterr().out
    for more, words in (
        (["--groups", "1", "--group-size", "5"], "give 2 to 4"),
        (["--groups", "1", "--group-size", "4"], "needs as many identities, not 3"),
        (["--groups", "-1"], "give 0 or more"),
    ):
        assert main([*plain, *more, "--output", str(tmp_path / "x")]) == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert words in sentence
