"""A data set of records with the trainer's row numbers: squares, faces, pairs, and unusable records by reason."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagine.errors import ConfigError
from imagine.evaluation.report import to_pil
from imagine.people.faces import KnownBoxesFinder, crop_face
from imagine.records import FaceBox
from imagine.shards.reading import Record, open_records
from imagine.shards.writing import DatasheetInfo, ShardWriter
from imagine.world import captions, render, sample_contexts, sample_people
from tests.photographs import astronaut
from tests.toy_training import ToyTask
from train.__main__ import main
from train.cache.face_crops import FaceCrops
from train.data.portraits import pictures_of
from train.data.recorded import RecordPictures, open_recorded
from train.data.sources import Mixture, Source

PEOPLE = 3


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def records(wide: bool = False) -> list[Record]:
    """Return two pictures of each person, the second the target of the first; `wide` pastes them into wider photos."""
    seeds = range(2 * PEOPLE)
    people, contexts = sample_people([seed // 2 for seed in seeds]), sample_contexts(seeds)
    out, texts = render(people, contexts), captions(people, contexts, "dense", list(seeds))
    made = []
    for i in seeds:
        image, box = to_pil(out.images[i]), out.boxes[i].tolist()
        if wide:
            photo = Image.new("RGB", (328, 128), "white")
            photo.paste(image, (100, 0))
            image, box = photo, [box[0] + 100, *box[1:]]
        made.append(Record(
            f"{i:04d}", png(image), texts[i], {"terse": f"person {i}"}, str(i // 2), f"{i - 1:04d}" if i % 2 else None,
            tuple(box), "synthetic" if i % 2 else "real", image.width, image.height,
        ))  # fmt: skip
    return made


def written(folder: Path, some: list[Record]) -> str:
    with ShardWriter(folder, DatasheetInfo("test", "tests", "rendered", "Apache-2.0"), records_per_shard=4) as writer:
        for record in some:
            writer.write(record)
    return str(folder)


def spoil(shard: Path) -> None:
    """Damage the first picture in a shard, as a faulty disk would."""
    content = bytearray(shard.read_bytes())
    place = content.find(b"\x89PNG")
    content[place : place + 8] = bytes(8)
    shard.write_bytes(content)


def test_shards_become_rows_with_faces_captions_and_pairs(tmp_path: Path) -> None:
    address = written(tmp_path / "shards", records())
    pictures = open_recorded(address, 64, tmp_path / "kept")
    gallery = pictures.gallery
    assert len(gallery) == 6 and gallery.pairs("other").tolist() == [[0, 1], [2, 3], [4, 5]]
    assert gallery.pairs("self").tolist() == [[0, 0], [2, 2], [4, 4]]
    texts = gallery.captions(torch.tensor([3, 3]), ["terse", "dense"])
    assert texts[0] == "person 3" and texts[1] == records()[3].caption
    images, boxes = pictures.take(torch.tensor([5, 0]))
    assert images.shape == (2, 3, 64, 64)
    whole = np.asarray(Image.open(io.BytesIO(records()[5].read())).resize((64, 64), Image.Resampling.BOX)) / 255
    assert torch.allclose(images[0].permute(1, 2, 0), torch.from_numpy(whole).float(), atol=1e-6)
    assert boxes[0].tolist() == pytest.approx([value / 2 for value in records()[5].box or ()], abs=1e-3)


def test_wide_photos_are_cut_to_a_square_around_the_face(tmp_path: Path) -> None:
    plain = open_recorded(written(tmp_path / "plain", records()), 128, tmp_path / "a")
    wide = open_recorded(written(tmp_path / "wide", records(wide=True)), 128, tmp_path / "b")
    rows = torch.tensor([2, 4])
    middles = [boxes[:, 0] + boxes[:, 2] / 2 for _, boxes in (plain.take(rows), wide.take(rows))]
    assert (middles[1] - 64).abs().max() < 1  # the face is in the middle of the square
    assert torch.allclose(plain.take(rows)[1][:, 1:], wide.take(rows)[1][:, 1:], atol=1e-2)
    assert plain.frames(rows).tolist() == [[128, 128, 0, 0]] * 2
    assert wide.frames(rows)[:, [0, 1, 3]].tolist() == [[328, 128, 0]] * 2
    shifts = wide.frames(rows)[:, 2] + wide.take(rows)[1][:, 0] - 100  # the box's left in the narrow picture
    assert torch.allclose(shifts, plain.take(rows)[1][:, 0], atol=1e-2)


def test_unusable_records_are_counted_and_never_drawn(tmp_path: Path) -> None:
    some = records()
    faceless = Record("0003", some[3].image, "a person", identity="1", reference="0002")
    address = written(tmp_path / "shards", [some[0], some[1], some[2], faceless, some[4], some[5]])
    spoil(tmp_path / "shards" / "00000.tar")
    pictures = open_recorded(address, 64, tmp_path / "kept", KnownBoxesFinder(()))
    assert pictures.gallery.pairs("other").tolist() == [[4, 5]]
    assert pictures.gallery.pairs("self").tolist() == [[2, 2], [4, 4]]
    report = json.loads((tmp_path / "kept" / "left_out.json").read_text())
    assert report["unusable"] == {"cannot be read": 1, "show no face": 1}
    assert (pictures.take(torch.tensor([0]))[0] == 0.5).all()
    again = open_recorded(address, 64, tmp_path / "kept", None)  # cached: no face is detected again
    assert again.gallery.usable.tolist() == pictures.gallery.usable.tolist()


def test_a_record_that_becomes_unreadable_later_is_not_used_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = written(tmp_path / "shards", records())
    pictures = open_recorded(address, 64, tmp_path / "kept")
    spoil(tmp_path / "shards" / "00000.tar")
    images = pictures.take(torch.tensor([0, 2]))[0]
    assert (images[0] == 0.5).all() and not (images[1] == 0.5).all()
    assert "Record 0000" in caplog.text and "not used from now on" in caplog.text
    again = open_recorded(address, 64, tmp_path / "kept")
    for each in (pictures, again):
        assert each.gallery.pairs("other").tolist() == [[2, 3], [4, 5]]
        assert each.gallery.pairs("self").tolist() == [[2, 2], [4, 4]]
    assert json.loads((tmp_path / "kept" / "left_out.json").read_text())["unusable"] == {"cannot be read": 1}


def test_faces_are_detected_in_records_without_a_box(tmp_path: Path) -> None:
    plain = [Record(each.key, each.image, each.caption, identity=each.identity) for each in records()]
    where = FaceBox(30, 40, 50, 60, 1.0)
    pictures = open_recorded(written(tmp_path / "shards", plain), 64, tmp_path / "kept", KnownBoxesFinder((where,)))
    assert isinstance(pictures, RecordPictures)
    assert pictures.take(torch.tensor([0]))[1][0].tolist() == [15, 20, 25, 30]
    assert len(pictures.gallery.pairs("other")) == 6  # both orders of every two pictures of a person


def test_a_data_set_without_usable_records_is_an_error(tmp_path: Path) -> None:
    address = written(tmp_path / "shards", records()[:1])
    spoil(tmp_path / "shards" / "00000.tar")
    with pytest.raises(ConfigError, match=r"No record of .* can be used"):
        open_recorded(address, 64, tmp_path / "kept")


def test_a_gallery_can_be_a_data_set_of_records(tmp_path: Path) -> None:
    address = written(tmp_path / "shards", records())
    data = {"folder": str(tmp_path / "data"), "galleries": {"mine": {"records": address}}}
    pictures = pictures_of(data, "mine")
    mixture = Mixture({"mine": 1}, {"mine": Source(gallery="mine")}, {"mine": pictures.gallery})
    drawn = mixture.draw(0, 0, 6)
    assert sorted(drawn.targets.tolist()) == [1, 1, 3, 3, 5, 5] and torch.equal(drawn.references + 1, drawn.targets)


def test_a_limit_takes_the_first_pairs_of_the_first_shards(tmp_path: Path) -> None:
    loose = [replace(record, key=f"loose{i}", reference=None, identity=None) for i, record in enumerate(records()[:4])]
    address = written(tmp_path / "shards", [*loose, *records()])  # four records per shard
    few = open_recorded(address, 64, tmp_path / "few", most=5)
    assert [record.key for record in few.gallery.records] == ["0000", "0001", "0002", "0003", "0004"]
    assert few.gallery.pairs("other").tolist() == [[0, 1], [2, 3]] and len(few.gallery.pairs("self")) == 3
    whole = open_recorded(address, 64, tmp_path / "whole")
    assert torch.equal(few.take(torch.tensor([1]))[0], whole.take(torch.tensor([5]))[0])
    assert few.gallery.mark != whole.gallery.mark
    assert len(open_records(address, tmp_path / "index", shards=1)) == 4


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((200.0, 10.0, 40.0, 40.0), False),  # outside, and the record states no size that would tell
        ((-90.0, 10.0, 100.0, 40.0), False),
        ((0.25, 0.2, 0.4, 0.5), False),  # in shares of the picture
        ((40.0, 30.0, 50.0, 60.0), True),  # the stated size has another shape than the picture
    ],
)
def test_a_box_outside_the_picture_is_refused_and_the_face_is_searched(
    box: tuple[float, float, float, float], size: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    some = records()
    shard = tmp_path / "shards" / "0.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        for record in some:
            facts: dict[str, object] = {"box": list(record.box or ()), "identity": record.identity}
            if record is some[2]:
                facts |= {"box": list(box), **({"width": 300, "height": 90} if size else {})}
            members = {"png": record.read(), "txt": record.caption.encode(), "json": json.dumps(facts).encode()}
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{record.key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    where = FaceBox(30, 40, 50, 60, 1.0)
    pictures = open_recorded(str(shard), 64, tmp_path / "kept", KnownBoxesFinder((where,)))
    images, boxes = pictures.take(torch.arange(6))
    assert boxes[2].tolist() == [15, 20, 25, 30] and images[2].std() > 0.05
    assert boxes[1].tolist() == pytest.approx([value / 2 for value in some[1].box or ()], abs=1e-3)
    report = json.loads((tmp_path / "kept" / "left_out.json").read_text())
    reason, names = next(iter(report["names"].items()))
    assert reason.startswith("a box") and names[0].endswith("0002") and report["problems"] == {reason: 1}
    assert "0002" in caplog.text and pictures.gallery.usable.all()
    again = open_recorded(str(shard), 64, tmp_path / "kept", None)
    assert json.loads((tmp_path / "kept" / "left_out.json").read_text()) == report and again.gallery.usable.all()


def test_repeats_are_the_weight_of_a_picture(tmp_path: Path) -> None:
    for folder, record in zip(("3_a person", "loose"), records(), strict=False):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(record.read())
        (tmp_path / folder / "a.txt").write_text("a person")
    finder = KnownBoxesFinder((FaceBox(30, 40, 50, 60, 1.0),))
    gallery = open_recorded(str(tmp_path), 64, tmp_path / "kept", finder).gallery
    assert gallery.pairs("self").tolist() == [[0, 0]] * 3 + [[1, 1]]
    mixture = Mixture({"mine": 1}, {"mine": Source(gallery="mine", target="self")}, {"mine": gallery})
    assert sorted(mixture.draw(0, 0, 8).targets.tolist()) == [0] * 6 + [1] * 2


def test_a_dry_run_names_what_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = records()
    address = written(tmp_path / "shards", [*some[:5], replace(some[5], reference="nobody")])
    (tmp_path / "run.yaml").write_text(json.dumps({
        "data": {"galleries": {"mine": {"records": address}, "no": {"records": "no"}}},
        "stages": {"one": {"task": "toy", "train": {"both": 1e-2}, "images": 16, "batch_size": 8}},
    }))  # fmt: skip
    assert main([str(tmp_path / "run.yaml"), "--output", str(tmp_path / "run"), "--dry-run"], {"toy": ToyTask}) == 0
    printed = capsys.readouterr().out
    assert "gallery mine: 6 records of" in printed and "gallery no: There are no shards" in printed
    assert "1 times a reference that does not exist: 00001.tar: 0005" in printed


def test_the_crop_of_a_tilted_photo_is_that_of_inference(tmp_path: Path) -> None:
    tilted = astronaut().rotate(20, Image.Resampling.BICUBIC)
    tilted.save(tmp_path / "tilted.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "tilted.png", "text": "a person"}) + "\n")
    eyes = ((200.0, 130.0), (240.0, 115.4), (220.0, 140.0), (210.0, 160.0), (235.0, 150.0))
    finder = KnownBoxesFinder((FaceBox(165, 75, 110, 110, 0.99, eyes),))
    pictures = open_recorded(str(tmp_path), 512, tmp_path / "cache", finder)
    assert np.isclose(pictures.rolls[0], np.radians(-20), atol=0.01)
    middle = torch.full((1, 2), 0.5)
    trained = FaceCrops(pictures, 64, tmp_path / "cache", noisy=False).take(torch.tensor([0]), middle)[0]
    differences = []
    for face in (finder.boxes[0], replace(finder.boxes[0], landmarks=())):
        inferred = crop_face(tilted, KnownBoxesFinder((face,)), 64)
        expected = torch.from_numpy(np.array(inferred.image)).permute(2, 0, 1).float() / 255
        differences.append(float((trained - expected).abs().mean()))
    assert differences[0] < 0.01 and differences[1] > 4 * differences[0]
