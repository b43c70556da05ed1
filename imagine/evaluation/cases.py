"""Build the cases of an evaluation: every (person, prompt), the real renders of it, and the judge's results for them.

For each held-out person the world renders a reference (the only picture that the pipeline gets) and a gallery picture.
For each prompt it renders two more pictures that show what the prompt asks for: the ground truth, and a second one that
takes the place of a perfect pipeline's output (row "ceiling"). Renders are judged batch by batch and then freed; with a
store, what was judged is kept, and an interrupted run continues after it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from imagine.evaluation.judge import Judge, Seen
from imagine.evaluation.runs.judged import JudgedStore
from imagine.evaluation.suites import Prompt, contexts_for
from imagine.records import Progress, no_progress
from imagine.world import VERSION, Contexts, People, attributes, render, sample_people, seeds

GALLERY = 1000
# Rows start..stop -> pictures (n, 3, H, W), boxes or None. A picture of NaN stands for one that cannot be read.
PictureLoader = Callable[[int, int], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Judged:
    """The judge's results for a list of pictures. A picture that could not be read has zeros and no words."""

    embeddings: Tensor  # (N, D), unit length
    read: list[dict[str, str]]  # attribute or trait -> word, one dict a picture
    features: Tensor  # (N, F), of the attribute reader
    faces: Tensor  # (N,), whether a face was found
    readable: Tensor  # (N,), whether the picture could be read
    others: dict[str, Tensor] = field(default_factory=dict)  # other recognisers: name -> embeddings (N, D)

    def __getitem__(self, rows: Tensor) -> "Judged":
        return Judged(
            self.embeddings[rows], [self.read[row] for row in rows.tolist()], self.features[rows], self.faces[rows],
            self.readable[rows], {name: values[rows] for name, values in self.others.items()},
        )  # fmt: skip

    @classmethod
    def of(cls, seen: Seen, readable: Tensor) -> "Judged":
        """Return the results for a batch; those of unreadable pictures are emptied."""
        keep = readable.unsqueeze(1)
        return cls(
            seen.embeddings * keep, [words if good else {} for words, good in zip(seen.read, readable, strict=True)],
            seen.features * keep, seen.faces & readable, readable,
            {name: values * keep for name, values in seen.others.items()},
        )  # fmt: skip

    @classmethod
    def join(cls, parts: "Sequence[Judged]") -> "Judged":
        """Return the results of batches, in order."""
        return cls(
            torch.cat([part.embeddings for part in parts]), [words for part in parts for words in part.read],
            torch.cat([part.features for part in parts]), torch.cat([part.faces for part in parts]),
            torch.cat([part.readable for part in parts]),
            {name: torch.cat([part.others[name] for part in parts]) for name in parts[0].others},
        )  # fmt: skip


@dataclass(frozen=True)
class Cases:
    """Every (person, prompt), all prompts of the first person first, with the contexts of the real renders."""

    prompts: tuple[Prompt, ...]
    people: People  # the gallery's people, the evaluated ones first
    references: Contexts  # one per evaluated person
    gallery: Contexts  # one per person in the gallery
    truths: Contexts  # one per case
    ceilings: Contexts  # one per case
    identities: int  # number of evaluated people

    def __len__(self) -> int:
        return self.identities * len(self.prompts)

    @property
    def person(self) -> Tensor:
        return torch.arange(self.identities).repeat_interleave(len(self.prompts))

    def prompt(self, case: int) -> Prompt:
        return self.prompts[case % len(self.prompts)]


@dataclass(frozen=True)
class JudgedReal:
    """The judge's results for the real renders, and the true attributes of the references."""

    references: Judged
    reference_attributes: list[dict[str, str]]
    truths: Judged
    gallery: Judged
    rows: dict[str, Judged]  # ceiling, other, copy
    scenes: Judged | None = None  # the ceiling's pictures with another person in each


def make_cases(prompts: Sequence[Prompt], identities: int, seed: int, gallery: int = GALLERY) -> Cases:
    """Return the people and contexts of one evaluation, from held-out seeds only.

    `seed` is taken modulo 10: ten values give different people.
    """
    base = seeds.HELD_OUT.start + (seed % 10) * 1_000_000
    gallery = max(gallery, identities)
    asked = [prompt.asked for _ in range(identities) for prompt in prompts]
    plain = [{"style": "photo", "headwear": "none"}]  # a plain photo, for recognition
    return Cases(
        prompts=tuple(prompts),
        people=sample_people(range(base, base + gallery)),
        references=contexts_for(plain * identities, range(base + 100_000, base + 100_000 + identities)),
        gallery=contexts_for(plain * gallery, range(base + 200_000, base + 200_000 + gallery)),
        truths=contexts_for(asked, range(base + 300_000, base + 300_000 + len(asked))),
        ceilings=contexts_for(asked, range(base + 600_000, base + 600_000 + len(asked))),
        identities=identities,
    )


def judge_real_pictures(
    cases: Cases, judge: Judge, progress: Progress = no_progress, store: JudgedStore | None = None,
    scenes: bool = False,
) -> JudgedReal:  # fmt: skip
    """Render everything real, a batch at a time, and judge it.

    scenes: also judge every real picture with another person in it, to know how much a person alone changes a picture.
    """

    def judged(stage: str, name: str, count: int, pictures: PictureLoader) -> Judged:
        return judge_pictures(
            judge, count, pictures, progress=progress, stage=f"judging {stage}", store=store, name=f"real {name}",
            source=f"{VERSION} {name}",
        )  # fmt: skip

    evaluated = cases.people[: cases.identities]
    each = evaluated.repeat(len(cases.prompts))
    # Judged as the pipeline's pictures are: the finder gives the box, so that a copied reference equals the reference.
    references = judged(
        "the references", "references", cases.identities, _rendered(evaluated, cases.references, true_boxes=False)
    )
    ceiling = judged(
        "real pictures for the ceiling", "ceilings", len(cases), _rendered(each, cases.ceilings, true_boxes=False)
    )
    other = torch.arange(len(cases)).roll(len(cases.prompts))  # the previous person, same prompt
    return JudgedReal(
        references=references,
        reference_attributes=attributes(evaluated, cases.references),
        truths=judged(
            "real pictures to compare with", "truths", len(cases), _rendered(each, cases.truths, true_boxes=True)
        ),
        gallery=judged(
            "the gallery", "gallery", len(cases.gallery), _rendered(cases.people, cases.gallery, true_boxes=True)
        ),
        rows=(
            {"ceiling": ceiling, "other": ceiling[other], "copy": references[cases.person]}
            if store is None or store.shard.is_whole
            else {}  # of a part of a run
        ),
        scenes=(
            judged(
                "real pictures with another person", "scenes", len(cases),
                _rendered(each[other], cases.ceilings, true_boxes=False),
            )
            if scenes
            else None
        ),
    )  # fmt: skip


def _rendered(people: People, contexts: Contexts, true_boxes: bool) -> PictureLoader:
    def pictures(start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        drawn = render(people[start:stop], contexts[start:stop])
        return drawn.images, drawn.boxes if true_boxes else None

    return pictures


def judge_pictures(
    judge: Judge,
    count: int,
    pictures: PictureLoader,
    batch: int = 64,
    progress: Progress = no_progress,
    stage: str = "judging",
    store: JudgedStore | None = None,
    name: str = "",
    source: str = "",
) -> Judged:
    """Judge `count` pictures without holding more than a batch of them.

    With a store, results are kept there under `name`, and those of the same pictures are taken from there. `source` is
    a text that determines the pictures, which are then not loaded to recognise them. If the store belongs to one part
    of a run, only its batches are judged, and the others are left out.
    """
    parts: list[Judged] = []
    for number, start in enumerate(range(0, count, batch)):
        if store is not None and not store.shard.owns(number):
            continue
        progress(stage, start, count)
        stop = min(start + batch, count)
        parts.append(_judge_stored(judge, pictures, start, stop, store, name, source and f"{source} {start}-{stop}"))
    if not parts:  # this part of the run owns no batch
        return judge_batch(judge, torch.zeros(0, 3, judge.reader.size, judge.reader.size), None)
    return Judged.join(parts)


def _judge_stored(
    judge: Judge, pictures: PictureLoader, start: int, stop: int, store: JudgedStore | None, name: str, source: str
) -> Judged:
    if store is None:
        return judge_batch(judge, *pictures(start, stop))
    loaded = None if source else pictures(start, stop)
    digest = store.digest(source if loaded is None else loaded[0])
    if (found := store.load(name, start, digest)) is not None:
        return _from_tensors(*found)
    judged = judge_batch(judge, *(loaded or pictures(start, stop)))
    store.computed += stop - start
    tensors = {spec.name: getattr(judged, spec.name) for spec in fields(Judged) if spec.name not in ("read", "others")}
    store.save(
        name, start, digest, {**tensors, **{f"other.{key}": value for key, value in judged.others.items()}}, judged.read
    )
    return judged


def _from_tensors(tensors: dict[str, Tensor], read: list[dict[str, str]]) -> Judged:
    others = {name.removeprefix("other."): tensors.pop(name) for name in [*tensors] if name.startswith("other.")}
    return Judged(read=read, others=others, **tensors)


def judge_batch(judge: Judge, images: Tensor, boxes: Tensor | None) -> Judged:
    """Judge one batch of pictures (n, 3, H, W); a picture of NaN counts as one that could not be read."""
    readable = ~images.isnan().flatten(1).any(1)
    return Judged.of(judge.look(images.nan_to_num(), boxes), readable)
