"""Records that show several people: reading, checking, writing, masks, captions in plain words, and references."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagine.shards import facts, links
from imagine.shards.facts import normalised_facts
from imagine.shards.masks import decode_mask, encode_mask, is_mask_of
from imagine.shards.people import RecordPerson, bind_caption
from imagine.shards.reading import Records, open_records
from tests.group_records import group, picture_of, portraits, records
from tests.train.data.test_recorded import png, written

BOX = [4, 4, 10, 12]
MASK = encode_mask(np.eye(6, 8) > 0)
ANN, BOB = {"name": "ann", "box": BOX}, {"name": "bob", "box": [40, 4, 10, 12]}


def opened(tmp_path: Path, some: Any) -> Records:
    return open_records(written(tmp_path / "shards", some), tmp_path / "cache")


def read(people: Any, caption: str = "{ann} and {bob}", **more: Any) -> tuple[dict[str, Any], dict[str, list[str]]]:
    problems: dict[str, list[str]] = {}
    given = {"caption": caption, "width": 80, "height": 60, "people": people, **more}
    return normalised_facts("", given, "0", problems), problems


def test_run_lengths_are_those_of_pycocotools() -> None:
    mask = np.zeros((6, 5), bool)
    mask[2:, 1:3], mask[0, 4] = True, True
    assert encode_mask(mask) == {"size": [6, 5], "counts": "84204MO"}  # as pycocotools 2.0 encodes it
    assert decode_mask({"size": [6, 5], "counts": [8, 4, 2, 4, 6, 1, 5]}).tolist() == mask.tolist()
    random = np.random.default_rng(0)
    for height, width in random.integers(1, 90, (40, 2)):
        noise = random.random((height, width)) < random.random()
        assert (decode_mask(encode_mask(noise)) == noise).all()


@pytest.mark.parametrize(
    "mask",
    [None, "84204MO", {}, {"size": [6, 5]}, {"size": [6, 5], "counts": "8420"}, {"size": [6, 5], "counts": [30]},
     {"size": [6, 5], "counts": [8, -4, 26]}, {"size": [6, 5], "counts": "8 \u00e9"}, {"size": [0, 5], "counts": []},
     {"size": [60000, 60000], "counts": [0, 3600000000]}, {"size": [6, 5], "counts": [0.5]},
     {"size": [6, 5], "counts": "o" * 90}, {"size": "65", "counts": [0, 30]}],
)  # fmt: skip
def test_what_is_no_mask_is_refused(mask: Any) -> None:
    assert not is_mask_of(mask, None, None)


def test_a_mask_may_be_smaller_than_its_picture_but_not_of_another_shape() -> None:
    assert is_mask_of(MASK, 80, 60) and is_mask_of(MASK, None, None) and not is_mask_of(MASK, 60, 80)


def test_records_of_several_people_are_written_and_read_again(tmp_path: Path) -> None:
    made = records()
    found = opened(tmp_path, made)
    assert [record.people for record in found] == [record.people for record in made]
    assert found.problems == {} and [len(each) for each in found.groups().values()] == [2, 2, 2, 3]
    keys = [record.key for record in found]
    pair = found.groups()[keys.index("g1")]
    assert [[keys[row] for row in person] for person in pair] == [["p2_0", "p2_1"], ["p3_0", "p3_1"]]
    assert all(len(found[row].people) == 0 for both in found.pairs() for row in both)
    mask = found[keys.index("g0")].people[0].mask
    assert mask is not None and decode_mask(mask).shape == picture_of(made[8]).size[::-1]
    sheet = json.loads((tmp_path / "shards" / "datasheet.json").read_text())
    assert sheet["groups"] == 4 and "4 pictures of several people" in (tmp_path / "shards/datasheet.md").read_text()
    assert "groups" not in json.loads((tmp_path / "shards" / "00000.json").read_text())  # a shard without any


def test_a_folder_of_pictures_names_references_by_file(tmp_path: Path) -> None:
    made = [*portraits()[:4], group((0, 1))]
    rows = []
    for record in made:
        (tmp_path / f"{record.key}.png").write_bytes(record.read())
        people = [one.as_dict() for one in record.people]
        for one in people:
            one["references"] = [f"./{key}.png" for key in one["references"]]
        rows.append({"file_name": f"{record.key}.png", "caption": record.caption, "people": people})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = open_records(tmp_path)
    assert found.problems == {} and found.groups() == {4: ((0, 1), (2, 3))}
    assert found[4].people[0].references == ("p0_0", "p0_1")


def test_a_value_that_is_refused_counts_as_missing() -> None:
    row, problems = read([{**ANN, "mask": {"size": [6, 8], "counts": "?"}, "references": ["a", {}]},
                          {"name": "b{o}b", "box": [400, 4, 10, 12], "mask": MASK, "identity": [1]}])  # fmt: skip
    assert row["people"] == [
        {"name": "ann", "box": [4.0, 4.0, 10.0, 12.0], "references": ["a"]}, {"name": "2", "mask": MASK}
    ]  # fmt: skip
    assert set(problems) == {
        facts.BAD_MASK, facts.BAD_REFERENCE, facts.BAD_NAME, facts.BOX_OUTSIDE, facts.BAD_IDENTITY, facts.UNMENTIONED,
    }  # fmt: skip
    assert set(problems) <= facts.RECORD_IS_READ and "people" not in row["extra"]


@pytest.mark.parametrize(
    ("people", "reason"),
    [
        ([ANN, {"name": "bob"}], facts.NOT_PLACED),
        ([ANN, {**BOB, "name": "Ann"}], facts.SAME_NAME),
        ([{**ANN, "phrase": "the man"}, {**BOB, "phrase": "the man"}], facts.SAME_NAME),
        ([{**ANN, "name": str(i)} for i in range(5)], facts.TOO_MANY_PEOPLE),
    ],
)
def test_a_record_whose_people_cannot_be_told_apart_is_left_out(people: Any, reason: str, tmp_path: Path) -> None:
    row, problems = read(people)
    assert row["people"] is None and problems[reason] == ["0"] and reason not in facts.RECORD_IS_READ
    (tmp_path / "a.png").write_bytes(png(picture_of(portraits()[0])))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "caption": "x", "people": people}))
    found = open_records(tmp_path)
    assert len(found) == 0 and reason in found.problems


def test_another_field_named_people_stays_as_it_is() -> None:
    for other in (3, ["ann", "bob"], {"a": 1}):
        row, problems = read(other)
        assert "people" not in row and row["extra"]["people"] == other and list(problems) == [facts.BAD_PEOPLE]
    assert read([])[1] == read(None)[1] == {}


def test_a_list_of_one_person_gives_the_record_its_box_reference_and_identity() -> None:
    row, problems = read([{**ANN, "references": ["x"], "identity": 7}], "a person")
    assert (row["box"], row["reference"], row["identity"]) == ([4, 4, 10, 12], "x", "7") and problems == {}
    row = read([ANN], "a person", box=[1, 1, 9, 9])[0]
    assert row["box"] == [1, 1, 9, 9]


def test_captions_get_the_plain_words_of_a_prompt_and_their_order() -> None:
    people = [RecordPerson("ann", "the woman"), RecordPerson("bob", "the man on the left")]
    bound = bind_caption("the man on the left hugs {ann}", people)
    assert bound.text == "the first person, the man on the left, hugs the second person" and bound.order == (1, 0)
    bound = bind_caption("a beach with the man on the left", people)
    assert bound.order == (1, 0) and bound.mentioned == {1}
    for text in ("two friends on a beach", "{nobody} and {ann}", "the second person waves to the first person"):
        assert (bind_caption(text, people).text, bind_caption(text, people).order) == (text, (0, 1))


def test_phrases_may_be_the_plain_words_themselves() -> None:
    people = [RecordPerson("a", "the second person"), RecordPerson("b", "the first person")]
    bound = bind_caption("the first person on the left; the second person on the right", people)
    assert bound.text.startswith("the first person on the left") and bound.order == (1, 0)
    assert bound.mentioned == {0, 1} and bind_caption("the second person", people).mentioned == {0}


def test_references_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    base = group((0, 1))
    ann, bob = base.people
    made = {
        "lost": (replace(ann, references=("nobody",)), bob),
        "other": (replace(ann, references=("p1_0", "p0_0")), bob),
        "several": (replace(ann, references=("g0", "p0_1")), bob),
        "self": (replace(ann, references=("self", "p0_1")), bob),
        "known": (replace(ann, references=()), bob),
        "faceless": (replace(ann, references=(), identity=None, box=None), bob),
        "own": (replace(ann, references=(), identity=None), bob),
    }
    some = [*portraits(), base, *(replace(base, key=key, people=people) for key, people in made.items())]
    folder = tmp_path / "all"
    folder.mkdir()
    found = open_records(written_in_one(folder, some), tmp_path / "cache")
    rows = {found[row].key: [[found[one].key for one in who] for who in each] for row, each in found.groups().items()}
    assert rows["other"][0] == ["p0_0"] and rows["several"][0] == rows["self"][0] == ["p0_1"]
    assert rows["known"][0] == ["p0_0", "p0_1"] and rows["own"][0] == [] and {"lost", "faceless"}.isdisjoint(rows)
    assert {reason: [key.split(": ")[1] for key in keys] for reason, keys in found.problems.items()} == {
        links.NOT_FOUND: ["lost"], links.NO_REFERENCE_LEFT: ["lost"], links.OTHER_PERSON: ["other"],
        links.SHOWS_SEVERAL: ["several"], links.TO_ITSELF: ["self"], links.NO_FACE: ["faceless"],
    }  # fmt: skip


def written_in_one(folder: Path, some: Any) -> str:
    """Write a folder of pictures with metadata, whose keys are the names of the files."""
    rows = []
    for record in some:
        (folder / f"{record.key}.png").write_bytes(record.read())
        facts = {"file_name": f"{record.key}.png", "caption": record.caption, "identity": record.identity}
        rows.append({**facts, "people": [one.as_dict() for one in record.people]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_the_mark_of_records_of_one_person_did_not_change(tmp_path: Path) -> None:
    """Caches of latents have it in their names, so that another mark would compute all of them again."""
    for file in ("a.png", "a.json"):
        (tmp_path / file).write_bytes(b'{"caption": "x"}')
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for file in ("a.png", "a.json"):
            shard.add(tmp_path / file, file)
    assert open_records(tmp_path / "0.tar", tmp_path / "cache").mark == "b894739f7ccef177"
    (tmp_path / "0.tar").unlink()
    assert open_records(tmp_path).mark == "b28772b4bc96bab2"
