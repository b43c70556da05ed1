"""Photos in any layout become references; faulty photos are counted by reason and stop nothing."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_synth.backends.contracts import Failed
from data_synth.backends.recognisers import JudgeRecogniser, KnownFace, Recogniser, make_recogniser
from data_synth.importing import (
    DAMAGED,
    NEAR_DUPLICATE,
    NO_FACE,
    RECOGNISER_CRASHED,
    SAME_FILE,
    SEVERAL_FACES,
    SMALL_FACE,
    STRANGER,
    TOO_FEW_PHOTOS,
    TOO_SMALL,
    UNREADABLE,
    ImportSettings,
    import_references,
    mined_drafts,
    strangers,
)
from data_synth.records import Reference, Rejection
from imagine.errors import ConfigError, ImagineError
from imagine.evaluation.report import to_pil
from imagine.people.photos import PhotoSource
from imagine.shards.reading import open_records
from imagine.world import render, sample_contexts, sample_people
from imagine.world.render import render_groups
from imagine.world.seeds import HELD_OUT


def as_file(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format=form, **({"quality": 92} if form == "JPEG" else {}))
    return file.getvalue()


@lru_cache(maxsize=1)
def photos() -> dict[int, list[Image.Image]]:
    """Return person -> six photos of the portrait world, in the photo style and without headwear."""
    people = range(4)
    how = sample_contexts(list(range(100, 124))).replace(style=0, headwear=0, light=0)
    drawn = render(sample_people([HELD_OUT[person] for person in people for _ in range(6)]), how, size=128)
    images = [to_pil(image) for image in drawn.images]
    return {person: images[6 * person : 6 * person + 6] for person in people}


@lru_cache(maxsize=1)
def recogniser() -> Recogniser:
    made = make_recogniser("judge")
    made.load()
    return made


def group_photo() -> Image.Image:
    """Return a picture with person 0 on the left and person 1 on the right."""
    how = sample_contexts([100, 101]).replace(style=0, headwear=0, light=0, yaw=0.0, pitch=0.0, roll=0.0)
    people = sample_people([HELD_OUT[0], HELD_OUT[1]])
    return to_pil(render_groups(people, how, people_per_picture=2, size=256, width=256).images[0])


def imported(folder: Path | str, **settings: object) -> tuple[list[Reference], list[Rejection]]:
    wanted = ImportSettings(source=str(folder), **settings)  # type: ignore[arg-type]
    found = list(import_references(wanted, recogniser()))
    references = [one for one in found if isinstance(one, Reference)]
    rejections = [one for one in found if isinstance(one, Rejection)]
    assert all(one.step == "import" and one.detail for one in rejections)
    return references, rejections


def reasons(rejections: list[Rejection]) -> dict[str, str]:
    return {one.key: one.reason for one in rejections}


# --- folders ----------------------------------------------------------------------------------------------------------
def test_broken_small_faceless_and_duplicate_photos_get_different_reasons(tmp_path: Path) -> None:
    first, second = photos()[0][:2]
    files = {
        "a.png": as_file(first),
        "b.jpg": as_file(second, "JPEG"),
        "c.png": as_file(first),  # the same file
        "d.jpg": as_file(first.resize((160, 160)), "JPEG"),  # the same picture
        "e.png": as_file(first)[:900],
        "f.png": b"",
        "g.jpg": b"<html>404</html>",
        "h.png": as_file(first.resize((48, 48))),
        "i.png": as_file(Image.new("RGB", (128, 128), (90, 140, 200))),
        "j.png": as_file(group_photo()),
        # without its last chunk: it opens, but shards do not accept it unchanged
        "k.png": as_file(photos()[1][0])[:-12],
        "notes.txt": b"not a picture",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    references, rejections = imported(tmp_path)
    assert [one.facts["file"] for one in references] == ["a.png", "b.jpg", "k.png"]
    with Image.open(io.BytesIO(references[2].image)) as mended:
        mended.verify()
    assert reasons(rejections) == {
        "c.png": SAME_FILE, "d.jpg": NEAR_DUPLICATE, "e.png": DAMAGED, "f.png": DAMAGED, "g.jpg": DAMAGED,
        "h.png": TOO_SMALL, "i.png": NO_FACE, "j.png": SEVERAL_FACES,
    }  # fmt: skip
    assert len(imported(tmp_path, duplicates=None)[0]) == 4  # the same file is still rejected


def test_a_reference_holds_the_imported_file_and_facts(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    content = as_file(photos()[1][0])
    (tmp_path / "deep" / "one.png").write_bytes(content)
    (tmp_path / "deep" / "one.txt").write_text("a person\n on a beach")
    (only,), _ = imported(tmp_path, licence="CC-BY-4.0")
    assert (only.image, only.caption, only.person) == (content, "a person on a beach", None)
    assert (only.facts["file"], only.facts["licence"]) == ("deep/one.png", "CC-BY-4.0")
    assert len(only.facts["box"]) == 4
    assert only.key.isalnum()
    (other,), _ = imported(tmp_path / "deep")
    assert other.key == only.key


def test_other_formats_become_png(tmp_path: Path) -> None:
    (tmp_path / "one.bmp").write_bytes(as_file(photos()[1][0], "BMP"))
    (only,), _ = imported(tmp_path)
    with Image.open(io.BytesIO(only.image)) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), np.asarray(photos()[1][0]))


def test_a_box_is_scaled_with_a_converted_picture(tmp_path: Path) -> None:
    photos()[1][0].resize((4096, 4096)).save(tmp_path / "large.bmp")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "large.bmp", "box": [400, 800, 2000, 2400]}')
    (only,) = import_references(ImportSettings(source=str(tmp_path)))
    assert isinstance(only, Reference)
    with Image.open(io.BytesIO(only.image)) as image:
        assert image.size == (2048, 2048) and only.facts["box"] == [200, 400, 1000, 1200]


def test_small_faces_and_groups_follow_the_settings(tmp_path: Path) -> None:
    far = Image.new("RGB", (256, 256), (120, 130, 140))
    far.paste(photos()[0][0].resize((40, 40)), (100, 100))
    (tmp_path / "far.png").write_bytes(as_file(far))
    (tmp_path / "two.png").write_bytes(as_file(group_photo()))
    assert reasons(imported(tmp_path)[1])["two.png"] == SEVERAL_FACES
    assert [one.facts["file"] for one in imported(tmp_path, faces="some", least_face=30)[0]] == ["two.png"]
    assert reasons(imported(tmp_path, least_face=200)[1])["two.png"] == SMALL_FACE
    assert len(imported(tmp_path, faces="unchecked")[0]) == 2


def test_without_a_recogniser_every_picture_that_opens_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "sky.png").write_bytes(as_file(Image.new("RGB", (128, 128), (90, 140, 200))))
    (tmp_path / "torn.png").write_bytes(b"torn")
    found = list(import_references(ImportSettings(source=str(tmp_path))))
    assert [type(one) for one in found] == [Reference, Rejection]
    assert isinstance(found[0], Reference)
    assert "box" not in found[0].facts


def test_nothing_at_the_address_is_one_sentence(tmp_path: Path) -> None:
    for address in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="check the address"):
            imported(address)


# --- records ----------------------------------------------------------------------------------------------------------
def test_a_folder_with_metadata_with_and_without_captions(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(as_file(photos()[0][0]))
    (tmp_path / "b.png").write_bytes(as_file(photos()[1][0]))
    rows = [
        '{"file_name": "a.png", "text": "somebody", "identity": 7, "groups": {"age": "young"}, "box": [1, 2, 30, 40]}',
        '{"file_name": "b.png"}',
        '{"file_name": "gone.png", "text": "missing"}',
        "{torn",
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    (one, two), rejections = imported(tmp_path)
    assert (one.caption, one.person, one.facts["groups"], one.facts["box"]) == (
        "somebody",
        "7",
        {"age": "young"},
        [1, 2, 30, 40],
    )
    assert (two.caption, two.person) == ("", None)
    assert Counter(one.reason for one in rejections) == {"a record without a picture": 1, "JSON that cannot be read": 1}
    assert len(open_records(tmp_path)) == 1  # training still requires captions


def test_shards_as_img2dataset_writes_them(tmp_path: Path) -> None:
    def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))

    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        add(tar, "000000000.jpg", as_file(photos()[0][0], "JPEG"))
        add(tar, "000000000.txt", b"a person")
        add(tar, "000000000.json", json.dumps({"url": "https://example.org/a", "license": "CC0"}).encode())
        add(tar, "000000001.jpg", b"torn")
        add(tar, "000000002.jpg", as_file(photos()[2][0], "JPEG"))
        add(tar, "000000003.txt", b"alone")
    for _ in range(2):  # the second pass reads the cache
        found = [replace(one) for one in imported_cached(tmp_path)]
        references = [one for one in found if isinstance(one, Reference)]
        assert [one.caption for one in references] == ["a person", ""]
        assert references[0].facts["url"] == "https://example.org/a"
        assert [one.facts.get("licence") for one in references] == ["CC0", "CC-BY-4.0"], "the second by the settings"
        assert reasons([one for one in found if isinstance(one, Rejection)]) == {
            "000000001": DAMAGED,
            "00000.tar: 000000003": "a record without a picture",
        }


def imported_cached(folder: Path) -> list[Reference | Rejection]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert len(open_records(folder)) == 1  # requires captions; the import must not use its cache
        settings = ImportSettings(source=str(folder), licence="CC-BY-4.0")
        return list(import_references(settings, recogniser()))


def test_folders_are_read_as_in_training(tmp_path: Path) -> None:
    """Both halves of the project share one reader of folders, texts and metadata."""
    folder = tmp_path / "10_sks woman"
    folder.mkdir()
    for number, (text, words) in enumerate(
        {"0.caption": b"one", "1.TXT": b"\xef\xbb\xbftwo", "2.png.txt": b"caf\xe9"}.items()
    ):
        (folder / f"{number}.png").write_bytes(as_file(photos()[number][0]))
        (folder / text).write_bytes(words)
    (folder / "3.png").write_bytes(as_file(photos()[3][0]))
    (folder / "3.json").write_text('{"identity": "z", "box": [300, 300, 40, 40]}')
    references, rejections = imported(tmp_path)
    assert [one.caption for one in references] == ["one", "two", "caf\u00e9", "sks woman"] and rejections == []
    assert [record.caption for record in open_records(tmp_path)] == [one.caption for one in references]
    assert references[3].person == "z" and max(references[3].facts["box"]) < 128, "a box outside is searched again"
    (tmp_path / "metadata.csv").write_text("file_name,text\n.\\10_sks woman\\0.png,listed\n10_sks woman/9.png,gone\n")
    references, rejections = imported(tmp_path)
    assert [one.caption for one in references] == ["listed"]
    assert [one.reason for one in rejections] == ["a record without a picture"]


# --- people -----------------------------------------------------------------------------------------------------------
def people_folder(tmp_path: Path) -> Path:
    for person in (0, 1, 2):
        folder = tmp_path / f"person-{person}"
        folder.mkdir()
        for number, image in enumerate(photos()[person]):
            (folder / f"{number}.png").write_bytes(as_file(image))
    return tmp_path


def test_a_stranger_among_a_persons_photos_is_rejected(tmp_path: Path) -> None:
    folder = people_folder(tmp_path)
    (folder / "person-0" / "stranger.png").write_bytes(as_file(photos()[3][0]))
    references, rejections = imported(folder, kind="people")
    found = {one.key for one in rejections if one.reason == STRANGER}
    assert "person-0/stranger.png" in found
    assert len(found) <= 2  # at most one of the 18 good photos is rejected
    counts = Counter(one.person for one in references)
    assert set(counts) == {"person-0", "person-1", "person-2"}
    assert sum(counts.values()) == 19 - len(rejections)


def test_the_person_is_found_in_a_group_photo(tmp_path: Path) -> None:
    folder = people_folder(tmp_path)
    (folder / "person-1" / "with-a-friend.png").write_bytes(as_file(group_photo()))
    (folder / "person-0" / "with-a-friend.png").write_bytes(as_file(group_photo().resize((250, 250))))
    references, _ = imported(folder, kind="people", faces="some", duplicates=None)
    boxes = {one.facts["file"]: one.facts["box"] for one in references}
    left, _, width, _ = boxes["person-0/with-a-friend.png"]
    assert left + width / 2 < 125
    left, _, width, _ = boxes["person-1/with-a-friend.png"]
    assert left + width / 2 > 128


def test_people_with_too_few_photos_are_rejected(tmp_path: Path) -> None:
    folder = people_folder(tmp_path)
    (folder / "lonely").mkdir()
    (folder / "lonely" / "0.png").write_bytes(as_file(photos()[3][0]))
    (folder / "outside.png").write_bytes(as_file(photos()[3][1]))
    references, rejections = imported(folder, kind="people")
    assert reasons(rejections)["lonely/0.png"] == TOO_FEW_PHOTOS
    assert reasons(rejections)["outside.png"] == TOO_FEW_PHOTOS
    assert "lonely" not in {one.person for one in references}


def test_a_folder_of_people_needs_a_recogniser(tmp_path: Path) -> None:
    settings = ImportSettings(source=str(people_folder(tmp_path)), kind="people")
    with pytest.raises(ConfigError, match="recogniser"):
        list(import_references(settings))


def test_strangers_are_also_found_among_people_named_in_records(tmp_path: Path) -> None:
    rows = []
    for number in range(5):  # photos of both people alternate
        for person in (0, 1):
            (tmp_path / f"{person}-{number}.png").write_bytes(as_file(photos()[person][number]))
            rows.append({"file_name": f"{person}-{number}.png", "identity": f"person {person}"})
    for name, who, image in (("wrong", "person 0", photos()[3][0]), ("alone", "person 2", photos()[2][0])):
        (tmp_path / f"{name}.png").write_bytes(as_file(image))
        rows.append({"file_name": f"{name}.png", "identity": who})
    (tmp_path / "nobody.png").write_bytes(as_file(photos()[3][1]))
    rows.insert(3, {"file_name": "nobody.png"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    references, rejections = imported(tmp_path)
    assert reasons(rejections) == {"wrong": STRANGER}
    order = [one.person for one in references]
    assert order == ["person 0"] * 5 + ["person 1"] * 5 + [None, "person 2"], (
        "one photo of a person in records is enough"
    )
    assert len(imported(tmp_path, faces="unchecked")[0]) == 13, "unchecked faces are all accepted"


class Fragile(JudgeRecogniser):
    """The judge, but it crashes on photos of one size."""

    def recognise(self, pictures: Sequence[PhotoSource]) -> list[tuple[KnownFace, ...] | Failed]:
        if any(isinstance(one, Image.Image) and one.size == (100, 100) for one in pictures):
            raise RuntimeError("an odd number of windows")
        return super().recognise(pictures)


def test_only_the_photo_that_crashes_the_recogniser_or_is_unreadable_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(as_file(photos()[0][0]))
    (tmp_path / "b.png").write_bytes(as_file(photos()[1][0].resize((100, 100))))
    (tmp_path / "c.png").write_bytes(as_file(photos()[2][0]))
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    fragile: Any = Fragile(Fragile.Settings())
    fragile.load()
    found = list(import_references(ImportSettings(source=str(tmp_path)), fragile))
    rejections = [one for one in found if isinstance(one, Rejection)]
    assert reasons(rejections) == {"b.png": RECOGNISER_CRASHED, "gone.jpg": UNREADABLE}
    assert "RuntimeError: an odd number of windows" in rejections[0].detail
    assert [one.facts["file"] for one in found if isinstance(one, Reference)] == ["a.png", "c.png"]
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_bytes(as_file(photos()[0 if name < "b" else 2][1].resize((100, 100))))
    with pytest.raises(ImagineError, match="Fragile failed at all of 3 photos"):
        list(import_references(ImportSettings(source=str(tmp_path)), fragile))


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("photos_of_one", "others"), [(3, 1), (5, 1), (5, 3), (12, 2), (60, 20)])
def test_strangers_are_found_while_they_are_the_minority(photos_of_one: int, others: int) -> None:
    random = np.random.default_rng(photos_of_one)
    centre = random.normal(size=64)
    own = unit(centre + 0.6 * random.normal(size=(photos_of_one, 64)))
    rest = unit(random.normal(size=(others, 64)))
    assert strangers(np.concatenate((own, rest))) == list(range(photos_of_one, photos_of_one + others))
    assert strangers(own) == []


def test_strangers_who_are_the_same_person_are_found() -> None:
    random = np.random.default_rng(0)
    one, two = (unit(random.normal(size=64) + 0.5 * random.normal(size=(n, 64))) for n in (6, 4))
    assert strangers(np.concatenate((two, one))) == [0, 1, 2, 3]


def test_without_similar_photos_all_are_strangers() -> None:
    random = np.random.default_rng(0)
    assert strangers(unit(random.normal(size=(6, 64)))) == list(range(6))
    assert strangers(unit(random.normal(size=(1, 64)))) == []


# --- mined pairs ------------------------------------------------------------------------------------------------------
def test_mined_pairs_are_different_photos_of_one_person() -> None:
    references = [Reference(f"k{n}", bytes([n]), person, f"caption {n}") for n, person in enumerate("aaaabb")]
    references += [Reference("alone", b"x", "c"), Reference("unknown", b"y")]
    drafts = mined_drafts(references, max_per_photo=2)
    by_key = {one.key: one for one in references}
    assert len(drafts) == 4 * 2 + 2 * 1
    for draft in drafts:
        target = by_key[draft.candidate.facts["photo"]]
        assert target.key != draft.reference.key
        assert target.person == draft.reference.person
        assert (draft.candidate.image, draft.spec.prompt) == (target.image, target.caption)
        assert (draft.spec.caption, draft.spec.reference) == (draft.reference.caption, draft.reference.key)
        assert draft.candidate.ask == draft.spec.key
    assert len({draft.candidate.key for draft in drafts}) == len(drafts)
    assert Counter(draft.candidate.facts["photo"] for draft in drafts) == {
        "k0": 2,
        "k1": 2,
        "k2": 2,
        "k3": 2,
        "k4": 1,
        "k5": 1,
    }
    assert mined_drafts(references[::-1], max_per_photo=2) == drafts
