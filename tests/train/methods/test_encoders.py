"""Every method that only encodes a person, on tiny bases of all three kinds."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from imagine.errors import ConfigError
from imagine.networks.recogniser import Recogniser
from imagine.people.faces import KnownBoxesFinder
from imagine.records import Tokens
from tests import tiny, tiny_stock
from tests.train.methods.tiny_bases import BASES, fill
from train.config import Run
from train.data.order import normals
from train.methods.bases.text import TextState
from train.methods.encoders.context_tokens import appended, overwritten
from train.methods.registry import ENCODERS
from train.methods.runs import load_method_run, open_learnt, train_method
from train.methods.system import EncoderSystem

SMALL = ("images=4", "batch_size=2", "warmup_images=0", "ema=0", "precision=fp32", "report_every_seconds=0",
         "settings.validation_images=2", "settings.drawings=1", "settings.drawing_steps=1")  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = fill(tmp_path_factory.mktemp("encoders"))
    tiny_stock.encoder().save_pretrained(place / "vision")
    return place


def run_of(method: str, base: str, home: Path, *more: str) -> Run:
    lines = [f"data.folder={home / 'data' / base}", "data.identities=4", *SMALL, *more]
    if base != "world":
        lines.append(f"settings.vision={home / 'vision'}")
    return load_method_run(method, None, lines, {"base": str(home / base)})


@pytest.fixture(scope="module")
def learnt(home: Path) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def train_once(method: str, base: str) -> Path:
        if (method, base) not in made:
            output = home / "runs" / f"{method}-{base}"
            assert train_method(run_of(method, base, home), output) is not None
            made[method, base] = output
        return made[method, base]

    return train_once


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ENCODERS)
def test_an_encoder_trains_draws_and_tells_people_apart(
    method: str, base: str, home: Path, learnt: Callable[[str, str], Path]
) -> None:
    output = learnt(method, base)
    rows = [json.loads(line) for line in (output / method / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    task = open_learnt(output)
    noise = normals(0, "test", 0, 1, task.base.latent_shape)
    side = int(task.vision.config.image_size)
    crops = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        people = [task.merge(task.represent(crop[None])) for crop in crops]
    drawn = [task.draw(["a person"], person, noise, 2, 2.0) for person in people]
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], open_learnt(output).draw(["a person"], people[0], noise, 2, 2.0))
    found = json.loads((output / "result.json").read_text())
    assert found["bytes_per_person"] == 4 * task.represent(crops[:1]).numel()


def test_a_dropped_reference_leaves_the_sentence_as_it_is(home: Path, learnt: Callable[[str, str], Path]) -> None:
    for method in ENCODERS:
        task = open_learnt(learnt(method, "world"))
        task.base.unet.eval()
        people = torch.randn_like(task.represent(torch.rand(2, 3, *[int(task.vision.config.image_size)] * 2)))
        strength = torch.tensor([1.0, 0.0])
        noise = normals(0, "test", 0, 2, task.base.latent_shape)
        steps = torch.tensor([500.0, 500.0])
        text, identity = task.condition(["a person", "a person"], people, strength)
        with torch.no_grad():
            with_drop = task.base.predict(noise, steps, text, identity)[1]
            plain = task.base.predict(noise, steps, task.base.text(["a person"] * 2))[1]
        assert torch.allclose(with_drop, plain, atol=1e-5), method


def test_the_system_enrolls_photos_and_reports_costs(home: Path, learnt: Callable[[str, str], Path]) -> None:
    system = EncoderSystem(learnt("ip_adapter", "world"))
    system.task.base.pipe.finder = KnownBoxesFinder([tiny.BOX])
    people = [system.enroll([tiny.photo(seed)], on_no_face="whole") for seed in (1, 2)]
    generators = [torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)]
    out = system(
        ["a person", "a person"], reference=people, generator=generators, num_inference_steps=1, output_type="pt"
    )
    assert out.images.shape[0] == 2 and not torch.equal(*out.images)
    alone = system(["a person"], generator=[torch.Generator().manual_seed(5)], num_inference_steps=1).images
    assert alone[0].size == (32, 32)
    assert system.costs["people"] == 2 and system.costs["bytes_per_person"] > 0


def test_the_judges_recogniser_is_refused(home: Path) -> None:
    place = home / "judge" / "recogniser"
    Recogniser(dimensions=8).save(place)
    with pytest.raises(ConfigError, match="the judge's own"):
        train_method(run_of("instantid", "world", home, f"settings.recogniser={place}"), home / "refused")
    other = home / "teacher"
    Recogniser(dimensions=8).save(other)
    assert train_method(run_of("face0", "world", home, f"settings.recogniser={other}"), home / "taught") is not None


def test_tokens_behind_the_text_encoder() -> None:
    values, there = torch.zeros(2, 5, 3), torch.tensor([True, False])
    tokens = torch.ones(2, 2, 3)
    over = overwritten(TextState(Tokens(values)), tokens, there)
    assert over.clip.values[0, -2:].eq(1).all() and over.clip.values[1].eq(0).all() and over.clip.mask is None
    more = appended(TextState(Tokens(values)), tokens, there)
    mask = more.clip.mask
    assert mask is not None and mask.tolist() == [[True] * 7, [True] * 5 + [False] * 2]


def test_captions_are_cut_to_the_text_encoders(home: Path, learnt: Callable[[str, str], Path]) -> None:
    task: Any = open_learnt(learnt("ip_adapter", "sd15"))
    task.cut = 0
    short = task._fitting("a person smiling on a beach, wearing a red hat, looking to the left, on a beach")
    assert task.base.fits(short) and task.cut == 1
