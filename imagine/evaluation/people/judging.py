"""Judge pictures of several people: which face shows whom, and what each person does and wears.

The face finder finds the faces, also in real pictures, so that its errors are part of the ceiling. The recogniser
compares each face with each person of the group, by a portrait of the person that the pipeline did not get, and faces
are assigned to people so that the sum of the similarities is largest (the Hungarian method).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from imagine.errors import ConfigError
from imagine.evaluation.judge import Judge
from imagine.evaluation.metrics import similarity
from imagine.evaluation.metrics.several import confusion, patterns
from imagine.evaluation.people.cases import PLAIN
from imagine.evaluation.people.suites import GROUP_SUITES
from imagine.evaluation.report import to_pil
from imagine.evaluation.runs.judged import JudgedStore
from imagine.evaluation.suites import contexts_for
from imagine.people.assignment import assign
from imagine.people.faces import CROP_RISE, CROP_SIDE, FaceFinder, crop_unmasked
from imagine.records import Progress, no_progress
from imagine.world import Contexts, People, render, sample_people, seeds

# A face box in a portrait without close-up (`imagine.world.camera`): 0.8 of the head's height, whose half is 0.26 of
# the picture; the box's centre is a fifth of that half below the head's centre at 0.45.
FACE_HEIGHT = 0.416
FACE_CENTRE = 0.502
_MISSED = 0.05  # share of the pairs of one person that the threshold misses
_THRESHOLD_SEED = seeds.HELD_OUT.start + 700_000  # people and contexts that no suite uses
Pictures = Callable[[Tensor], Tensor]  # cases (B,) -> pictures (B, 3, H, W) in 0..1


@dataclass(frozen=True)
class JudgedPerson:
    """What a picture shows of one person of its group.

    similarity, centre: of the face assigned to the person, and its distance from the left edge in pixels; None if no
        face was left for the person.
    present: whether the similarity exceeds the threshold, and nobody else of the group is more similar to the face.
    read: attribute -> word, read on a square around the face; empty for a person who is not present.
    """

    similarity: float | None
    centre: float | None
    present: bool
    read: dict[str, str]


@dataclass(frozen=True)
class JudgedGroup:
    """One picture: its people in the order of the references, its number of faces, and whether someone is doubled.

    A person is doubled who is the most similar of the group, above the threshold, to two or more faces.
    slots: for each person the similarities of the face in their place to every person of the group; NaN without a
        face. The place is the sentence's, or, where it gives none, that of the face assigned to the person.
    patterns: what became of each person, of `metrics.several.PATTERNS`; empty where it was not asked for.
    """

    people: tuple[JudgedPerson, ...]
    faces: int
    doubled: bool
    slots: tuple[tuple[float, ...], ...] = ()
    patterns: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "JudgedGroup":
        """Return the result that `as_dict` wrote."""
        people = tuple(JudgedPerson(**person) for person in plain["people"])
        slots = tuple(tuple(float(value) for value in row) for row in plain["slots"])
        return cls(people, plain["faces"], plain["doubled"], slots, tuple(plain["patterns"]))

    @property
    def all_present(self) -> bool:
        return all(person.present for person in self.people)

    @property
    def order(self) -> list[int]:
        """The numbers of the people who have a face, from left to right."""
        centres = {number: one.centre for number, one in enumerate(self.people) if one.centre is not None}
        return sorted(centres, key=centres.__getitem__)


def judge_groups(
    judge: Judge, cases: Tensor, pictures: Pictures, truths: Tensor, threshold: float, batch: int = 32,
    progress: Progress = no_progress, stage: str = "judging", places: "Sequence[Sequence[int] | None] | None" = None,
    store: JudgedStore | None = None, name: str = "", source: str = "",
) -> list[JudgedGroup]:  # fmt: skip
    """Judge the pictures of these cases, a batch at a time; truths (cases, P, D) are embeddings of their people.

    places: each person's place from the left in each case, or None where the sentence gives none. With a store, results
    are kept under `name`; a part of a run judges its batches only and leaves the others out. `source` is a text that
    determines the pictures, which are then not loaded to recognise them. A picture of NaN stands for one that could not
    be read, and has no face.
    """
    judged: list[JudgedGroup] = []
    for number, start in enumerate(range(0, len(cases), batch)):
        if store is not None and not store.shard.owns(number):
            continue
        progress(stage, start, len(cases))
        rows = slice(start, start + batch)
        images = None if source else pictures(cases[rows])
        digest, found = "", None
        if store is not None:
            digest = store.digest(f"{threshold} {source} {start}" if images is None else images)
            found = store.load(name, start, digest)
        if found is None:
            images = pictures(cases[rows]) if images is None else images
            results = _judge_batch(judge, images, truths[rows], threshold, list(places[rows]) if places else None)
            if store is not None:
                store.computed += len(images)
                store.save(name, start, digest, {}, [each.as_dict() for each in results])
        else:
            results = [JudgedGroup.from_dict(each) for each in found[1]]
        judged += results
    return judged


def _judge_batch(
    judge: Judge, images: Tensor, truths: Tensor, threshold: float, places: "Sequence[Sequence[int] | None] | None"
) -> list[JudgedGroup]:
    places = [None] * len(images) if places is None else places
    boxes = find_faces(judge, images)
    images = images.nan_to_num()
    counts = [len(found) for found in boxes]
    rows = torch.arange(len(images)).repeat_interleave(torch.tensor(counts))
    joined = torch.cat(boxes)
    embedded = judge.embed(images[rows], joined).split(counts)
    similarities = [own @ faces.T for own, faces in zip(truths, embedded, strict=True)]
    found = [identify(each, threshold) for each in similarities]
    starts = [sum(counts[:number]) for number in range(len(counts))]
    present = [
        start + column
        for start, one in zip(starts, found, strict=True)
        for column, is_present in zip(one.columns, one.present, strict=True)
        if column is not None and is_present
    ]
    squares = portrait_squares(images[rows[present]], joined[present], judge.reader.size)
    read = dict(zip(present, judge.read(squares), strict=True))
    width = images.shape[-1]
    slots = [
        slot_similarities(each, _slot_columns(one, own, place, width))
        for each, one, own, place in zip(similarities, found, boxes, places, strict=True)
    ]
    return [
        _judged(one, own, start, read, slot) for one, own, start, slot in zip(found, boxes, starts, slots, strict=True)
    ]


def slot_similarities(similarities: Tensor, columns: "Sequence[int | None]") -> tuple[tuple[float, ...], ...]:
    """Return S_gen: row i holds the similarities (P, F) of the face in column i to every person, NaN without a face."""
    blank = torch.full((len(similarities),), torch.nan)
    rows = [blank if column is None else similarities[:, column] for column in columns]
    return tuple(tuple(float(value) for value in row) for row in rows)


def _slot_columns(
    found: "Identified", boxes: Tensor, places: "Sequence[int] | None", width: int
) -> "Sequence[int | None]":
    """Return the face in each person's place: the nearest to it, or the assigned one where no place is given."""
    if places is None or not len(boxes):
        return found.columns
    centres = (boxes[:, 0] + boxes[:, 2] / 2) / width
    wanted = (torch.tensor([float(place) for place in places]) + 0.5) / len(places)
    nearest = assign(-(wanted.unsqueeze(1) - centres).abs().numpy())
    return [nearest.get(person) for person in range(len(places))]


def _judged(
    found: "Identified", boxes: Tensor, start: int, read: dict[int, dict[str, str]],
    slots: tuple[tuple[float, ...], ...],
) -> JudgedGroup:  # fmt: skip
    """Return one picture's result; `start` is the number of its first face among all faces, which `read` counts."""
    people = []
    for column, score, is_present in zip(found.columns, found.similarities, found.present, strict=True):
        centre = None if column is None else float(boxes[column, 0] + boxes[column, 2] / 2)
        words = read[start + column] if column is not None and is_present else {}
        people.append(JudgedPerson(score, centre, is_present, words))
    return JudgedGroup(tuple(people), len(boxes), found.doubled, slots)


def with_patterns(groups: Sequence[JudgedGroup], real: Tensor, limit: float) -> list[JudgedGroup]:
    """Return the results with what became of each person; real (groups, P, P) is S_gt of each picture."""
    return [
        replace(group, patterns=tuple(patterns(confusion(torch.tensor(group.slots), own), limit)))
        for group, own in zip(groups, real, strict=True)
    ]


@dataclass(frozen=True)
class Identified:
    """For each person the number of the assigned face, its similarity, and whether the person is present."""

    columns: list[int | None]
    similarities: list[float | None]
    present: list[bool]
    doubled: bool


def identify(similarities: Tensor, threshold: float) -> Identified:
    """Assign faces to people by their similarities (P, F); see `JudgedPerson` and `JudgedGroup` for the results."""
    assigned = assign(similarities.numpy())
    columns = [assigned.get(row) for row in range(len(similarities))]
    scores = [None if column is None else float(similarities[row, column]) for row, column in enumerate(columns)]
    if not similarities.shape[1]:
        return Identified(columns, scores, [False] * len(columns), False)
    best, owner = similarities.max(0)
    present = [
        column is not None
        and float(best[column]) > threshold
        and float(similarities[row, column]) == float(best[column])
        for row, column in enumerate(columns)
    ]
    doubled = bool((torch.bincount(owner[best > threshold], minlength=1) > 1).any())
    return Identified(columns, scores, present, doubled)


def require_finder(judge: Judge) -> FaceFinder:
    """Return the judge's face finder. Raises ConfigError if it has none."""
    if judge.finder is None:
        raise ConfigError("This suite needs a judge with a face finder: give weights that have a finder/ folder.")
    return judge.finder


def find_faces(judge: Judge, images: Tensor) -> list[Tensor]:
    """Return the boxes of all faces in each picture, (F, 4): left, top, width and height in pixels."""
    finder = require_finder(judge)
    found = [() if bool(image.isnan().any()) else finder.find(to_pil(image)) for image in images]
    return [torch.tensor([[f.left, f.top, f.width, f.height] for f in faces]).view(-1, 4) for faces in found]


def portrait_squares(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut a square around each face, with the head as large and as high in it as in a portrait: (N, 3, size, size).

    One picture (N, 3, H, W) and one box (N, 4) per face. What lies outside the picture repeats its edge.
    """
    side = boxes[:, 3] / FACE_HEIGHT
    middle = boxes[:, :2] + boxes[:, 2:] / 2
    middle = torch.stack((middle[:, 0], middle[:, 1] + (0.5 - FACE_CENTRE) * side), 1)
    margin = max(images.shape[-2:]) // 2
    around = F.pad(images, (margin,) * 4, mode="replicate")
    # `crop_unmasked` enlarges a box by CROP_SIDE and moves it up by CROP_RISE; this box undoes both.
    length = side / CROP_SIDE
    corner = middle + margin - length.unsqueeze(1) / 2
    corner = torch.stack((corner[:, 0], corner[:, 1] + CROP_RISE * length), 1)
    return crop_unmasked(around, torch.cat((corner, length.repeat(2, 1).T), 1), size)


def embed_portraits(judge: Judge, people: People, contexts: Contexts, batch: int = 64) -> Tensor:
    """Render portraits and return the embeddings (N, D) of their faces, whose true boxes are used."""
    parts = []
    for start in range(0, len(people), batch):
        drawn = render(people[start : start + batch], contexts[start : start + batch])
        parts.append(judge.embed(drawn.images, drawn.boxes))
    return torch.cat(parts)


def same_person_threshold(judge: Judge, people: int = 300) -> float:
    """Return the similarity that 5 % of the pairs of one person fall below.

    A pair is two real portraits of a held-out person of no suite: a plain one, like those that faces are compared with,
    and one that shows what a sentence of the suite asks of a picture and of one of its people. The sentences take
    turns. The number depends on the judge only, not on the evaluation's seed.
    """
    first = _THRESHOLD_SEED
    who = sample_people(range(first, first + people))
    asked = [
        {**prompt.picture, **person.asked}
        for prompts in GROUP_SUITES["people"].values()
        for prompt in prompts
        for person in prompt.people
    ]
    shown = contexts_for(list(islice(cycle(asked), people)), range(first, first + people))
    plain = contexts_for([PLAIN] * people, range(first + people, first + 2 * people))
    pairs = similarity(embed_portraits(judge, who, plain), embed_portraits(judge, who, shown))
    return float(torch.quantile(pairs.double(), _MISSED))
