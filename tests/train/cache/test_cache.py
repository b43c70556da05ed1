"""Cached pictures, latents and face crops: computed once, resumed after a kill, and the same at every access."""

import dataclasses
import functools
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from imagine.errors import ConfigError
from imagine.networks.models import build_autoencoder
from imagine.people.faces import crop_faces
from imagine.world import VERSION, render, sample_contexts, sample_people
from imagine.world.contexts import letters_text
from imagine.world.people import CONTINUOUS, DISCRETE
from imagine.world.render import compiled_painters
from imagine.world.seeds import JUDGE, TRAIN
from imagine.world.vocabulary import CLOTHES, FRAMINGS, LETTERED_CLOTHES
from train.cache.face_crops import FaceCrops, margin
from train.cache.latents import Latents, WorldCodec, with_camera_noise
from train.cache.pictures import BLOCK, SPLITS, Gallery, Pictures, open_pictures
from train.cache.rows import cache_rows
from train.data.portraits import data_settings, draw_rows, judge_pictures, training_pictures
from train.task import TaskContext

SMALL = Gallery("train", 5, 2, size=32)
CPU = torch.device("cpu")
MARGIN = margin(32)


def stored(pictures: Pictures, rows: int) -> Tensor:
    return pictures.take(torch.arange(rows))[0]


def test_the_people_and_contexts_of_a_gallery_follow_from_the_row_number() -> None:
    rows = torch.arange(len(SMALL))
    people = SMALL.people(rows)
    real = sample_people([TRAIN.start + i for i in range(5)])
    for name in (*CONTINUOUS, *DISCRETE):
        assert torch.equal(getattr(people, name)[::2], getattr(real, name)), name
    for name in DISCRETE:
        assert torch.equal(getattr(people, name)[1::2], getattr(real, name)), name
    wandered = torch.stack([(getattr(people, name)[1::2] - getattr(real, name)).abs() for name in CONTINUOUS])
    assert 0.01 < wandered.mean() < 0.1
    assert torch.equal(SMALL.people(torch.tensor([3])).skin, people.skin[[3]])
    assert torch.equal(SMALL.contexts(rows).scene, sample_contexts(range(10)).scene)


def test_a_gallery_of_words_has_one_in_every_picture_but_the_first_of_a_person() -> None:
    rows = torch.arange(60)
    worded, plain = (Gallery("train", 20, 3, words=words) for words in (True, False))
    contexts, before = worded.contexts(rows), plain.contexts(rows)
    others = rows % 3 != 0
    assert (contexts.letters[others, 0] > 0).all() and (worded.letters(rows)[others, 2] > 0).all()
    assert {CLOTHES[int(each)] for each in contexts.clothes[others]} == set(LETTERED_CLOTHES)
    assert "close-up" not in {FRAMINGS[int(each)] for each in contexts.framing[others]}
    assert len({letters_text(each) for each in contexts.letters[others]}) > 30
    for name in ("letters", "clothes", "framing"):
        assert torch.equal(getattr(contexts, name)[~others], getattr(before, name)[~others]), name
    assert torch.equal(contexts.expression, before.expression) and torch.equal(contexts.scene, before.scene)
    assert torch.equal(worded.contexts(rows[[7]]).letters, contexts.letters[[7]])  # in any batch


def test_what_is_rendered_already_keeps_its_name() -> None:
    assert VERSION == "portrait-world-2"  # another version gives other pictures, and new names
    assert Gallery("train", 70_000, 2).mark == Gallery("train", 5, 2).mark == "73833a80"
    assert Gallery("judge", 40_000, 3, drift=0.0).mark == "e941e5f0"
    assert len({Gallery(split, 5, 2, words=w).mark for split in SPLITS for w in (True, False)}) == 2 * len(SPLITS)


def test_the_people_of_the_judge_are_separate_and_do_not_drift() -> None:
    gallery = Gallery("judge", 3, 4, drift=0.0)
    people = gallery.people(torch.arange(12))
    own = sample_people([JUDGE.start + i for i in range(3)]).repeat(4)
    assert torch.equal(people.skin, own.skin) and torch.equal(people.jaw, own.jaw)


def test_pictures_are_the_renders_of_their_rows(tmp_path: Path) -> None:
    pictures = open_pictures(SMALL, tmp_path)
    rows = torch.tensor([7, 0])
    out = render(SMALL.people(rows), SMALL.contexts(rows), size=32)
    images, boxes = pictures.take(rows)
    assert torch.allclose(images, out.images, atol=0.51 / 255)
    assert torch.allclose(boxes, out.boxes, atol=1e-4)
    assert json.loads((tmp_path / f"images-{SMALL.mark}.json").read_text()) == {"rows": 10}


def test_blocks_that_a_killed_run_finished_are_kept(tmp_path: Path) -> None:
    gallery = Gallery("train", BLOCK // 2 + 4, 2, size=16)  # two blocks, the second one short
    whole = open_pictures(gallery, tmp_path / "whole")
    folder = tmp_path / "killed"
    open_pictures(gallery, folder)
    # The state after a kill in the second block: files of full size, only the first block counted as done.
    state = folder / f"images-{gallery.mark}.json"
    assert json.loads(state.read_text()) == {"rows": BLOCK + 8}
    state.write_text(json.dumps({"rows": BLOCK}))
    images = np.memmap(state.with_suffix(".u8"), np.uint8, "r+", shape=(len(gallery), 3, 16, 16))
    images[3] = 77  # shows that the first block is not rendered again
    images[BLOCK:] = 0
    images.flush()
    again = open_pictures(gallery, folder)
    assert (again.images[3] == 77).all()
    assert np.array_equal(again.images[BLOCK:], whole.images[BLOCK:])
    assert json.loads(state.read_text()) == {"rows": BLOCK + 8}


def test_two_galleries_in_one_folder_have_separate_files(tmp_path: Path) -> None:
    opened = open_pictures(SMALL, tmp_path)
    before = stored(opened, 10)
    after = stored(open_pictures(Gallery("train", 5, 2, size=32, drift=0.3), tmp_path), 10)
    assert torch.equal(before[::2], after[::2])  # the real ones
    assert not torch.equal(before[1::2], after[1::2])
    more = open_pictures(Gallery("train", 6, 2, size=32), tmp_path)
    assert len(more.images) == 12 and torch.equal(stored(more, 10), before)
    assert torch.equal(stored(opened, 10), before)  # the files that are already mapped do not change


def test_pictures_of_an_earlier_version_are_migrated(tmp_path: Path) -> None:
    wanted = stored(open_pictures(SMALL, tmp_path), 10)
    for name in ("images.u8", "boxes.f32"):
        path = tmp_path / name
        path.with_name(f"{path.stem}-{SMALL.mark}{path.suffix}").rename(path)
    (tmp_path / f"images-{SMALL.mark}.json").unlink()
    (tmp_path / "done.json").write_text(json.dumps({"gallery": dataclasses.asdict(SMALL), "blocks": [0]}))
    images = np.memmap(tmp_path / "images.u8", np.uint8, "r+", shape=(10, 3, 32, 32))
    images[3] = 77  # shows that this row is not rendered again
    images.flush()
    taken = open_pictures(dataclasses.replace(SMALL, identities=6), tmp_path)
    assert (taken.images[3] == 77).all() and torch.equal(stored(taken, 10)[4:], wanted[4:])
    assert taken.images[10:].any() and not (tmp_path / "images.u8").exists() and not (tmp_path / "done.json").exists()


def test_few_missing_pictures_are_painted_without_compiling(tmp_path: Path) -> None:
    compiled_painters.cache_clear()
    open_pictures(SMALL, tmp_path)
    assert compiled_painters.cache_info().currsize == 0


def test_data_settings_choose_the_galleries(tmp_path: Path) -> None:
    data = {"folder": str(tmp_path), "identities": 2, "judge_identities": 1, "judge_pictures": 3, "drift": 0.1}
    mine, judges = training_pictures(data), judge_pictures(data)
    assert mine.gallery == Gallery("train", 2, 2, drift=0.1)
    assert judges.gallery == Gallery("judge", 1, 3, drift=0.0)
    assert all(list((tmp_path / split).glob("images-*.u8")) for split in ("train", "judge"))
    with pytest.raises(ConfigError, match=r"no key 'identitys' \(did you mean identities\?\)"):
        training_pictures({"folder": str(tmp_path), "identitys": 2})


def test_the_data_settings_can_add_galleries() -> None:
    fine = {"first": 100, "identities": 4, "drift": 0.02, "camera": False}
    settings = data_settings({"identities": 3, "galleries": {"fine": fine}})
    assert settings.gallery("fine") == Gallery("train", 4, 2, drift=0.02, first=100, camera=False)
    assert settings.gallery("train") == Gallery("train", 3, 2)
    assert data_settings({"identities": 3, "first": 50}).gallery("train") == Gallery("train", 3, 2, first=50)
    with pytest.raises(ConfigError, match=r"no gallery 'fin' \(did you mean fine\?\); valid: train, fine"):
        settings.gallery("fin")


def test_real_pictures_get_camera_noise(tmp_path: Path) -> None:
    pictures = open_pictures(SMALL, tmp_path)
    rows = torch.arange(6)
    clean, boxes = pictures.take(rows)
    noisy, same_boxes = with_camera_noise(pictures, rows)
    assert torch.equal(boxes, same_boxes)
    assert torch.equal(noisy[1::2], clean[1::2])
    assert (noisy[::2] - clean[::2]).abs().flatten(1).mean(1).min() > 0.005
    assert torch.equal(with_camera_noise(pictures, torch.tensor([4]))[0][0], noisy[4])


@functools.cache
def gallery_128() -> Gallery:
    return Gallery("train", 4, 2)


def test_cached_squares_contain_the_face_crops(tmp_path: Path) -> None:
    pictures = open_pictures(gallery_128(), tmp_path)
    face_crops = FaceCrops(pictures, 32, tmp_path, noisy=False)
    rows = torch.arange(8)
    side = 32 + 2 * MARGIN
    assert face_crops.values.shape == (8, 3, side, side)
    middle = torch.from_numpy(face_crops.values[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]).float() / 255
    wanted = crop_faces(*pictures.take(rows), 32)
    inside = (wanted - 0.5).abs().amax(1, keepdim=True) > 0.02
    # The middle of the square is the crop without its mask.
    centre = (slice(None), slice(None), slice(8, 24), slice(8, 24))
    assert (middle - wanted)[centre].abs().mean() < 0.01
    assert inside[centre].float().mean() > 0.5


def test_face_crops_are_shifted_within_the_margin_and_masked(tmp_path: Path) -> None:
    face_crops = FaceCrops(open_pictures(gallery_128(), tmp_path), 32, tmp_path, noisy=True)
    rows = torch.tensor([5] * 40)
    shift = torch.rand(40, 2, generator=torch.Generator().manual_seed(1))
    crops = face_crops.take(rows, shift)
    assert torch.equal(crops, face_crops.take(rows, shift))
    assert torch.equal(crops[3:4], face_crops.take(rows[3:4], shift[3:4]))
    assert len({crop.numpy().tobytes() for crop in crops}) > 20
    assert (crops[:, :, 0, 0] - 0.5).abs().max() < 1e-6 and (crops[:, :, -1, -1] - 0.5).abs().max() < 1e-6
    raw = torch.from_numpy(face_crops.values[5]).float() / 255
    places = [(y, x) for y in range(2 * MARGIN + 1) for x in range(2 * MARGIN + 1)]
    windows = torch.stack([raw[:, y + 8 : y + 24, x + 8 : x + 24] for y, x in places])
    nearest = torch.cdist(crops[:, :, 8:24, 8:24].flatten(1), windows.flatten(1)).min(1).values
    assert nearest.max() < 0.05 * 16 * 3**0.5


def test_cutting_face_crops_resumes_after_a_kill(tmp_path: Path) -> None:
    pictures = open_pictures(gallery_128(), tmp_path)
    whole = np.array(FaceCrops(pictures, 32, tmp_path, noisy=True).values)
    state = tmp_path / f"squares-{32 + 2 * MARGIN}-{gallery_128().mark}.json"
    values = np.memmap(state.with_suffix(".u8"), np.uint8, "r+", shape=whole.shape)
    assert json.loads(state.read_text())["rows"] == 8
    forget(state, 6)
    values[5], values[6:] = 9, 0
    values.flush()
    again = FaceCrops(pictures, 32, tmp_path, noisy=True).values
    assert (again[5] == 9).all()  # counted as done, so not cut again
    assert np.array_equal(again[6:], whole[6:])


def forget(state: Path, rows: int) -> None:
    """Set the state to that after a kill: only the first `rows` are done."""
    state.write_text(json.dumps({"rows": rows}))


class Doubles:
    """Makes rows of three values, each twice the row number, and records the requested rows."""

    def __init__(self) -> None:
        self.requested: list[int] = []

    def __call__(self, rows: Tensor) -> Tensor:
        self.requested.extend(rows.tolist())
        return (rows * 2).to(torch.uint8)[:, None].expand(-1, 3)

    def cache_rows(self, path: Path, gallery: Gallery) -> list[list[int]]:
        rows: list[list[int]] = cache_rows(path, gallery, (3,), np.uint8, self, "").tolist()
        assert rows == [[2 * row] * 3 for row in range(len(gallery))]
        return rows


@pytest.mark.parametrize("locks", [True, False])  # False: as on Windows
def test_cached_rows_stay_valid_when_a_gallery_grows_or_shrinks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    if not locks:
        monkeypatch.setattr("train.cache.rows.fcntl", None)
    make, path = Doubles(), tmp_path / "rows.u8"
    for identities in (3, 5, 2, 6, 1, 6):
        make.cache_rows(path, Gallery("train", identities, 2))
    assert make.requested == list(range(12))
    first = cache_rows(path, Gallery("train", 6, 2), (3,), np.uint8, make, "")
    make.cache_rows(path, Gallery("train", 2, 2, drift=0.5))  # another gallery of the same name
    assert make.requested[12:] == [0, 1, 2, 3] and first[11, 0] == 22


def test_the_missing_rows_of_a_truncated_file_are_computed_again(tmp_path: Path) -> None:
    make, path, gallery = Doubles(), tmp_path / "rows.u8", Gallery("train", 3, 2)
    make.cache_rows(path, gallery)
    os.truncate(tmp_path / f"rows-{gallery.mark}.u8", 3 * 4)
    make.cache_rows(path, gallery)
    assert make.requested == [0, 1, 2, 3, 4, 5, 4, 5]


def test_rows_of_an_earlier_version_are_migrated(tmp_path: Path) -> None:
    make, path, gallery = Doubles(), tmp_path / "rows.u8", Gallery("train", 3, 2)
    path.write_bytes(bytes([0, 0, 0, 2, 2, 2]))
    path.with_suffix(".json").write_text(json.dumps({"gallery": gallery.mark, "rows": 2}))
    make.cache_rows(path, Gallery("train", 3, 2, drift=0.5))
    make.cache_rows(path, gallery)
    assert make.requested == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5] and not path.exists()


def test_of_two_runs_one_fills_a_file_and_the_other_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two, path, gallery = Doubles(), Doubles(), tmp_path / "rows.u8", Gallery("train", 3, 2)
    begun, go_on = threading.Event(), threading.Event()

    def slowly(rows: Tensor) -> Tensor:
        begun.set()
        assert go_on.wait(20)
        return one(rows)

    caplog.set_level("INFO", "train")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache_rows, path, gallery, (3,), np.uint8, slowly, "filling")
        assert begun.wait(20)
        second = pool.submit(two.cache_rows, path, gallery)
        deadline = time.monotonic() + 20
        while "waiting for another run that does this" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        go_on.set()
        assert second.result() == first.result().tolist() and two.requested == []


def test_the_mark_of_a_gallery_identifies_everything_that_its_rows_depend_on() -> None:
    one = Gallery("train", 3, 2)
    assert one.mark == Gallery("train", 300, 2).mark
    others = [Gallery("judge", 3, 2), Gallery("train", 3, 3), Gallery("train", 3, 2, drift=0.1),
              Gallery("train", 3, 2, first=4), Gallery("train", 3, 2, camera=False)]  # fmt: skip
    assert len({one.mark, *(other.mark for other in others)}) == 6


def test_pairs_are_real_pictures_with_themselves_or_with_the_others_of_the_person() -> None:
    gallery = Gallery("train", 2, 3)
    assert gallery.pairs("self").tolist() == [[0, 0], [3, 3]]
    assert gallery.pairs("other").tolist() == [[0, 1], [0, 2], [3, 4], [3, 5]]
    assert Gallery("train", 4, 1).pairs("other").shape == (0, 2)
    later = Gallery("train", 2, 2, first=3)
    assert torch.equal(later.people(torch.tensor([0])).skin, Gallery("train", 9, 2).people(torch.tensor([6])).skin)


def test_a_gallery_without_a_camera_has_no_camera_noise(tmp_path: Path) -> None:
    pictures = open_pictures(Gallery("train", 2, 2, size=32, camera=False), tmp_path)
    rows = torch.arange(4)
    assert torch.equal(with_camera_noise(pictures, rows)[0], pictures.take(rows)[0])


def exported_autoencoder(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    build_autoencoder(4, (8, 8, 16), (1, 1, 1), (1, 1, 1)).save_pretrained(folder / "vae")
    statistics = {"mean": [0.5, -1.0, 0.0, 2.0], "std": [2.0, 1.0, 0.5, 4.0]}
    (folder / "latents.json").write_text(json.dumps(statistics))
    return folder


def test_a_codec_packs_latents_and_unpacks_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = build_autoencoder(2, (8, 8), (1, 1), (1, 1))
    vae.save_pretrained(tmp_path / "vae")
    statistics = {"mean": [0.5] * 8, "std": [2.0] * 8, "patch": 2}
    (tmp_path / "latents.json").write_text(json.dumps(statistics))
    codec = WorldCodec(tmp_path, CPU)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = codec.encode(images)
    assert latents.shape[1:] == codec.shape(32) == (8, 4, 4)
    with torch.no_grad():
        drawn = codec.vae.decode(codec.vae.encode(images).latent).sample
    assert torch.allclose(codec.decode(latents), (drawn / 2 + 0.5).clamp(0, 1), atol=1e-5)
    with pytest.raises(ConfigError, match="expects latents of 32 channels, but its autoencoder gives 8"):
        codec.check_channels(32, "base")
    with pytest.raises(ConfigError, match="choose a multiple of 8"):
        codec.shape(20)


def test_latents_are_encoded_once_and_encoding_resumes_after_a_kill(tmp_path: Path) -> None:
    pictures = open_pictures(SMALL, tmp_path / "data")
    codec = WorldCodec(exported_autoencoder(tmp_path / "vae"), CPU)
    first = Latents(pictures, codec, tmp_path / "latents")
    rows = torch.arange(10)
    whole = first.take(rows)
    with torch.no_grad():
        raw = codec.vae.encode(with_camera_noise(pictures, rows)[0] * 2 - 1).latent
    wanted = (raw - codec.mean.view(1, -1, 1, 1)) / codec.std.view(1, -1, 1, 1)
    assert whole.shape == (10, 4, 4, 4)
    assert torch.allclose(whole, wanted, atol=5e-3, rtol=1e-3)
    (state,) = (tmp_path / "latents").glob("*.json")
    values = np.memmap(state.with_suffix(".f16"), np.float16, "r+", shape=(10, 4, 4, 4))
    forget(state, 7)
    values[6], values[7:] = 3.0, 0.0
    values.flush()
    again = Latents(pictures, codec, tmp_path / "latents").take(rows)
    assert (again[6] == 3).all()
    assert torch.allclose(again[7:], whole[7:], atol=5e-3)


def test_each_autoencoder_has_its_own_latents(tmp_path: Path) -> None:
    pictures = open_pictures(SMALL, tmp_path / "data")
    taken = []
    for seed in (0, 1):
        vae = exported_autoencoder(tmp_path / f"vae-{seed}", seed)
        taken.append(Latents(pictures, WorldCodec(vae, CPU), tmp_path / "latents").take(torch.arange(10)))
    assert not torch.allclose(taken[0], taken[1], atol=1e-2)
    assert len(list((tmp_path / "latents").glob("*.f16"))) == 2


def test_latents_at_a_low_resolution_are_of_the_same_pictures_scaled_down(tmp_path: Path) -> None:
    pictures = open_pictures(SMALL, tmp_path / "data")
    codec = WorldCodec(exported_autoencoder(tmp_path / "vae"), CPU)
    small = Latents(pictures, codec, tmp_path / "latents", 16)
    assert small.values.shape == (10, 4, 2, 2)
    full = Latents(pictures, codec, tmp_path / "latents")
    assert full.values.shape == (10, 4, 4, 4)
    with torch.no_grad():
        shrunk = torch.nn.functional.avg_pool2d(with_camera_noise(pictures, torch.tensor([3]))[0], 2)
        wanted = codec.vae.encode(shrunk * 2 - 1).latent[0]
    got = small.take(torch.tensor([3]))[0] * codec.std.view(-1, 1, 1) + codec.mean.view(-1, 1, 1)
    assert torch.allclose(got, wanted, atol=2e-2)


def test_decoding_undoes_the_normalisation(tmp_path: Path) -> None:
    pictures = open_pictures(SMALL, tmp_path / "data")
    codec = WorldCodec(exported_autoencoder(tmp_path / "vae"), CPU)
    latents = Latents(pictures, codec, tmp_path / "latents")
    images = pictures.take(torch.tensor([1, 3]))[0]
    with torch.no_grad():
        straight = codec.vae.decode(codec.vae.encode(images * 2 - 1).latent).sample / 2 + 0.5
    drawn = codec.decode(latents.take(torch.tensor([1, 3])))
    assert drawn.shape == (2, 3, 32, 32)
    assert torch.allclose(drawn, straight.clamp(0, 1), atol=2e-2)


def test_rows_are_a_function_of_seed_purpose_and_images_seen(tmp_path: Path) -> None:
    def rows(seed: int = 0, purpose: str = "rows", images_seen: int = 64) -> list[int]:
        context = TaskContext("stage", seed, torch.device("cpu"), tmp_path)
        torch.rand(1)  # the global generator must not matter
        return draw_rows(context, purpose, images_seen, 500, 40).tolist()

    assert rows() == rows()
    assert set(rows()) == set(range(40))
    assert rows() != rows(seed=1)
    assert rows() != rows(purpose="people")
    assert rows() != rows(images_seen=128)
    assert sorted(rows(images_seen=0)[:40]) == sorted(rows(images_seen=40)[:40]) == list(range(40))  # once per epoch
