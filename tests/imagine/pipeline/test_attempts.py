"""Checking the people of pictures, and drawing those again that fail."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagine.errors import ConfigError
from imagine.people.assignment import KnownPerson, PersonResult
from imagine.pipeline.attempts import (
    Drawn,
    PeopleChecker,
    draw_until_matched,
    noise_of,
    seed_of_attempt,
    to_image,
)
from imagine.pipeline.notes import people_notes
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.records import FaceBox
from tests import tiny
from tests.faces import Colour, ColourRecogniser, HalvesFinder, Threshold, picture

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)
ANN = KnownPerson("ann", (np.array([1.0, 0, 0]),))
BOB = KnownPerson("bob", (np.array([0, 0, 1.0]),))


class Draws:
    """Draws pictures whose faces have given colours: `shown[number][attempt - 1]` for picture `number`."""

    def __init__(self, *shown: Sequence[tuple[Colour, Colour]], interrupt: int = 0) -> None:
        self.shown, self.interrupt = shown, interrupt
        self.calls: list[tuple[list[int], torch.Tensor]] = []

    def __call__(self, numbers: Sequence[int], start: torch.Tensor, attempt: int) -> Drawn:
        self.calls.append((list(numbers), start))
        images = [picture(*self.shown[number][attempt - 1]) for number in numbers]
        notes = {place: f"Picture {place + 1}: attempt {attempt}." for place in range(len(numbers))}
        return Drawn(images, [attempt] * len(numbers), notes, attempt == self.interrupt)


def drawn(draws: Draws, attempts: int) -> Any:
    checker = PeopleChecker(HalvesFinder(), ColourRecogniser(), [[ANN, BOB]] * len(draws.shown))
    start = torch.randn(len(draws.shown), 4, 2, 2, generator=torch.Generator().manual_seed(3))
    return draw_until_matched(draws, start, checker, attempts)


def test_only_failing_pictures_are_drawn_again_until_they_show_their_people() -> None:
    draws = Draws([(BLUE, RED)], [(RED, GREEN), (RED, GREY), (RED, BLUE)], [(GREEN, GREEN), (BLUE, RED)])
    best = drawn(draws, 5)
    assert [numbers for numbers, _ in draws.calls] == [[0, 1, 2], [1, 2], [1]]
    assert best.counts == [1, 3, 2] and [check.failed for check in best.checks] == [False] * 3
    assert best.drawn.refined == [1, 3, 2]
    assert best.drawn.notes == {0: "Picture 1: attempt 1.", 1: "Picture 2: attempt 3.", 2: "Picture 3: attempt 2."}
    assert [np.asarray(image)[0, 0].tolist() for image in best.drawn.images] == [list(BLUE), list(RED), list(BLUE)]


def test_the_reported_seed_is_that_of_the_noise_and_depends_on_the_picture_alone() -> None:
    draws = Draws([(RED, BLUE)], [(RED, GREEN), (RED, BLUE)])
    best = drawn(draws, 2)
    first, again = draws.calls[0][1], draws.calls[1][1]
    assert best.seeds == [None, seed_of_attempt(first[1], 2)]
    assert torch.equal(again[0], torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(best.seeds[1])))
    assert len({seed_of_attempt(one, attempt) for one in first for attempt in (2, 3, 4)}) == 6
    assert noise_of([1, 2], first.double()).dtype == torch.float64


def test_the_best_attempt_is_kept_and_an_equal_one_does_not_replace_it() -> None:
    best = drawn(Draws([(GREEN, GREEN), (RED, GREEN), (GREEN, GREEN), (RED, GREEN)]), 4)
    assert best.counts == [4] and best.seeds[0] is not None and best.drawn.refined == [2]
    assert [person.matched for person in best.checks[0].people] == [True, False]
    same = drawn(Draws([(RED, GREEN), (RED, GREEN)]), 2)
    assert same.counts == [2] and same.seeds == [None] and same.drawn.refined == [1]


def test_an_interrupted_call_draws_nothing_again() -> None:
    assert drawn(Draws([(RED, GREEN)], interrupt=1), 3).counts == [1]
    best = drawn(Draws([(RED, GREEN), (RED, BLUE)], interrupt=2), 3)
    assert best.counts == [1] and best.seeds == [None]


def test_notes_say_what_a_picture_lacks_and_how_often_it_was_drawn() -> None:
    best = drawn(Draws([(RED, GREEN), (RED, GREY)], [(GREEN, RED), (RED, BLUE)], [(RED, BLUE)]), 2)
    advice = "try other seeds, more attempts, or each person alone."
    assert people_notes(best.checks, best.counts, best.seeds) == [
        f"Warning: picture 1 shows nobody who is like 'bob'; {advice}",
        f"Picture 1 was drawn 2 times; the seed {best.seeds[0]} draws it at once.",
        f"Picture 2 was drawn 2 times; the seed {best.seeds[1]} draws it at once.",
    ]
    equal = drawn(Draws([(RED, GREEN), (RED, GREEN)]), 2)
    assert people_notes(equal.checks, equal.counts, equal.seeds)[1:] == [
        "Picture 1 was drawn 2 times, and the first one was the best."
    ]
    checker = PeopleChecker(HalvesFinder(1), ColourRecogniser(), [[ANN, BOB]])
    one = draw_until_matched(Draws([(RED, RED)]), torch.zeros(1, 4, 2, 2), checker, 1)
    (note,) = people_notes(one.checks, one.counts, one.seeds)
    assert note == f"Warning: picture 1 shows 1 of 2 people; {advice}" and one.checks[0].faces == 1


def test_pictures_of_every_output_type_become_images() -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    array = np.asarray(image) / 255
    for form in (image, array, torch.from_numpy(array).permute(2, 0, 1)):
        assert np.array_equal(np.asarray(to_image(form)), np.asarray(image))


# --- in the pipeline --------------------------------------------------------------------------------------------------
PROMPT = "{ann} in a red hat, looking to {bob}"


@pytest.fixture
def pipe() -> ImaginePipeline:
    return tiny.pipeline()


def recognising(pipe: Any, recogniser: Any, monkeypatch: pytest.MonkeyPatch, faces: int = 2) -> None:
    """Let the pipeline find `faces` faces in each picture, and compare them with a recogniser."""
    pipe.finder = HalvesFinder(faces)
    monkeypatch.setattr(pipe, "_picture_recogniser", lambda: recogniser)
    monkeypatch.setattr("imagine.people.reference_encoder._photo_recogniser", lambda: recogniser)


def middle(pipe: Any, **options: Any) -> float:
    """Return a brightness that about half of the pictures' left halves exceed."""
    images = pipe(PROMPT, reference=people(), num_images_per_prompt=6, output_type="np", **options).images
    return float(np.median([image[:, : image.shape[1] // 2].mean() for image in images]))


def people() -> dict[str, Any]:
    return {"ann": tiny.photo(1), "bob": tiny.photo(1)}


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_picture_that_is_drawn_again_equals_the_one_of_its_seed(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, output_type: Any
) -> None:
    limit = middle(pipe, generator=tiny.generator(5))
    recognising(pipe, Threshold(limit), monkeypatch)
    options: dict[str, Any] = {"reference": people(), "output_type": output_type, "layout": "left to right"}
    generators = [tiny.generator(seed) for seed in range(4)]
    out = pipe(PROMPT, num_images_per_prompt=4, generator=generators, attempts=4, **options)
    first = pipe(PROMPT, num_images_per_prompt=4, generator=[tiny.generator(seed) for seed in range(4)], **options)
    assert first.attempts == [1] * 4 and first.seeds == [None] * 4
    again = [seed is not None for seed in out.seeds]
    assert any(again) and not all(again), "choose other seeds for this test"
    for number, seed in enumerate(out.seeds):
        if seed is None:
            wanted = first.images[number]
        else:
            wanted = pipe(PROMPT, generator=tiny.generator(seed), **options).images[0]
            assert out.attempts[number] > 1
        difference = np.abs(np.asarray(to_image(out.images[number]), int) - np.asarray(to_image(wanted), int))
        assert difference.max() <= 1
    assert [[person.name for person in each] for each in out.people] == [["ann", "bob"]] * 4
    assert out.people_found == [2] * 4 and isinstance(out.people[0][0], PersonResult)


def test_one_person_is_checked_only_if_the_call_may_draw_again(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recognising(pipe, Threshold(2.0), monkeypatch, faces=1)
    out = pipe("a person smiling", reference=tiny.photo(1), generator=tiny.generator(1))
    assert out.people == [] and out.attempts == [] and out.people_found == []
    out = pipe("a person smiling", reference=tiny.photo(1), generator=tiny.generator(1), attempts=2)
    assert out.people == [[PersonResult("", True, 1.0, True)]] and out.attempts == [1] and out.people_found == []
    recognising(pipe, Threshold(-1.0), monkeypatch, faces=1)
    out = pipe("a person smiling", reference=tiny.photo(1), generator=tiny.generator(1), attempts=3)
    assert out.attempts == [3] and out.people[0][0].matched is False
    assert any("nobody who is like the person" in note for note in out.notes)


def test_a_call_without_people_is_drawn_once(pipe: Any) -> None:
    out = pipe("a beach", generator=tiny.generator(1), attempts=3)
    assert out.people == [] and out.attempts == []


def test_refined_faces_are_counted_for_the_pictures_that_are_kept(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recognising(pipe, Threshold(-1.0), monkeypatch)
    small = [FaceBox(2.0 + 16 * each, 4.0, 6.0, 6.0, 1.0) for each in range(2)]
    monkeypatch.setattr(pipe.finder, "find", lambda image: tuple(small) if image.size[0] == 32 else (tiny.BOX,))
    out = pipe(PROMPT, reference=people(), generator=tiny.generator(1), attempts=2, refine_faces=True)
    assert out.refined == 2 and out.attempts == [2]


def test_latents_cannot_be_checked(pipe: Any) -> None:
    with pytest.raises(ConfigError, match="attempts needs pictures"):
        pipe(PROMPT, reference=people(), attempts=2, output_type="latent")
    for wrong in (0, 1.5, True, "3"):
        with pytest.raises(ConfigError, match="attempts="):
            pipe(PROMPT, reference=people(), attempts=wrong)
    assert pipe(PROMPT, reference=people(), output_type="latent").people == []


def test_a_persona_from_enroll_is_compared_and_one_from_a_file_is_not(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    recognising(pipe, Threshold(2.0), monkeypatch)
    me = pipe.enroll(tiny.photo(1))
    me.save(tmp_path / "me.safetensors")
    reference = {"ann": me, "bob": tmp_path / "me.safetensors"}
    ((ann, bob),) = pipe(PROMPT, reference=reference, generator=tiny.generator(1)).people
    assert ann.matched and bob == PersonResult("bob", True)
