"""The share of images that carry a word: exact, scheduled, and a function of the image number alone."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from train.cache.pictures import Gallery
from train.data.order import shuffled
from train.data.sources import Mixture, Source
from train.data.words import Words

GALLERY = Gallery("train", 200, 2)
LETTERED = torch.arange(400) % 7 < 2
SOURCES = {
    "real": Source(target="self", captions={"terse": 1.0}),
    "synthetic": Source(target="other"),
    "others": Source(gallery="records", target="self"),
}


class Records(Gallery):
    """A gallery of which it is not known which pictures carry a word."""

    def pairs(self, target: Literal["self", "other"]) -> Tensor:
        return super().pairs(target)


def mixture(words: Words | None, weights: dict[str, float] | None = None, lettered: Tensor = LETTERED) -> Mixture:
    galleries = {"train": GALLERY, "records": Records("train", 50, 1)}
    known = {} if words is None else {"train": lettered}
    return Mixture(weights or {"real": 0.3, "synthetic": 0.7}, SOURCES, galleries, words=words, lettered=known)


def share(drawn: Mixture, first: int, size: int) -> float:
    return float(LETTERED[drawn.draw(1, first, size).targets].float().mean())


def test_the_share_is_exact_and_follows_its_schedule() -> None:
    drawn = mixture(Words(start=0.4, end=0.2, steady=1000, over=2000))
    for first, wanted in ((0, 0.4), (500, 0.4), (2800, 0.21), (3000, 0.2), (9000, 0.2)):
        assert share(drawn, first, 400) == pytest.approx(wanted, abs=0.02), first
    assert share(drawn, 1900, 200) == pytest.approx(0.3, abs=0.02)
    step = Words(start=0.5, end=0.0, steady=10)
    assert 4 <= step.carry(0, 10).sum() <= 6 and not step.carry(10, 500).any()
    assert Words(start=1.0, end=1.0).carry(0, 100).all()
    natural = share(mixture(None), 0, 400)
    assert natural == pytest.approx(2 / 7, abs=0.05)


def test_every_source_has_the_share() -> None:
    drawn = mixture(Words(start=0.4, end=0.4))
    which = drawn.which(0, 2000)
    with_word = LETTERED[drawn.draw(1, 0, 2000).targets].float()
    for source in (0, 1):
        assert with_word[which == source].mean() == pytest.approx(0.4, abs=0.02)


def test_a_resumed_run_draws_what_an_uninterrupted_one_draws() -> None:
    schedule = Words(start=0.5, end=0.1, over=9000)
    whole = mixture(schedule).draw(1, 8000, 1200)  # across the interval of cached counts
    resumed = mixture(schedule)
    assert torch.equal(resumed.draw(1, 8700, 500).targets, whole.targets[700:])
    assert torch.equal(resumed.draw(1, 8000, 700).targets, whole.targets[:700])


def test_each_picture_with_a_word_comes_once_per_epoch() -> None:
    drawn = mixture(Words(start=0.5, end=0.5), {"synthetic": 1.0})
    targets = drawn.draw(1, 0, 400).targets
    rows = targets[LETTERED[targets]]
    there = int(LETTERED[1::2].sum())
    assert len(rows) > 2 * there
    for epoch in range(2):
        assert len(rows[epoch * there : (epoch + 1) * there].unique()) == there


def test_without_words_the_order_is_that_of_earlier_versions() -> None:
    drawn, pairs = mixture(None), GALLERY.pairs("other")
    got, which = drawn.draw(5, 0, 300), drawn.which(0, 300)
    here = which == 1
    wanted = pairs[shuffled(5, "pairs of synthetic", 0, int(here.sum()), len(pairs))]
    assert torch.equal(torch.stack((got.references, got.targets), 1)[here], wanted)


def test_a_source_of_records_is_drawn_as_it_is() -> None:
    drawn = mixture(Words(start=0.5, end=0.5), {"synthetic": 0.5, "others": 0.5})
    got = drawn.draw(1, 0, 100)
    others = torch.tensor([name == "records" for name in got.galleries])
    assert 48 <= others.sum() <= 50 and len(got.targets[others].unique()) == others.sum()
    assert LETTERED[got.targets[~others]].float().mean() == pytest.approx(0.5, abs=0.05)
    assert drawn.word_facts() == [f"synthetic: {int(LETTERED[1::2].sum())} of 200 pairs carry a word"]


@pytest.mark.parametrize(("lettered", "count"), [(torch.zeros(400).bool(), 0), (torch.ones(400).bool(), 200)])
def test_a_source_with_one_kind_of_picture_only_is_drawn_as_it_is_and_says_so(lettered: Tensor, count: int) -> None:
    drawn = mixture(Words(start=0.5, end=0.5), {"synthetic": 1.0}, lettered)
    assert drawn.word_facts() == [f"synthetic: {count} of 200 pairs carry a word, so words has no effect on it"]
    assert torch.equal(drawn.draw(1, 0, 300).targets, mixture(None, {"synthetic": 1.0}).draw(1, 0, 300).targets)


def test_shares_are_between_0_and_1() -> None:
    with pytest.raises(ValueError, match="less than or equal to 1"):
        Words(start=1.2, end=0)
