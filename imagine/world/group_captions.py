"""Write captions of pictures with several people: who stands where, and what each one does and wears.

A caption calls people by number ("the first person"), in the order of their references, which is independent of their
places in the picture. The places are mentioned in most captions, so that a prompt can say who stands where, and left
out in some, so that it need not.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from imagine.world.captions import PHRASES, STYLE_PHRASES, attributes, choose, describe_person, garment
from imagine.world.contexts import Contexts
from imagine.world.groups import ARRANGEMENTS, Groups, group_contexts
from imagine.world.people import People

ORDINALS = ("first", "second", "third", "fourth")
PLACES = {
    2: ("on the left", "on the right"),
    3: ("on the left", "in the middle", "on the right"),
    4: ("on the far left", "on the left", "on the right", "on the far right"),
}
_COUNTS = {2: ("two people", "a pair of people"), 3: ("three people",), 4: ("four people",)}
_ARRANGED = {
    "side by side": ("side by side", "next to each other"),
    "one behind": ("one behind the other", "standing close together"),
    "arms round shoulders": ("with arms round shoulders", "with an arm round each other"),
}


def group_captions(
    people: People, contexts: Contexts, groups: Groups, order: Tensor, style: str, seeds: Sequence[int]
) -> list[str]:
    """Return one caption per picture in the style "dense" (describes people) or "rewritten" (as users write prompts).

    people, contexts: the rows i*P to i*P+P-1 of picture i, from left to right. order: (pictures, P), the place (from
    the left) of each person in the order of the references. seeds: one per picture. Raises ValueError for a style
    that is unknown.
    """
    if style not in ("dense", "rewritten"):
        raise ValueError(f"There is no caption style {style!r} for several people: choose dense or rewritten.")
    facts, count = attributes(people, group_contexts(contexts, groups)), groups.scale.shape[1]
    captions = []
    for picture, seed in enumerate(seeds):
        random = np.random.default_rng([seed, 6])
        start = picture * count
        rows = facts[start : start + count]
        persons = []
        for number, place in enumerate(order[picture].tolist()):
            who = describe_person(people, start + place, rows[place], 14, random) if style == "dense" else ""
            persons.append(_person(rows[place], number, place, count, who, random))
        captions.append(_picture(rows[0], ARRANGEMENTS[int(groups.kind[picture])], count, random) + "; ".join(persons))
    return captions


def _picture(row: dict[str, str], arrangement: str, count: int, random: np.random.Generator) -> str:
    """Return the beginning of a caption: style, number of people, scene, light and arrangement."""
    opening = "" if row["style"] == "photo" and random.random() < 0.4 else choose(random, STYLE_PHRASES[row["style"]])
    parts = [choose(random, PHRASES["scene"][row["scene"]])] if random.random() < 0.85 else []
    if random.random() < (0.85 if row["light"] != "soft" else 0.3):
        parts.append(choose(random, PHRASES["light"][row["light"]]))
    if random.random() < 0.7:
        parts.append(choose(random, _ARRANGED[arrangement]))
    return f"{opening} {choose(random, _COUNTS[count])}".strip() + " " + ", ".join(parts) + ": "


def _person(row: dict[str, str], number: int, place: int, count: int, who: str, random: np.random.Generator) -> str:
    parts = [f"the {ORDINALS[number]} person"]
    if who:
        parts.append(who)
    if random.random() < 0.75:
        parts[0] += f" {PLACES[count][place]}"
    told = [("expression", 0.85, "neutral"), ("yaw", 0.35, "front"), ("headwear", 0.85, "none")]
    for name, probability, default in told:
        if random.random() < (probability if row[name] != default else 0.15):
            parts.append(choose(random, PHRASES[name][row[name]]))
    if row["held"] != "none" and random.random() < 0.7:
        parts.append(choose(random, PHRASES["held"][row["held"]]))
    if row["letters"] or random.random() < 0.85:
        parts.append(garment(row))
    return ", ".join(parts)
