"""The questions of a human study, made from the folders of evaluations of the same suite, people and prompts.

Three questions on each picture, as in *Imagine yourself* (arXiv 2409.13346, section 4.2.3): is it the same person, does
it follow the prompt, is it appealing? With two or more systems, the same questions on each two of them, with ties
(section 4.2.2). Some trials are attention checks, whose answer is known: the reference itself, and another person.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from imagine.errors import ConfigError
from imagine.evaluation.runs.folder import SETTINGS
from imagine.paths import as_path, shorten_path

QUESTIONS = {
    "identity": "Is it the same person?",
    "prompt": "Does the picture follow the prompt?",
    "appeal": "Is the picture appealing?",
}
PAIR_QUESTIONS = {
    "identity": "Which picture shows the person better?",
    "prompt": "Which picture follows the prompt better?",
    "appeal": "Which picture is more appealing?",
}
PASSES = ("strong", "weak", "fail")
CHOICES = ("a", "tie", "b")
CHECK_EVERY = 10  # trials for each attention check


@dataclass(frozen=True)
class Trial:
    """One question. `systems` has one name, or two for a pair; `expected` is the answer of an attention check.

    Pictures are paths: the reference, and one picture per system. case: the number of person and prompt.
    """

    case: str
    question: str
    prompt: str
    systems: tuple[str, ...]
    reference: Path
    pictures: tuple[Path, ...]
    expected: str = ""


@dataclass(frozen=True)
class _Picture:
    text: str
    reference: Path
    file: Path
    identity: Any


def make_trials(evaluations: Mapping[str, Path], cases: int | None = None, seed: int = 0) -> list[Trial]:
    """Return the trials for systems, each given as its name and the folder of its evaluation.

    `cases` limits the number of pictures of each system, drawn at random. Raises ConfigError if a folder holds no
    evaluation, or one of another suite, people or prompts than the first.
    """
    if not evaluations:
        raise ConfigError("A study needs pictures: name the folder of an evaluation as --pictures NAME=DIR.")
    found = {name: _read_pictures(as_path(folder)) for name, folder in evaluations.items()}
    _check_same({name: as_path(folder) for name, folder in evaluations.items()})
    shared = sorted(set.intersection(*(set(own) for own in found.values())))
    if not shared:
        raise ConfigError("The evaluations have no picture in common that can be read: evaluate the same prompts.")
    dice = random.Random(seed)
    chosen = shared if cases is None else sorted(dice.sample(shared, min(cases, len(shared))))
    trials = [
        _trial(case, question, (name,), found) for case in chosen for question in QUESTIONS for name in evaluations
    ] + [
        _trial(case, question, two, found)
        for case in chosen
        for question in PAIR_QUESTIONS
        for two in combinations(evaluations, 2)
    ]
    return trials + _checks(found[next(iter(evaluations))], chosen, -(-len(trials) // CHECK_EVERY), dice)


def _trial(case: str, question: str, systems: tuple[str, ...], found: Mapping[str, Mapping[str, _Picture]]) -> Trial:
    pictures = [found[name][case] for name in systems]
    return Trial(
        case, question, pictures[0].text, systems, pictures[0].reference, tuple(each.file for each in pictures)
    )


def _checks(pictures: Mapping[str, _Picture], cases: Sequence[str], count: int, dice: random.Random) -> list[Trial]:
    """Return attention checks about identity: half of them show the reference itself, half another person's."""
    checks = []
    for number in range(count):
        own = pictures[cases[number % len(cases)]]
        others = sorted({each.reference for each in pictures.values() if each.identity != own.identity})
        is_same = number % 2 == 0 or not others
        shown = own.reference if is_same else dice.choice(others)
        name, expected = f"check-{number}", "strong" if is_same else "fail"
        checks.append(Trial(name, "identity", own.text, ("check",), own.reference, (shown,), expected))
    return checks


def _read_pictures(folder: Path) -> dict[str, _Picture]:
    path = folder / "pictures.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {
            line["id"]: _Picture(line["text"], folder / line["reference"], folder / line["file"], line["identity"])
            for line in lines
            if line.get("row", "full") == "full" and (folder / line["file"]).is_file()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{shorten_path(folder)} holds no finished evaluation of one person in each picture ({error}): run "
            "`imagine evaluate` with the suite portraits, dreambench or photos first."
        ) from error


def _check_same(folders: Mapping[str, Path]) -> None:
    known: tuple[str, Any] | None = None
    for name, folder in folders.items():
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{shorten_path(folder / SETTINGS)} cannot be read ({error}).") from error
        facts = {key: settings.get(key) for key in ("suite", "seed", "world", "subjects")}
        if known is not None and facts != known[1]:
            other = ", ".join(key for key in facts if facts[key] != known[1][key])
            raise ConfigError(f"{name} and {known[0]} were evaluated with another {other}: evaluate both alike.")
        known = known or (name, facts)
