"""Turn a call's prompts and references, in any accepted form, into one request per picture.

A reference is a photo in any form that `imagine.people.photos` opens, a Persona, or a list of these that all show the
same person. A prompt names people as {a} and {b}; the references are then {"a": ..., "b": ...}. The placeholders become
plain words ("the first person"), and the people's vision tokens are concatenated in that order (*Imagine yourself*,
section 3.6).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from imagine.errors import ConfigError, PromptError

if TYPE_CHECKING:
    import torch

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_QUOTED = re.compile(r'"[^"]*"')
_EMPHASIS = (
    "words have no weights here. Describe what matters in more words, or earlier in the sentence; guidance_scale sets "
    "how strictly the whole sentence is followed, and identity_scale the strength of the person."
)
_NOTATIONS = (  # of other programs, which no text encoder knows, and what to use instead
    (re.compile(r"[(\[][^()\[\]]*[^()\[\]\d\s]:[-+]?(?:\d?\.\d+|\d)\s*[)\]]"), _EMPHASIS),  # (smiling:1.4), not (16:9)
    (re.compile(r"\({2,}[^()]+\){2,}|\[{2,}[^\[\]]+\]{2,}"), _EMPHASIS),  # ((smiling))
    (re.compile(r"(?:\)[+-]+|\b[a-z]{3,}\++)(?=[\s,.]|$)"), _EMPHASIS),  # smiling++, of compel, not C++
    (
        re.compile(r"<(?:lora|lyco|lycoris|hypernet)\s*:[^<>]*>", re.IGNORECASE),
        "files are not loaded from a prompt. Load them with load_lora_weights, and leave this out.",
    ),
    (
        re.compile(r"\bembedding:\S+|<(?:ti|embedding)\s*:[^<>]*>", re.IGNORECASE),
        "embeddings are not loaded from a prompt. Load them with load_textual_inversion where the base has it, and "
        "leave this out.",
    ),
    (
        re.compile(r"(?:^|[,\n])\s*BREAK\b"),
        "prompts are not split here. Write one sentence.",
    ),
    (
        re.compile(r"\{[^{}]*\|[^{}]*\}|__\w+__"),
        "nothing is chosen from lists here. Write the word that you want, or give several prompts.",
    ),
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


@dataclass(frozen=True)
class Person:
    """One person of a picture: the name used in the prompt ("" if none), and the photos or personas."""

    name: str
    references: tuple[Any, ...]


@dataclass(frozen=True)
class Request:
    """One picture to generate: a sentence without placeholders, and the people in the picture."""

    sentence: str
    people: tuple[Person, ...] = ()


def read_requests(prompt: "str | Sequence[str]", reference: Any = None) -> list[Request]:
    """Return one request per prompt.

    With one prompt (a string), `reference` is None, a photo, a Persona, a list of several photos of one person, or a
    dict from names to any of these. With a list of prompts, a list holds one reference per prompt; any other form
    applies to all prompts. Raises PromptError if prompts and references do not fit together.
    """
    prompts = sentences(prompt)
    if isinstance(prompt, str):
        return [_request(prompt, reference)]
    if not isinstance(reference, (list, tuple)):
        return [_request(each, reference) for each in prompts]
    if len(reference) != len(prompts):
        raise PromptError(
            f"There are {len(prompts)} prompts but {len(reference)} references: give one reference per prompt, or one "
            "for all prompts."
        )
    return [_request(each, own) for each, own in zip(prompts, reference, strict=True)]


def sentences(given: Any, name: str = "prompt") -> list[str]:
    """Return one or several sentences as a list. Raises PromptError unless they are text that can be tokenized."""
    each = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
    if not each or not all(isinstance(one, str) for one in each):
        raise PromptError(f"The {name} must be a sentence or a list of sentences.")
    try:
        "".join(each).encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are not UTF-8
        raise PromptError(
            f"The {name} holds bytes that are not valid UTF-8: type it again, or save it as UTF-8."
        ) from error
    return each


def word_notes(*prompts: Any) -> list[str]:
    """Return one sentence for each notation of other programs in these prompts (None, one, or a list each).

    The text encoders read it as plain letters, so that it does not act as it would there. The quoted parts of a prompt
    are letters to be drawn, and are not searched.
    """
    given = [[each] if isinstance(each, str) else list(each or ()) for each in prompts]
    unquoted = [_QUOTED.sub("", one) for each in given for one in each if isinstance(one, str)]
    notes: list[str] = []
    for pattern, advice in _NOTATIONS:
        found = next((match[0] for each in unquoted if (match := pattern.search(each))), None)
        if found is not None:
            shown = found.strip(", \n")
            notes.append(f"The prompt's {shown!r} is read as plain words: {advice}")
    return notes


def negative_sentences(given: Any, count: int) -> list[str]:
    """Return one negative prompt for each of `count` prompts.

    Raises PromptError unless there is one negative prompt for all, or one for each.
    """
    each = sentences("" if given is None else given, "negative prompt")
    each = each * count if len(each) == 1 else each
    if len(each) != count:
        raise PromptError(
            f"There are {count} prompts but {len(each)} negative prompts: give one for each prompt, or one for all."
        )
    return each


def _request(prompt: str, reference: Any) -> Request:
    if not prompt.strip():
        raise PromptError("The prompt is empty: describe in a sentence what the picture should show.")
    named = list(dict.fromkeys(_PLACEHOLDER.findall(prompt)))
    if not isinstance(reference, Mapping):
        if named:
            raise PromptError(
                f"The prompt names {_braced(named)}: give a reference for each name, such as {{{named[0]!r}: photo}}."
            )
        return Request(prompt, _unnamed(reference))
    if unknown := [name for name in named if name not in reference]:
        known = f"the references are for {_braced(map(str, reference))}" if reference else "there are no references"
        raise PromptError(f"The prompt names {_braced(unknown)}, but {known}: use the same names in both.")
    # A prompt without placeholders shows all people of the dict; a prompt with placeholders shows only those it names.
    chosen = named or list(reference)
    people = tuple(Person(str(name), _references(reference[name])) for name in chosen)
    return Request(_PLACEHOLDER.sub(lambda found: _words(named, found[1]), prompt), people)


def _unnamed(reference: Any) -> tuple[Person, ...]:
    return () if reference is None else (Person("", _references(reference)),)


def _references(reference: Any) -> tuple[Any, ...]:
    references = tuple(reference) if isinstance(reference, (list, tuple)) else (reference,)
    if not references or any(each is None for each in references):
        raise PromptError("A list of references is empty or contains None: give at least one photo for every person.")
    return references


def _words(named: Sequence[str], name: str) -> str:
    """Return the plain words for a placeholder, which depend on the order in which the prompt names people."""
    if len(named) == 1:
        return "the person"
    place = named.index(name)
    return f"the {_ORDINALS[place]} person" if place < len(_ORDINALS) else "another person"


def _braced(names: Iterable[str]) -> str:
    *others, last = [f"{{{name}}}" for name in names]
    return f"{', '.join(others)} and {last}" if others else last


def whole(name: str, value: Any) -> int:
    """Return a count as int. Raises ConfigError unless it is a whole number of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 1:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least 1.")
    return int(value)


def finite(name: str, value: Any) -> float:
    """Return a finite number, of Python or NumPy, as float. Raises ConfigError for anything else."""
    number = _as_float(value)
    if not math.isfinite(number):
        raise ConfigError(f"{name}={value!r} must be a finite number.")
    return number


def _as_float(value: Any) -> float:
    """Return a number as float; NaN for anything else, also for True and False, which Python counts as numbers."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number of more than 308 digits
        return math.nan


def numbers(name: str, given: Any) -> list[float]:
    """Return a list of finite numbers as floats. Raises ConfigError for anything else."""
    plain = given.tolist() if hasattr(given, "tolist") else given  # an array of NumPy or a tensor
    each = [_as_float(one) for one in plain] if isinstance(plain, Iterable) else []
    if not each or not all(map(math.isfinite, each)):
        raise ConfigError(f"{name}={given!r} must be a list of finite numbers.")
    return each


def generators(given: Any, count: int) -> "list[torch.Generator | None]":
    """Return one random generator (None: torch's default) for each of `count` pictures.

    Raises ConfigError for anything that is not a torch.Generator, and for a list of another length.
    """
    import torch  # imported here because the command line checks prompts before it loads torch, which takes seconds

    each = list(given) if isinstance(given, (list, tuple)) else [given] * count
    for one in each:
        if one is not None and not isinstance(one, torch.Generator):
            seed = one if isinstance(one, int) else 7
            raise ConfigError(
                f"generator={one!r} is not a torch.Generator: give torch.Generator().manual_seed({seed})."
            )
    if len(each) != count:
        raise ConfigError(
            f"There are {len(each)} generators for {count} pictures: give one for each picture, or one for all."
        )
    return each


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is unknown: choose {', '.join(choices[:-1])} or {choices[-1]}.")
