"""Sources of a stage's pairs: drawn by weight, every pair once per epoch, each image determined by its number."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from imagine.errors import ConfigError
from train.cache.pictures import Gallery
from train.data.order import shuffled
from train.data.portraits import check_sources
from train.data.sources import SOURCES, Mixture, Source, in_order

GALLERIES = {"train": Gallery("train", 10, 2), "fine": Gallery("train", 4, 3, first=50)}
MIXED = {**SOURCES, "fine": Source(gallery="fine", captions={"dense": 1.0})}


def mixture(block: int = 1, **weights: float) -> Mixture:
    return Mixture(weights, MIXED, GALLERIES, block)


def test_sources_are_drawn_by_weight_in_a_regular_order() -> None:
    which = mixture(real=1, synthetic=1, fine=2).which(0, 4_000)
    shares = [float((which == number).float().mean()) for number in range(3)]
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.005)
    even = mixture(real=1, synthetic=1).which(0, 1_000)
    assert (even[:-2] != even[2:]).any() and not (even[:-3].eq(even[1:-2]) & even[:-3].eq(even[2:-1])).any()
    assert mixture(real=0, synthetic=3).names == ["synthetic"]


def test_whole_batches_may_alternate() -> None:
    which = mixture(block=8, real=1, synthetic=1).which(0, 160).view(20, 8)
    assert (which == which[:, :1]).all()
    assert set(which[:, 0].tolist()) == {0, 1}
    batch = mixture(block=8, real=1, synthetic=1).draw(0, 8, 8)
    own = batch.references == batch.targets
    assert own.all() or not own.any()


def test_every_pair_comes_once_per_epoch() -> None:
    drawn = mixture(fine=1).draw(3, 0, 16)
    pairs = list(zip(drawn.references.tolist(), drawn.targets.tolist(), strict=True))
    wanted = sorted(map(tuple, GALLERIES["fine"].pairs("other").tolist()))
    assert sorted(pairs[:8]) == sorted(pairs[8:]) == wanted and pairs[:8] != pairs[8:]
    assert set(drawn.galleries) == {"fine"} and set(drawn.caption_styles) == {"dense"}


def test_every_pair_of_a_mixture_comes_once_per_epoch_of_its_source() -> None:
    mixed = mixture(real=1, synthetic=2, fine=1)
    drawn, which = mixed.draw(3, 0, 400), mixed.which(0, 400)
    for number, source in enumerate(mixed.sources):
        here = which == number
        pairs = list(zip(drawn.references[here].tolist(), drawn.targets[here].tolist(), strict=True))
        wanted = sorted(map(tuple, GALLERIES[source.gallery].pairs(source.target).tolist()))
        rounds = [sorted(pairs[i : i + len(wanted)]) for i in range(0, len(pairs) - len(wanted) + 1, len(wanted))]
        assert len(rounds) > 5 and all(found == wanted for found in rounds)
    far = mixture(real=1, synthetic=2, fine=1).draw(3, 20_000, 8)  # as in a resumed run
    assert far.targets.tolist() == mixed.draw(3, 19_990, 20).targets[10:18].tolist()
    assert mixed.draw(3, 8, 8).targets.tolist() == drawn.targets[8:16].tolist()


def test_a_stage_of_an_earlier_version_keeps_its_order_of_pairs() -> None:
    old = Mixture({"real": 1, "synthetic": 2}, MIXED, GALLERIES, own_counts=False)
    drawn, which = old.draw(3, 16, 40), old.which(16, 40)
    for number, (name, pairs) in enumerate(zip(old.names, old.pairs, strict=True)):
        turns = shuffled(3, f"pairs of {name}", 16, 40, len(pairs))[which == number]
        assert torch.equal(drawn.targets[which == number], pairs[turns, 1])


def test_every_image_is_a_function_of_its_number() -> None:
    mixed = mixture(real=1, synthetic=2, fine=1)
    whole, pieces = mixed.draw(1, 40, 24), [mixed.draw(1, 40, 10), mixed.draw(1, 50, 14)]
    assert whole.targets.tolist() == [row for piece in pieces for row in piece.targets.tolist()]
    assert whole.references.tolist() == [row for piece in pieces for row in piece.references.tolist()]
    assert whole.caption_styles == [caption_style for piece in pieces for caption_style in piece.caption_styles]
    assert whole.galleries == [name for piece in pieces for name in piece.galleries]
    assert mixed.draw(2, 40, 24).targets.tolist() != whole.targets.tolist()


def test_real_pictures_are_their_own_targets_with_terse_captions() -> None:
    real = mixture(real=1).draw(0, 0, 20)
    assert torch.equal(real.references, real.targets) and set(real.caption_styles) == {"terse"}
    pairs = mixture(synthetic=1).draw(0, 0, 200)
    assert torch.equal(pairs.references + 1, pairs.targets)
    assert pairs.caption_styles.count("dense") / 200 == pytest.approx(0.2, abs=0.08)


def test_rows_from_several_galleries_return_to_their_positions() -> None:
    drawn = mixture(real=1, fine=1).draw(0, 0, 12)
    places = drawn.by_gallery()
    assert set(places) == {"train", "fine"}
    assert torch.equal(in_order(list(places.values()), [drawn.targets[i] for i in places.values()]), drawn.targets)


def test_sources_are_checked_without_reading_pictures(tmp_path: Path) -> None:
    photos = {"records": str(tmp_path / "photos" / "{00000..00002}.tar")}
    sources = {"real": {"target": "self"}, "pairs": {"gallery": "fine"}, "photos": {"gallery": "photos"}}
    data = {"folder": str(tmp_path / "data"), "galleries": {"fine": {"pictures": 1}, "photos": photos}}
    data["sources"] = {**sources, "lost": {"gallery": "lots"}}
    check_sources(data, {"real": 1, "pairs": 0})
    for weights, words in (
        ({"reel": 1}, "no source 'reel'"),
        ({"lost": 1}, "no gallery 'lots'.*; valid: train, fine, photos"),
        ({"pairs": 1}, "no two pictures of one person"),
        ({"photos": 1}, "there are no records at"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_sources(data, weights)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "00001.tar").touch()
    check_sources(data, {"photos": 1})
    with pytest.raises(ConfigError, match="cannot be opened"):
        check_sources({**data, "galleries": {"photos": {"records": "nosuch://a"}}}, {"photos": 1})
    assert not (tmp_path / "data").exists()


def test_wrong_sources_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"no source 'reel' \(did you mean real\?\)"):
        mixture(reel=1)
    with pytest.raises(ConfigError, match="real has the weight -1"):
        mixture(real=-1)
    with pytest.raises(ConfigError, match="positive weight"):
        mixture(real=0)
    with pytest.raises(ConfigError, match="no gallery 'fine'"):
        Mixture({"fine": 1}, MIXED, {"train": GALLERIES["train"]})
    with pytest.raises(ConfigError, match="no two pictures of one person"):
        Mixture({"synthetic": 1}, MIXED, {"train": Gallery("train", 5, 1)})
    with pytest.raises(ValidationError, match="one must be positive"):
        Source(captions={"dense": 0.0})
