"""Turn a call's prompts and references, in any accepted form, into one request per picture.

A reference is a photo in any form that `imagine.people.photos` opens, a Persona, or a list of these that all show the
same person. A prompt with several people names each of them, and the references are a dict from these names:

    "{a} hugs {b}"                         {"a": ..., "b": ...}: placeholders in braces
    "the man on the left hugs the woman"   {"the man on the left": ..., "the woman": ...}: phrases of the sentence

The people are numbered in the order in which the sentence mentions them. A placeholder becomes plain words ("the first
person"), and a phrase gets the same words in front ("the first person, the man on the left, hugs ..."), because the
weights are trained with these words.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
_ORDINALS = ("first", "second", "third", "fourth")
MOST_PEOPLE = len(_ORDINALS)  # in one picture
_ORDINAL = re.compile(rf"(?<!\w)the ({'|'.join(_ORDINALS)}) person(?!\w)", re.IGNORECASE)


@dataclass(frozen=True)
class Person:
    """One person of a picture: the name used in the prompt ("" if none), and the photos or personas.

    `place` is the person's number among the references that the caller gave, from 0.
    """

    name: str
    references: tuple[Any, ...]
    place: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Request:
    """One picture to generate: a sentence without placeholders, and the people in the order of the sentence."""

    sentence: str
    people: tuple[Person, ...] = ()


def read_requests(prompt: "str | Sequence[str]", reference: Any = None, blank: bool = False) -> list[Request]:
    """Return one request per prompt.

    With one prompt (a string), `reference` is None, a photo, a Persona, a list of several photos of one person, or a
    dict from names to any of these. With a list of prompts, a list holds one reference per prompt; any other form
    applies to all prompts. With `blank`, a prompt may be empty, and then shows all people of its reference.

    Raises PromptError if prompts and references do not fit together: a name without a reference, a reference that no
    prompt mentions, or more than MOST_PEOPLE people.
    """
    prompts = sentences(prompt)
    if isinstance(prompt, str) or not isinstance(reference, (list, tuple)):
        requests = [_request(each, reference, blank) for each in prompts]
        _check_all_mentioned(reference, requests)
        return requests
    if len(reference) != len(prompts):
        raise PromptError(
            f"There are {len(prompts)} prompts but {len(reference)} references: give one reference per prompt, or one "
            "for all prompts."
        )
    requests = [_request(each, own, blank) for each, own in zip(prompts, reference, strict=True)]
    for own, request in zip(reference, requests, strict=True):
        _check_all_mentioned(own, [request])
    return requests


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


def _request(prompt: str, reference: Any, blank: bool) -> Request:
    is_blank = not prompt.strip()
    if is_blank and not blank:
        raise PromptError("The prompt is empty: describe in a sentence what the picture should show.")
    if not isinstance(reference, Mapping):
        if named := list(dict.fromkeys(_PLACEHOLDER.findall(prompt))):
            raise PromptError(
                f"The prompt names {_listed(named)}: give a reference for each name, such as {{{named[0]!r}: photo}}."
            )
        return Request(prompt, () if reference is None else (Person("", _references(reference)),))
    given = {str(name): each for name, each in reference.items()}
    names = list(given)
    chosen = names if is_blank else people_in(prompt, names)
    if len(chosen) > MOST_PEOPLE:
        raise PromptError(
            f"The prompt has {len(chosen)} people, but a picture can show at most {MOST_PEOPLE}: leave some out."
        )
    people = tuple(Person(name, _references(given[name]), names.index(name)) for name in chosen)
    return Request(prompt if is_blank else in_plain_words(prompt, chosen), people)


def people_in(prompt: str, names: Sequence[str]) -> list[str]:
    """Return the names that a prompt mentions, in the order of the prompt.

    A prompt without any of the names may use the plain words ("the first person"), which mean the names in their order.
    If there is only one name, it need not be mentioned. Raises PromptError for a placeholder that is not a name, and if
    none of several names is mentioned.
    """
    found = list(dict.fromkeys(each.name for each in _mentions(prompt, names)))
    if not found:
        ordinals = [_ORDINALS.index(word.lower()) for word in _ORDINAL.findall(prompt)]
        found = [name for place, name in enumerate(names) if place in ordinals or len(names) == 1]
    if names and not found:
        raise PromptError(
            f"The prompt mentions none of the people {_listed(names)}: write these names in braces where the people "
            "appear in the sentence."
        )
    return found


def number_in_words(words: str) -> int | None:
    """Return the number, from 0, that plain words such as "the first person" stand for; None for other words."""
    found = _ORDINAL.fullmatch(words.strip())
    return None if found is None else _ORDINALS.index(found[1].lower())


def in_plain_words(prompt: str, people: Sequence[str]) -> str:
    """Return a prompt with plain words for its placeholders, and with these words in front of its phrases.

    people: the names of the picture's people in their order, which may include people whom this prompt does not name.
    """
    parts, end = [], 0
    for each in _mentions(prompt, people):
        rest = prompt[each.end :]
        parts += [prompt[end : each.start], _words(people, each, prompt[each.start : each.end], rest)]
        end = each.end
    return "".join([*parts, prompt[end:]])


@dataclass(frozen=True)
class _Mention:
    """One place of a prompt that names a person: from `start` to `end`, in braces or as a phrase."""

    start: int
    end: int
    name: str
    in_braces: bool


def _mentions(prompt: str, names: Sequence[str]) -> list[_Mention]:
    """Return the mentions of people in a prompt, the first one first.

    Letters between double quotes are to be drawn, and mention nobody. A name that the prompt has in braces is not also
    searched as a phrase; neither is a name of one letter, which may be an article. Raises PromptError for a name in
    braces that is not in `names`.
    """
    braced = [match["braced"] for match in _pattern(()).finditer(prompt) if match["braced"]]
    if unknown := list(dict.fromkeys(name for name in braced if name not in names)):
        known = f"the references are for {_listed(names)}" if names else "there are no references"
        raise PromptError(f"The prompt names {_listed(unknown)}, but {known}: use the same names in both.")
    phrases = [name for name in names if name not in braced and len(name.strip()) > 1]
    phrases.sort(key=len, reverse=True)  # so that "the man on the left" is not read as "the man"
    found = []
    for match in _pattern(phrases).finditer(prompt):
        if match["braced"]:
            found.append(_Mention(match.start(), match.end(), match["braced"], True))
        elif match.lastgroup is not None:
            name = phrases[int(match.lastgroup.removeprefix("phrase"))]
            found.append(_Mention(match.start(), match.end(), name, False))
    return found


def _pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern of quoted letters, of names in braces, and of phrases; the group of phrase N is "phraseN"."""
    choices = [_QUOTED.pattern, r"\{(?P<braced>[^{}|]+)\}"]
    for number, phrase in enumerate(phrases):
        words = r"\s+".join(map(re.escape, phrase.split()))
        choices.append(rf"(?<!\w)(?P<phrase{number}>{words})(?!\w)")
    return re.compile("|".join(choices), re.IGNORECASE)


def _words(people: Sequence[str], mention: _Mention, as_written: str, rest: str) -> str:
    """Return the plain words for one mention. rest: the prompt after it."""
    if len(people) == 1:
        return "the person" if mention.in_braces else as_written
    ordinal = f"the {_ORDINALS[people.index(mention.name)]} person"
    if mention.in_braces:
        return ordinal
    closing = "," if re.match(r"\s+\w", rest) else ""
    return f"{ordinal}, {' '.join(mention.name.split())}{closing}"


def _check_all_mentioned(reference: Any, requests: Sequence[Request]) -> None:
    """Raise PromptError if a dict of references has a person whom no request shows."""
    if not isinstance(reference, Mapping):
        return
    shown = {person.name for request in requests for person in request.people}
    if unused := [name for name in map(str, reference) if name not in shown]:
        raise PromptError(
            f"The prompt never mentions {_listed(unused)}: write the name in braces where the person appears in the "
            "sentence, or leave the reference out."
        )


def _references(reference: Any) -> tuple[Any, ...]:
    references = tuple(reference) if isinstance(reference, (list, tuple)) else (reference,)
    if not references or any(each is None for each in references):
        raise PromptError("A list of references is empty or contains None: give at least one photo for every person.")
    return references


def _listed(names: Iterable[str]) -> str:
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
