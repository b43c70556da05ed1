"""Resolve the references of records to indices: those of targets of pairs, and those of the people in a picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from imagine.shards.facts import PEOPLE, Problems, add_problem
from imagine.shards.index import Index

_PER_PERSON = 4  # most references of a person who names none and is known by the identity
NOT_FOUND = "a reference that does not exist"
IN_SEVERAL = "a reference that several shards have"
TO_ITSELF = "a reference to itself"
OTHER_PERSON = "a reference to another person"
SHOWS_SEVERAL = "a reference that shows several people"
NO_REFERENCE_LEFT = "a record of several people with a person whose references cannot be used"
NO_FACE = "a record of several people with a person who has neither a reference nor a face box"


@dataclass(frozen=True)
class Links:
    """The resolved references, the records of each person and the problems, with records as indices."""

    references: dict[int, int] = field(default_factory=dict)  # target of a pair -> its reference
    people: dict[str, list[int]] = field(default_factory=dict)  # identity -> records of this person alone
    groups: dict[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)  # record -> references of each person
    problems: Problems = field(default_factory=dict)  # reason -> "SHARD: KEY"


@dataclass(frozen=True)
class _Target:
    """A record whose references are to be resolved; `people` are the entries of one that shows several."""

    part: int
    number: int
    name: str  # for the problems
    reference: str | None
    people: Sequence[dict[str, Any]]


class _Keys:
    """The records of all shards by key, with the identity of each, and which of them show several people."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[int, int]]] = {}  # key -> (part, index)
        self.identities: dict[int, str] = {}
        self.several: set[int] = set()

    def find(self, key: str, target: _Target, identity: str | None) -> tuple[int, str]:
        """Return the record that a key stands for in a target, and the problem with it, or an empty string."""
        candidates = self.rows.get(key, [])
        # Keys are only unique inside a shard, so the record's own shard has precedence.
        preferred = [row for row in candidates if row[0] == target.part] or candidates
        if len(preferred) != 1:
            return -1, IN_SEVERAL if preferred else NOT_FOUND
        row = preferred[0][1]
        if row == target.number:
            return row, TO_ITSELF
        if row in self.several:
            return row, SHOWS_SEVERAL
        return row, OTHER_PERSON if len({self.identities.get(row), identity} - {None}) > 1 else ""


def resolve_links(parts: Sequence[tuple[str, Index]]) -> Links:
    """Resolve every reference to the index of a record, after all keys are collected.

    parts: the name and the index of each shard.
    """
    links, keys, targets = Links(), _Keys(), list[_Target]()
    numbered = ((part, row) for part in range(len(parts)) for row in range(len(parts[part][1])))
    for number, (part, row) in enumerate(numbered):
        facts = json.loads(parts[part][1].line(row))
        name = f"{parts[part][0]}: {facts['key']}"
        people = facts.get(PEOPLE, ())
        keys.rows.setdefault(facts["key"], []).append((part, number))
        if len(keys.rows[facts["key"]]) > 1:
            add_problem(links.problems, "a key that another shard has too", name)
        if len(people) > 1:
            keys.several.add(number)
        elif facts["identity"] is not None:
            links.people.setdefault(facts["identity"], []).append(number)
            keys.identities[number] = facts["identity"]
        if len(people) > 1 or facts["reference"] is not None:
            targets.append(_Target(part, number, name, facts["reference"], people))
    for target in targets:
        if len(target.people) > 1:
            _resolve_people(target, keys, links)
            continue
        row, problem = keys.find(target.reference or "", target, keys.identities.get(target.number))
        if problem:
            add_problem(links.problems, problem, target.name)
        else:
            links.references[target.number] = row
    return links


def _resolve_people(target: _Target, keys: _Keys, links: Links) -> None:
    """Add a record of several people to the groups, or a problem if a person has no usable reference and no face."""
    references = []
    for person in target.people:
        found = []
        for key in person.get("references", ()):
            row, problem = keys.find(key, target, person.get("identity"))
            if problem:
                add_problem(links.problems, problem, target.name)
            else:
                found.append(row)
        if person.get("references") and not found:
            add_problem(links.problems, NO_REFERENCE_LEFT, target.name)
            return
        found = found or links.people.get(person.get("identity") or "", [])[:_PER_PERSON]
        if not found and person.get("box") is None:
            add_problem(links.problems, NO_FACE, target.name)
            return
        references.append(tuple(dict.fromkeys(found)))
    links.groups[target.number] = tuple(references)
