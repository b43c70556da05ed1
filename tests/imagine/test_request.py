"""Requests from all accepted forms of prompts and references."""

from typing import Any

import numpy as np
import pytest
import torch

from imagine.errors import ConfigError, PromptError
from imagine.request import (
    Person,
    Request,
    finite,
    in_plain_words,
    numbers,
    read_requests,
    whole,
    word_notes,
)  # fmt: skip


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
    references = {"ann": "a.jpg", "bob": ["b.jpg", "c.jpg"]}
    (request,) = read_requests("{bob} hugs {ann}, and {bob} smiles", references)
    assert request.sentence == "the first person hugs the second person, and the first person smiles"
    assert request.people == (Person("bob", ("b.jpg", "c.jpg")), Person("ann", ("a.jpg",)))


def test_a_single_placeholder_becomes_the_person() -> None:
    (request,) = read_requests("{ann} on a beach", {"ann": "a.jpg"})
    assert request == Request("the person on a beach", (Person("ann", ("a.jpg",)),))


def test_a_person_is_numbered_by_the_sentence_and_placed_by_the_references() -> None:
    (request,) = read_requests("{bob} hugs {ann}", {"ann": "a.jpg", "bob": "b.jpg"})
    assert [(person.name, person.place) for person in request.people] == [("bob", 1), ("ann", 0)]


def test_one_reference_needs_no_mention_and_plain_words_mention_people_in_their_order() -> None:
    assert read_requests("smiling", {"ann": "a.jpg"}) == [Request("smiling", (Person("ann", ("a.jpg",)),))]
    prompt = "the second person hugs the first person"
    (request,) = read_requests(prompt, {"ann": "a.jpg", "bob": "b.jpg"})
    assert request.sentence == prompt and [person.name for person in request.people] == ["ann", "bob"]


LEFT, WOMAN = "the man on the left", "the woman"


@pytest.mark.parametrize(
    ("prompt", "names", "sentence"),
    [
        (
            "the man on the left hugs the woman", [LEFT, WOMAN],
            "the first person, the man on the left, hugs the second person, the woman",
        ),
        (
            "The Man  on the left hugs the woman.", [LEFT, WOMAN],
            "the first person, the man on the left, hugs the second person, the woman.",
        ),
        (
            "the woman, who smiles, and the man", ["the man", WOMAN],
            "the first person, the woman, who smiles, and the second person, the man",
        ),
        (  # the longer phrase is meant, and "the man" has a place of its own
            "the man on the left hugs the man", ["the man", LEFT],
            "the first person, the man on the left, hugs the second person, the man",
        ),
        ("the woman's hat is on {bob}", [WOMAN, "bob"], "the first person, the woman's hat is on the second person"),
        ("{the woman} hugs {a}", [WOMAN, "a"], "the first person hugs the second person"),
        ("on a beach, {b} hugs {a}", ["a", "b"], "on a beach, the first person hugs the second person"),
        ("Ann hugs Bob, Anna waves", ["ann", "bob"], "the first person, ann, hugs the second person, bob, Anna waves"),
        (  # what is between quotes is to be drawn
            'the woman reads "the man" to the man', ["the man", WOMAN],
            'the first person, the woman, reads "the man" to the second person, the man',
        ),
        ("the woman (X) and a.b", [WOMAN, "a.b"], "the first person, the woman (X) and the second person, a.b"),
        ("The woman smiles", [WOMAN], "The woman smiles"),
    ],
)  # fmt: skip
def test_phrases_of_the_sentence_name_people(prompt: str, names: list[str], sentence: str) -> None:
    (request,) = read_requests(prompt, {name: f"{name}.jpg" for name in names})
    assert request.sentence == sentence
    assert {person.references[0] for person in request.people} == {f"{name}.jpg" for name in names}


def test_the_same_photo_or_the_same_name_twice_is_fine() -> None:
    (request,) = read_requests("{a} hugs {b}, and {a} smiles", {"a": "x.jpg", "b": "x.jpg"})
    assert [person.references for person in request.people] == [("x.jpg",), ("x.jpg",)]


def test_each_of_shared_references_must_be_in_one_prompt_only() -> None:
    first, second = read_requests(["{a} smiles", "{b} hugs {a}"], {"a": "a.jpg", "b": "b.jpg"})
    assert [person.name for person in first.people] == ["a"]
    assert [person.name for person in second.people] == ["b", "a"]


def test_a_blank_prompt_shows_all_people_where_it_is_allowed() -> None:
    blank, other = read_requests(["", "{b} smiles"], {"a": "a.jpg", "b": "b.jpg"}, blank=True)
    assert (blank.sentence, other.sentence) == ("", "the person smiles")
    assert [person.name for person in blank.people] == ["a", "b"]


def test_plain_words_follow_the_order_of_the_people_given() -> None:
    assert in_plain_words("{b} hugs {a}", ["a", "b"]) == "the second person hugs the first person"
    with pytest.raises(PromptError, match=r"\{c\}"):
        in_plain_words("{c} smiles", ["a"])


FIVE = {name: f"{name}.jpg" for name in ("ann", "bob", "eve", "joe", "sue")}


@pytest.mark.parametrize(
    ("prompt", "reference", "message"),
    [
        ("{ann} smiles", None, "ann"),
        ("{ann} smiles", "a.jpg", "'ann': photo"),
        ("{ann}, {bob} and {eve}", {"bob": "b.jpg"}, r"\{ann\} and \{eve\}.*\{bob\}"),
        ("{ann smith} smiles", {"ann": "a.jpg"}, r"\{ann smith\}.*\{ann\}"),
        ("{ann} smiles", {"ann": "a.jpg", "bob": "b.jpg"}, r"never mentions \{bob\}: write the name in braces"),
        ("two friends", {"ann": "a.jpg", "bob": "b.jpg"}, r"mentions none of the people \{ann\} and \{bob\}"),
        ("on a beach", {"a": "a.jpg", "b": "b.jpg"}, r"mentions none of the people"),
        (["{ann} smiles", "{ann} cries"], {"ann": "a.jpg", "bob": "b.jpg"}, r"never mentions \{bob\}"),
        (["{ann} smiles", "{bob} cries"], [{"ann": "a.jpg", "bob": "b.jpg"}, {"bob": "b.jpg"}], r"mentions \{bob\}"),
        ("{ann}, {bob}, {eve}, {joe} and {sue}", FIVE, "has 5 people, but a picture can show at most 4"),
        ("smiling", ["a.jpg", None], "contains None"),
        (["smiling", ""], "a.jpg", "empty"),
        (["smiling", 3], "a.jpg", "sentence"),
        (None, "a.jpg", "sentence"),
    ],
)
def test_prompts_and_references_that_do_not_match_raise(prompt: object, reference: object, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_requests(prompt, reference)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "shown", "advice"),
    [
        ("a man (smiling:1.4) on a beach", "(smiling:1.4)", "guidance_scale"),
        ("a man, (red hat:.8)", "(red hat:.8)", "guidance_scale"),
        ("a [cat:dog:0.5] on a sofa", "[cat:dog:0.5]", "guidance_scale"),
        ("a ((very old)) man", "((very old))", "guidance_scale"),
        ("a man (smiling)++ here", ")++", "guidance_scale"),
        ("a smiling++ man", "smiling++", "guidance_scale"),
        ("a man <lora:detail_tweaker:0.8>", "<lora:detail_tweaker:0.8>", "load_lora_weights"),
        ("a man <LoRA:x>", "<LoRA:x>", "load_lora_weights"),
        ("a man, embedding:bad-hands", "embedding:bad-hands", "load_textual_inversion"),
        ("a man, BREAK a beach", "BREAK", "one sentence"),
        ("a {red|blue} hat", "{red|blue}", "several prompts"),
        ("a __colour__ hat", "__colour__", "several prompts"),
    ],
)
def test_notations_of_other_programs_are_noted(prompt: str, shown: str, advice: str) -> None:
    for given in ((prompt,), (None, [PLAIN, prompt]), (prompt, prompt)):
        (note,) = word_notes(*given)
        assert shown in note and advice in note and note.endswith(".") and "\n" not in note


PLAIN = "a person smiling on a beach"


@pytest.mark.parametrize(
    "prompt",
    [
        PLAIN, "a picture in the ratio (16:9)", "a clock (at 10:30) on a wall", "a man (30 years old) with a hat",
        'a sign with the letters "(A:1.2) ((X)) <lora:x>"', "a C++ developer", "an A+ student, 18+", "TAKE A BREAK",
        "{ann} hugs {bob}", "his score (home: 3)", "a [small] cat", "a 3:4 portrait -- of a man", "snake_case",
    ],
)  # fmt: skip
def test_plain_sentences_have_no_note(prompt: str) -> None:
    assert word_notes(prompt) == []


def test_numbers_of_python_and_numpy_are_read() -> None:
    for value in (2, 2.0, np.float32(2), np.int64(2)):
        assert finite("x", value) == 2.0 and type(finite("x", value)) is float
    for count in (2, np.int64(2)):
        assert whole("x", count) == 2 and type(whole("x", count)) is int
    for given in ([1, 0.5], (1.0, np.float32(0.5)), np.array([1.0, 0.5]), torch.tensor([1.0, 0.5])):
        assert numbers("x", given) == [1.0, 0.5]


@pytest.mark.parametrize("value", [True, False, np.bool_(True), float("nan"), np.float32("inf"), "1", None, 1j, [1.0]])
def test_what_is_no_finite_number_raises(value: Any) -> None:
    for read in (finite, whole):
        with pytest.raises(ConfigError, match=r"must be a (finite|whole) number"):
            read("x", value)
    with pytest.raises(ConfigError, match="must be a list of finite numbers"):
        numbers("x", [0.5, value])


def test_a_whole_number_that_no_float_can_hold_is_no_finite_number() -> None:
    with pytest.raises(ConfigError, match="must be a finite number"):
        finite("x", 10**400)
