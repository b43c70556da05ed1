"""Draw pictures of several people of the portrait world, with what a record of several people holds (docs/data.md).

The people are those of the portraits that the same command draws, and the portraits are their references. Their order
in the record is that of the captions ("the first person"), and is independent of their places in the picture.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imagine.shards.masks import encode_mask
from imagine.shards.people import RecordPerson
from imagine.world import attributes, group_captions, render_groups, sample_contexts, sample_groups, sample_people
from imagine.world.group_captions import ORDINALS
from imagine.world.groups import ARRANGEMENTS, canvas_shape, group_contexts

NAMES = "abcd"  # of the people of a picture, in the order of the captions
STYLES = ("dense", "rewritten")
_BATCH = 8  # pictures rendered together; the batches never change, so a resumed run gives the same bytes
_MOST_REFERENCES = 4  # portraits that a person refers to
_PURPOSE = 2  # in the seeds of these pictures, which differ from those of all portraits


@dataclass(frozen=True)
class GroupJob:
    """One picture of several people to draw."""

    number: int  # of the picture, from 0
    members: tuple[int, ...]  # numbers of the people, from left to right
    identities: tuple[int, ...]  # their seeds
    contexts: tuple[int, ...]  # the seeds of their contexts; the first is also that of the arrangement
    order: tuple[int, ...]  # place of each person in the order of the captions
    portraits: int  # portraits of each person

    @property
    def file(self) -> str:
        """The path below the output folder."""
        return f"groups/{self.number:06d}.png"

    @property
    def key(self) -> str:
        """The key of the record."""
        return f"group_{self.number:06d}"


def group_jobs(
    identities: Sequence[int], pictures: int, size: int, portraits: int, seed_of: Callable[..., int]
) -> Iterator[list[GroupJob]]:
    """Yield the jobs of `pictures` pictures of `size` people each, in batches.

    identities: the seeds of the people to choose from. portraits: how many portraits each of them has. seed_of: returns
    a seed derived from several numbers.
    """
    jobs = (_job(number, identities, size, portraits, seed_of) for number in range(pictures))
    while batch := list(islice(jobs, _BATCH)):
        yield batch


def _job(
    number: int, identities: Sequence[int], size: int, portraits: int, seed_of: Callable[..., int]
) -> GroupJob:  # fmt: skip
    random = np.random.default_rng(seed_of(_PURPOSE, number))
    members = random.choice(len(identities), size, replace=False).tolist()
    contexts = tuple(seed_of(_PURPOSE, number, place) for place in range(size))
    order = tuple(random.permutation(size).tolist())
    return GroupJob(number, tuple(members), tuple(identities[i] for i in members), contexts, order, portraits)


def drawn_groups(
    batch: Sequence[GroupJob], missing: Sequence[int], size: int
) -> Iterator[tuple[GroupJob, Tensor, dict[str, Any]]]:
    """Yield the image (3, H, W), 0 to 1, and the row of each missing picture; `size` is the side of a portrait.

    The whole batch is rendered, because the last bit of a picture can depend on the batch.
    """
    count = len(batch[0].members)
    height, width = canvas_shape(count, size)
    people = sample_people([identity for job in batch for identity in job.identities])
    contexts = sample_contexts([context for job in batch for context in job.contexts])
    groups = sample_groups([job.contexts[0] for job in batch], count, width / height)
    drawn = render_groups(people, contexts, count, size, groups=groups)
    order, seeds = torch.tensor([job.order for job in batch]), [job.contexts[0] for job in batch]
    captions = {style: group_captions(people, contexts, groups, order, style, seeds) for style in STYLES}
    facts = attributes(people, group_contexts(contexts, groups))
    for i in missing:
        job, own = batch[i], facts[i * count : (i + 1) * count]
        row = {
            "caption": captions["dense"][i],
            "captions": {style: captions[style][i] for style in STYLES},
            "people": [one.as_dict() for one in _people(job, drawn.boxes[i], drawn.masks[i])],
            "attributes": [own[place] for place in job.order],
            "arrangement": ARRANGEMENTS[int(groups.kind[i])],
            "context": job.contexts[0],
        }
        yield job, drawn.images[i], row


def _people(job: GroupJob, boxes: Tensor, masks: Tensor) -> Iterator[RecordPerson]:
    """Yield the people of a picture in the order of the captions; references are the files of portraits."""
    for number, place in enumerate(job.order):
        left, top, width, height = np.round(boxes[place].numpy().astype(np.float64), 2).tolist()
        portraits = range(min(job.portraits, _MOST_REFERENCES))
        yield RecordPerson(
            NAMES[number],
            f"the {ORDINALS[number]} person",
            (left, top, width, height),
            encode_mask(masks[place].numpy() > 0.5),
            tuple(portrait_file(job.members[place], image) for image in portraits),
            str(job.identities[place]),
        )


def portrait_file(number: int, image: int) -> str:
    """Return the path of a portrait below the output folder, from the person's number and that of the picture."""
    return f"images/{number:06d}/{image:04d}.png"


def portrait_key(file: str) -> str:
    """Return the key of a portrait's record from the path of the portrait."""
    _, number, image = file.removesuffix(".png").split("/")
    return f"{number}_{image}"
