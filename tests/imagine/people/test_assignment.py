"""Which face of a picture shows which person."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from imagine.people.assignment import KnownPerson, PersonResult, assign, check_people
from imagine.people.persona import Face, Persona
from imagine.people.strangers import FaceRecogniser, Identity
from imagine.records import FaceBox
from tests.faces import ColourRecogniser, face, picture

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def person(name: str, *colours: tuple[int, int, int]) -> KnownPerson:
    return KnownPerson(name, tuple(np.array(colour) / 255 for colour in colours))


def check(people: list[KnownPerson], *colours: tuple[int, int, int]) -> list[PersonResult]:
    """Check a picture with faces of these colours, from left to right."""
    return check_people(picture(*colours), [face(number) for number in range(len(colours))], people, ColourRecogniser())


def test_faces_are_assigned_by_similarity_and_not_by_their_place() -> None:
    first, second = check([person("ann", RED), person("bob", BLUE)], BLUE, RED)
    assert first == PersonResult("ann", True, 1.0, True) and second == PersonResult("bob", True, 1.0, True)
    assert not first.failed and json.dumps(first.as_dict())


def test_the_sum_of_similarities_decides() -> None:
    # Each row prefers column 0, but giving it to row 1 costs less.
    assert assign(np.array([[0.9, 0.8], [0.7, 0.1]])) == {0: 1, 1: 0}
    assert assign(np.array([[0.2], [0.9], [0.1]])) == {1: 0} and assign(np.zeros((2, 0))) == {}


def test_a_person_without_a_face_is_not_found() -> None:
    ann, bob = check([person("ann", RED), person("bob", BLUE)], BLUE)
    assert ann == PersonResult("ann", False, None, False) and ann.failed and bob.matched
    assert [each.found for each in check([person("ann", RED)])] == [False]


def test_a_face_of_somebody_else_is_found_and_not_matched() -> None:
    ann, bob = check([person("ann", RED), person("bob", BLUE)], RED, GREEN)
    assert ann.matched and bob.found and bob.matched is False and bob.failed
    assert bob.similarity is not None and bob.similarity < 1 - ColourRecogniser.same


def test_a_face_that_is_more_like_another_person_is_not_matched() -> None:
    # Both faces are ann's. Bob gets the second one, which is above the limit for him but more like ann.
    ann, bob = check([person("ann", RED), person("bob", (128, 0, 128))], RED, (215, 0, 40))
    assert ann.matched and bob.similarity is not None and bob.similarity > 1 - ColourRecogniser.same
    assert bob.matched is False


def test_the_same_person_twice_matches_both_faces() -> None:
    assert [each.matched for each in check([person("ann", RED), person("eva", RED)], RED, RED)] == [True, True]


def test_the_nearest_of_several_photos_counts() -> None:
    (ann,) = check([person("ann", GREEN, RED)], RED)
    assert ann.similarity == pytest.approx(1.0) and ann.matched


def test_somebody_who_cannot_be_compared_gets_a_face_that_is_left() -> None:
    ann, bob = check([KnownPerson("ann"), person("bob", BLUE)], BLUE, GREEN)
    assert ann == PersonResult("ann", True) and not ann.failed and bob.matched
    assert check([KnownPerson("ann"), person("bob", BLUE)], BLUE)[0] == PersonResult("ann", False)
    faces = [face(0), face(1)]
    assert check_people(picture(RED, BLUE), faces, [person("ann", RED)], None) == [PersonResult("ann", True)]


def test_only_embeddings_of_the_same_recogniser_are_known() -> None:
    mine, other = ColourRecogniser(), ColourRecogniser()
    photos = tuple(photographed(recogniser) for recogniser in (mine, other, None))
    persona = Persona(torch.zeros(1, 1), "encoder", photos)
    assert len(KnownPerson.of("ann", persona, mine).embeddings) == 1
    assert KnownPerson.of("ann", persona, None).embeddings == ()


def photographed(recogniser: FaceRecogniser | None) -> Face:
    identity = None if recogniser is None else Identity(recogniser, np.ones(3))
    return Face("photo", FaceBox(0, 0, 8, 8, 1.0), 1, 0, 1.0, "good", Image.new("RGB", (8, 8)), identity)
