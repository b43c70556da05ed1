"""Records of several people for tests: two portraits of each of four people, and pictures of two or three of them."""

import functools
import io
from dataclasses import replace

import torch
from PIL import Image

from imagine.evaluation.report import to_pil
from imagine.shards.masks import encode_mask
from imagine.shards.people import RecordPerson
from imagine.shards.reading import Record
from imagine.world import render, render_groups, sample_contexts, sample_groups, sample_people
from imagine.world.groups import canvas_shape
from tests.train.data.test_recorded import png

PEOPLE = 4
NAMES = ("ann", "bob", "cem")
Box = tuple[float, float, float, float]


@functools.cache
def portraits(size: int = 64) -> tuple[Record, ...]:
    """Return two pictures of each person, both with the person's identity."""
    seeds = range(2 * PEOPLE)
    out = render(sample_people([seed // 2 for seed in seeds]), sample_contexts(seeds), size)
    return tuple(
        Record(
            f"p{seed // 2}_{seed % 2}", png(to_pil(out.images[seed])), "a person", {}, str(seed // 2), None,
            box_of(out.boxes[seed]), "real", size, size,
        )
        for seed in seeds
    )  # fmt: skip


def box_of(values: torch.Tensor) -> Box:
    left, top, width, height = values.tolist()
    return left, top, width, height


@functools.cache
def group(members: tuple[int, ...], seed: int = 0, size: int = 64, masks: bool = True) -> Record:
    """Return a picture of these people from left to right."""
    count = len(members)
    height, width = canvas_shape(count, size)
    contexts = sample_contexts(range(100 * seed, 100 * seed + count))
    out = render_groups(
        sample_people(list(members)), contexts, count, size, groups=sample_groups([seed], count, width / height)
    )
    people = tuple(
        RecordPerson(
            NAMES[place], ("the one on the left", "the one on the right", "the one in the middle")[place],
            box_of(out.boxes[0, place]), encode_mask(out.masks[0, place].numpy() > 0.5) if masks else None,
            (f"p{who}_0", f"p{who}_1"), str(who),
        )
        for place, who in enumerate(members)
    )  # fmt: skip
    caption = " and ".join(f"{{{NAMES[place]}}} smiling" for place in reversed(range(count)))
    captions = {"dense": caption, "rewritten": "the one on the left next to the one on the right, on a beach"}
    return Record(
        f"g{seed}", png(to_pil(out.images[0])), caption, captions, width=width, height=height, people=people
    )  # fmt: skip


def records(**options: bool) -> list[Record]:
    """Return the portraits, three pictures of two people and one of three."""
    pairs = [(0, 1), (2, 3), (1, 2)]
    groups = [group(members, seed, masks=options.get("masks", True)) for seed, members in enumerate(pairs)]
    groups = [without_references(each) if options.get("own") else each for each in groups]
    return [*portraits(), *groups, group((0, 1, 2), 9)]


def without_references(record: Record) -> Record:
    """Return the record of people who are known by nothing but their faces in it."""
    return replace(record, people=tuple(replace(one, references=(), identity=None) for one in record.people))


def picture_of(record: Record) -> Image.Image:
    return Image.open(io.BytesIO(record.read()))
