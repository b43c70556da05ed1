"""Check whether pictures show their people, and draw those again that do not.

Only the pictures that fail are drawn again, each from noise of its own, whose seed is computed from the noise of the
picture's first attempt. Of all attempts the best one is kept. A picture therefore depends on neither the other pictures
of its batch nor on how often these are drawn, and the seed that is reported draws it at once.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imagine.people.assignment import KnownPerson, PersonResult, check_people
from imagine.people.faces import FaceFinder
from imagine.people.persona import Persona
from imagine.people.strangers import FaceRecogniser
from imagine.request import Request


@dataclass
class Drawn:
    """Pictures of one output type, with the redrawn small faces and the note of each, and whether they are unfinished.

    `notes` maps the index of a picture to its note.
    """

    images: Any
    refined: list[int]
    notes: dict[int, str] = field(default_factory=dict)
    interrupted: bool = False


@dataclass(frozen=True)
class PictureCheck:
    """What one picture shows: the number of its faces, and one result for each person whom it should show."""

    faces: int
    people: list[PersonResult]

    @property
    def failed(self) -> bool:
        """Whether somebody is missing or unlike."""
        return any(person.failed for person in self.people)

    @property
    def score(self) -> tuple[float, ...]:
        """What makes one attempt better than another: people matched, people found, then the sum of similarities."""
        return (
            sum(person.matched is True for person in self.people),
            sum(person.found for person in self.people),
            sum(person.similarity or 0.0 for person in self.people),
        )


@dataclass(frozen=True)
class PeopleChecker:
    """Checks pictures of a call. `people` holds the people of each picture."""

    finder: FaceFinder
    recogniser: FaceRecogniser | None
    people: Sequence[Sequence[KnownPerson]]

    def check(self, number: int, picture: Any) -> PictureCheck:
        """Check picture `number` of the call. picture: PIL, an array (H, W, 3) or a tensor (3, H, W) in 0..1."""
        image = to_image(picture)
        faces = self.finder.find(image)
        return PictureCheck(len(faces), check_people(image, faces, self.people[number], self.recogniser))


def known_people(
    requests: Sequence[Request],
    personas: Sequence[Sequence[Persona]],
    recogniser: FaceRecogniser | None,
    copies: int,
) -> list[list[KnownPerson]]:
    """Return the people of each picture: those of its request, whose copies are adjacent."""
    known = []
    for request, own in zip(requests, personas, strict=True):
        people = zip(request.people, own, strict=True)
        known += [[KnownPerson.of(person.name, persona, recogniser) for person, persona in people]] * copies
    return known


@dataclass
class Attempts:
    """The best attempt at each picture: pictures and checks, how often each was drawn, and the seeds.

    A seed of None stands for the first attempt, which the caller's generator determines.
    """

    drawn: Drawn
    checks: list[PictureCheck]
    counts: list[int]
    seeds: list[int | None]

    def keep_better(self, number: int, seed: int, drawn: Drawn, place: int, check: PictureCheck) -> None:
        """Replace picture `number` by the picture at `place` of `drawn` if that shows its people better."""
        self.counts[number] += 1
        if check.score <= self.checks[number].score:
            return
        self.checks[number], self.seeds[number] = check, seed
        self.drawn.images[number] = drawn.images[place]
        self.drawn.refined[number] = drawn.refined[place]
        self.drawn.notes.pop(number, None)
        if place in drawn.notes:
            own, whole = f"Picture {place + 1}:", f"Picture {number + 1}:"
            self.drawn.notes[number] = drawn.notes[place].replace(own, whole, 1)


@dataclass(frozen=True)
class Round:
    """Pictures to draw next: their numbers, what each starts from, and which attempt it is. seeds: of the starts."""

    numbers: Sequence[int]
    start: Tensor
    attempt: int
    seeds: Sequence[int] = ()


class Rounds:
    """Asks for all pictures of a call, and then again for those that fail the check, up to `most` times in all.

    start: what the first attempt starts from, usually its latents (pictures, ...). start_of, seed_of: `noise_of` and
    `seed_of_attempt`, or functions for another kind of start. An interrupted attempt is the last one.
    """

    def __init__(
        self,
        start: Tensor,
        checker: PeopleChecker,
        most: int,
        start_of: "Callable[[Sequence[int], Tensor], Tensor] | None" = None,
        seed_of: "Callable[[Tensor, int], int] | None" = None,
    ) -> None:
        self.start, self.checker, self.most = start, checker, most
        self.start_of, self.seed_of = start_of or noise_of, seed_of or seed_of_attempt
        self.best: Attempts | None = None
        self._attempt, self._interrupted = 1, False

    def next(self) -> Round | None:
        """Return the pictures to draw next; None if every picture passed, or no attempt is left."""
        if self.best is None:
            return Round(range(len(self.start)), self.start, 1)
        failing = [number for number, check in enumerate(self.best.checks) if check.failed]
        if not failing or self._interrupted or self._attempt >= self.most:
            return None
        self._attempt += 1
        seeds = [self.seed_of(self.start[number], self._attempt) for number in failing]
        return Round(failing, self.start_of(seeds, self.start), self._attempt, seeds)

    def take(self, asked: Round, drawn: Drawn) -> None:
        """Check what was drawn for a round, and keep the better ones."""
        self._interrupted = drawn.interrupted
        if self.best is None:
            checks = [self.checker.check(number, drawn.images[number]) for number in asked.numbers]
            self.best = Attempts(drawn, checks, [1] * len(checks), [None] * len(checks))
            return
        if drawn.interrupted:
            return
        for place, (number, seed) in enumerate(zip(asked.numbers, asked.seeds, strict=True)):
            self.best.keep_better(number, seed, drawn, place, self.checker.check(number, drawn.images[place]))

    def result(self) -> Attempts:
        """Return the best attempt at each picture, after the first round."""
        assert self.best is not None
        return self.best


def draw_until_matched(
    draw: Callable[[Sequence[int], Tensor, int], Drawn],
    start: Tensor,
    checker: PeopleChecker,
    attempts: int,
    start_of: "Callable[[Sequence[int], Tensor], Tensor] | None" = None,
    seed_of: "Callable[[Tensor, int], int] | None" = None,
) -> Attempts:
    """Draw all pictures, and those again that fail the check, up to `attempts` times in all (see `Rounds`).

    draw: draws the pictures with these numbers from these starts, as attempt number N.
    """
    rounds = Rounds(start, checker, attempts, start_of, seed_of)
    while (asked := rounds.next()) is not None:
        rounds.take(asked, draw(asked.numbers, asked.start, asked.attempt))
    return rounds.result()


def seed_of_attempt(start: Tensor, attempt: int) -> int:
    """Return the seed of another attempt at a picture, computed from the start latents of its first attempt."""
    first = zlib.crc32(start.detach().float().cpu().contiguous().numpy().tobytes())
    return zlib.crc32(attempt.to_bytes(4, "little"), first)


def noise_of(seeds: Sequence[int], like: Tensor) -> Tensor:
    """Return the noise that a call draws from a CPU generator with each seed, shaped like the rows of `like`."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(like.shape[1:], generator=each) for each in generators]).to(like)


def to_image(picture: Any) -> Image.Image:
    """Return a picture (PIL, an array (H, W, 3) or a tensor (3, H, W) in 0..1) as RGB."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    pixels = picture.permute(1, 2, 0).float().cpu().numpy() if isinstance(picture, Tensor) else picture
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))
