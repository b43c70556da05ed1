"""Requests from all accepted forms of prompts and references."""

import pytest

from imagine.errors import PromptError
from imagine.request import Person, Request, read_requests


def test_one_prompt_with_a_list_means_several_photos_of_one_person() -> None:
    assert read_requests("smiling", ["1.jpg", "2.jpg"]) == [Request("smiling", (Person("", ("1.jpg", "2.jpg")),))]


def test_a_list_of_prompts_with_a_list_means_one_reference_each() -> None:
    assert read_requests(["smiling", "crying", "asleep"], ["1.jpg", None, ["2.jpg", "3.jpg"]]) == [
        Request("smiling", (Person("", ("1.jpg",)),)),
        Request("crying"),
        Request("asleep", (Person("", ("2.jpg", "3.jpg")),)),
    ]


def test_a_list_of_prompts_may_share_one_reference() -> None:
    shared = (Person("", ("1.jpg",)),)
    assert read_requests(["smiling", "crying"], "1.jpg") == [Request("smiling", shared), Request("crying", shared)]


def test_placeholders_become_words_in_the_order_of_the_prompt() -> None:
    references = {"ann": "a.jpg", "bob": ["b.jpg", "c.jpg"], "eve": "e.jpg"}
    (request,) = read_requests("{bob} hugs {ann}, and {bob} smiles", references)
    assert request.sentence == "the first person hugs the second person, and the first person smiles"
    assert request.people == (Person("bob", ("b.jpg", "c.jpg")), Person("ann", ("a.jpg",)))


def test_a_single_placeholder_becomes_the_person() -> None:
    (request,) = read_requests("{ann} on a beach", {"ann": "a.jpg", "bob": "b.jpg"})
    assert request == Request("the person on a beach", (Person("ann", ("a.jpg",)),))


def test_a_prompt_without_placeholders_shows_all_people() -> None:
    (request,) = read_requests("two friends", {"ann": "a.jpg", "bob": "b.jpg"})
    assert [person.name for person in request.people] == ["ann", "bob"]


@pytest.mark.parametrize(
    ("prompt", "reference", "message"),
    [
        ("{ann} smiles", None, "ann"),
        ("{ann} smiles", "a.jpg", "'ann': photo"),
        ("{ann}, {bob} and {eve}", {"bob": "b.jpg"}, r"\{ann\} and \{eve\}.*\{bob\}"),
        ("smiling", ["a.jpg", None], "contains None"),
        (["smiling", ""], "a.jpg", "empty"),
        (["smiling", 3], "a.jpg", "sentence"),
        (None, "a.jpg", "sentence"),
    ],
)
def test_prompts_and_references_that_do_not_match_raise(prompt: object, reference: object, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_requests(prompt, reference)  # type: ignore[arg-type]
