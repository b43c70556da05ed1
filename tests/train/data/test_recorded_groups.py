"""Records of several people with the trainer's row numbers: canvas, boxes, masks, references, and what is left out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagine.errors import ConfigError
from imagine.people.faces import KnownBoxesFinder
from imagine.shards.masks import encode_mask
from imagine.shards.people import RecordPerson
from imagine.shards.reading import Record
from tests import tiny
from tests.group_records import group, picture_of, portraits, records, without_references
from tests.train.data.test_recorded import png, spoil, written
from train.cache.face_crops import FaceCrops
from train.data.canvas import CanvasCut, group_canvas
from train.data.portraits import describe_records
from train.data.recorded import open_recorded
from train.data.recorded_groups import RecordGroups, open_record_groups

SHAPE = (64, 96)


class PictureCodec:
    """A codec whose latents are pictures at an eighth of the size."""

    mark = "areas"

    def shape(self, side: int) -> tuple[int, int, int]:
        return 3, side // 8, side // 8

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, 8)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def opened(folder: Path, some: list[Record], people: int = 2) -> RecordGroups:
    gallery = open_record_groups(written(folder / "shards", some), people, SHAPE, folder / "cache")
    return RecordGroups(gallery, 64, folder / "cache", PictureCodec(), tiny.CROP, [], KnownBoxesFinder([tiny.BOX]))


def test_the_canvas_has_the_area_of_the_bases_square() -> None:
    assert group_canvas(2, 1024, 8) == (832, 1280) and group_canvas(3, 1024, 8) == (704, 1472)
    assert group_canvas(4, 512, 8) == (448, 576) and group_canvas(2, 16, 2) == (12, 20)


def test_pictures_boxes_and_masks_lie_where_the_record_says(tmp_path: Path) -> None:
    made = records()
    groups = opened(tmp_path, made)
    assert groups.rows.tolist() == [0, 1, 2] and groups.gallery.name(1) == "record g1"
    order = torch.tensor([[1, 0], [0, 1]])
    targets = groups.targets(torch.tensor([0, 2]), order)
    assert targets.latents.shape == (2, 3, 8, 12) and targets.known.eq(1).all()
    first, second = made[8].people
    assert groups.pictures.boxes(torch.tensor([0]))[0, 0].tolist() == pytest.approx(first.box, abs=1e-4)
    middle = [int((one.box or (0,))[0] + (one.box or (0,) * 4)[2] / 2) // 8 for one in (first, second)]
    down = int((first.box or (0, 0, 0, 0))[1] + 4) // 8
    assert targets.masks[0, 0, down, middle[1]] > 0.9 > 0.1 > targets.masks[0, 0, down, middle[0]]  # exchanged
    assert targets.masks[0, 1, down, middle[0]] > 0.9 and targets.faces[0, 0, down, middle].tolist() == [1, 1]
    assert targets.frames.tolist() == [[96, 64, 0, 0]] * 2


def test_a_wider_or_higher_picture_is_cut_around_its_people(tmp_path: Path) -> None:
    whole = records()[8]
    picture = picture_of(whole)
    moved: dict[str, Any] = {}
    for name, size, corner in (("wide", (300, 64), (150, 0)), ("high", (96, 200), (0, 100))):
        photo = Image.new("RGB", size, "white")
        photo.paste(picture, corner)
        people = []
        for one in whole.people:
            mask = np.zeros((size[1], size[0]), bool)
            box = one.box or (0, 0, 0, 0)
            mask[int(box[1]) + corner[1] : size[1], int(box[0]) + corner[0] : int(box[0] + box[2]) + corner[0]] = True
            place = (box[0] + corner[0], box[1] + corner[1], *box[2:])
            people.append(replace(one, box=place, mask=encode_mask(mask), references=(), identity=None))
        moved[name] = replace(whole, key=name, image=png(photo), width=None, height=None, people=tuple(people))
    groups = opened(tmp_path, list(moved.values()))
    rows = torch.arange(2)
    boxes = groups.pictures.boxes(rows)
    middle = (boxes[..., :2] + boxes[..., 2:] / 2).mean(1)
    assert (middle[0, 0] - 48).abs() < 1 and (middle[1, 1] - 32).abs() < 1
    assert (boxes[..., 2:] - torch.tensor([one.box[2:] for one in whole.people if one.box])).abs().max() < 1e-3
    masks = groups.pictures.masks(rows)[0]
    for row in range(2):
        for person in range(2):
            left, top, width, height = (boxes[row, person] / 8).tolist()
            assert masks[row, person, int(top + height / 2), int(left + width / 2)] == 1
    frames = groups.pictures.frames(rows)
    assert frames[0].tolist()[:2] == [300, 64] and frames[1, 3] > 60


def test_without_masks_it_is_known_inside_the_faces_alone(tmp_path: Path) -> None:
    groups = opened(tmp_path, records(masks=False))
    masks, known = groups.pictures.masks(torch.arange(3))
    assert torch.equal(known, masks.sum(1).clamp(max=1)) and 0.02 < float(known.mean()) < 0.5
    width, height = groups.pictures.boxes(torch.tensor([0]))[0, 1, 2:].tolist()
    assert float(masks[0, 1].sum()) * 64 == pytest.approx(width * height, rel=0.02)


def test_each_person_gets_a_crop_of_one_of_their_own_references(tmp_path: Path) -> None:
    groups = opened(tmp_path, records())
    rows, order = torch.tensor([0, 0, 1]), torch.tensor([[0, 1], [1, 0], [0, 1]])
    draws = torch.full((3, 2, 3), 0.2)
    crops = groups.crops(rows, order, draws)
    assert crops.shape == (3, 2, 3, tiny.CROP, tiny.CROP) and torch.equal(crops[0], crops[1].flip(0))
    draws[..., 0] = 0.7
    other = groups.crops(rows, order, draws)
    assert not torch.equal(other, crops)
    portrait = open_recorded(written(tmp_path / "p", list(portraits())), 64, tmp_path / "singles")
    alone = FaceCrops(portrait, tiny.CROP, tmp_path / "singles", noisy=True)
    wanted = alone.take(torch.tensor([0, 2, 2, 0, 4, 6]), torch.full((6, 2), 0.2)).unflatten(0, (3, 2))
    assert (crops - wanted).abs().max() < 1e-6


def test_a_person_without_a_reference_is_their_own(tmp_path: Path) -> None:
    some = [*records()[:9], without_references(records()[9])]
    mixed = replace(some[8], people=(some[8].people[0], without_references(some[8]).people[1]), key="mixed")
    groups = opened(tmp_path, [*some, mixed])
    rows, order = torch.tensor([1, 2]), torch.tensor([[0, 1]] * 2)
    crops = groups.crops(rows, order, torch.full((2, 2, 3), 0.5))
    face = groups.pictures.images(torch.tensor([1]))[0]
    left, top, width, height = groups.pictures.boxes(torch.tensor([1]))[0, 0].tolist()
    patch = face[:, int(top) : int(top + height), int(left) : int(left + width)]
    assert (crops[0, 0].mean((1, 2)) - patch.mean((1, 2))).abs().max() < 0.25
    assert torch.equal(crops[1, 0], groups.crops(torch.tensor([0]), order[:1], torch.full((1, 2, 3), 0.5))[0, 0])


def test_captions_and_orders_agree(tmp_path: Path) -> None:
    groups = opened(tmp_path, records())
    rows, styles = torch.tensor([0, 0]), ["dense", "rewritten"]
    texts = groups.gallery.captions(rows, styles)
    assert texts[0] == "the first person smiling and the second person smiling"
    assert texts[1].startswith("the first person, the one on the left, next to the second person")
    assert groups.gallery.order(rows, styles).tolist() == [[1, 0], [0, 1]]


def broken(made: list[Record]) -> list[Record]:
    """Return records of which one cannot be read, one shows a face outside the canvas, and one has no usable face."""
    far = np.zeros((64, 400), bool)
    far[:, 360:] = True
    wide = group((0, 1), 20)
    photo = Image.new("RGB", (400, 64), "white")
    people = (
        replace(wide.people[0], box=(2, 20, 20, 24), mask=None), RecordPerson("bob", mask=encode_mask(far),
                                                                             references=("p1_0",)),
    )  # fmt: skip
    cut = replace(wide, key="cut", image=png(photo), width=400, height=64, people=people)
    blank = replace(made[0], key="blank", image=png(Image.new("RGB", (64, 64), "white")), box=None, identity="9")
    lone = group((0, 1), 21)
    faceless = replace(
        lone, key="faceless", people=(replace(lone.people[0], references=("blank",), identity=None), lone.people[1])
    )
    return [*made, cut, blank, faceless]


def test_what_cannot_be_used_is_counted_and_never_drawn(tmp_path: Path) -> None:
    class Nobody:
        def find(self, image: Image.Image) -> tuple[()]:
            return ()

    address = written(tmp_path / "shards", broken(records()))
    spoil(tmp_path / "shards" / "00002.tar")  # g0
    gallery = open_record_groups(address, 2, SHAPE, tmp_path / "cache")
    groups = RecordGroups(gallery, 64, tmp_path / "cache", PictureCodec(), tiny.CROP, [], Nobody())
    assert [gallery.record(row).key for row in groups.rows.tolist()] == ["g1", "g2"]
    left_out = json.loads((tmp_path / "cache" / "left_out.json").read_text())
    assert list(left_out["unusable"].values()) == [1, 1, 1] and left_out["other number of people"] == 1
    named = [left_out["names"][words] for words in left_out["unusable"]]
    assert named == [["g0"], ["cut"], ["faceless"]]
    assert groups.pictures.images(torch.tensor([0])).eq(0.5).all()


def test_groups_are_not_read_as_portraits(tmp_path: Path) -> None:
    pictures = open_recorded(written(tmp_path / "shards", records()), 64, tmp_path / "kept")
    assert len(pictures.gallery) == 12 and pictures.gallery.usable.tolist() == [True] * 8 + [False] * 4
    assert pictures.gallery.pairs("self")[:, 0].tolist() == list(range(8))
    assert json.loads((tmp_path / "kept" / "left_out.json").read_text())["unusable"] == {}


def test_a_data_set_without_such_records_is_refused_in_one_sentence(tmp_path: Path) -> None:
    address = written(tmp_path / "shards", list(portraits()))
    with pytest.raises(ConfigError, match="shows 2 people: check the field `people`"):
        open_record_groups(address, 2, SHAPE, tmp_path / "cache")


def test_a_trial_reads_the_first_groups_and_their_references(tmp_path: Path) -> None:
    address = written(tmp_path / "shards", records())
    gallery = open_record_groups(address, 2, SHAPE, tmp_path / "cache", most=2)
    assert len(gallery) == 2 and gallery.others == 1


def test_a_dry_run_counts_the_records_of_a_group(tmp_path: Path) -> None:
    address = written(tmp_path / "shards", records())
    lines = describe_records({"groups": {"two": {"people": 2, "records": address}, "world": {"people": 2, "count": 3}}})
    assert lines == [f"group two: 3 records of 2 people of {address}"]


def test_a_picture_that_was_shrunk_when_it_was_opened_keeps_its_places() -> None:
    person = RecordPerson("a", box=(100, 100, 200, 200))
    record = Record("a", b"", "x", width=3000, height=2000, people=(person, replace(person, box=(1500, 100, 200, 200))))
    cut = CanvasCut.around(Image.new("RGB", (1500, 1000)), record, (832, 1280))
    assert cut.shrunk == 0.5 and cut.shows(person)
    scale = 832 / 1000 * 0.5 if cut.edges[3] - cut.edges[1] == 1000 else 1280 / 1500 * 0.5
    assert cut.box(person)[2] == pytest.approx(200 * scale, rel=1e-3)
